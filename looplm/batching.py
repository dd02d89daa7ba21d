"""Several prompts at once, continuously: rows come and go, each at its own position and in its own loop.

A pass over the weights takes every row in flight one loop further, whichever loop that is: loops share their weights.
A row that stops looping chooses its next token and begins it in the next pass; a row that ends leaves its place to the
next prompt.  Whatever its neighbours do, a row's tokens are to the bit those that `generate` gives it alone.

Knowingly not here: prompts fed together, and cache policies in which a row is not done when it has stopped looping.
"""

import collections
import dataclasses
from collections.abc import Collection, Iterator, Sequence

import numpy as np

from .arrays import Floats, Ints, aligned_empty
from .cache import KeyValueCache, KeyValueType, Policy
from .decoder import Decoder
from .errors import UsageError
from .exits import ExitRule, Readout, bind, readout_of
from .generation import (
    PREALLOCATED,
    WORTH_SHARING,
    Generated,
    Session,
    check_memory,
    check_prompt,
    feed_prompt,
    rewind,
    why_last,
)
from .kernels.product.stored import FEW_ROWS
from .sampling import Sampling, choose
from .stored import StoredWeights
from .threads import available_threads, team
from .weights import Weights

ROWS = 16  # in flight
SERVED: tuple[Policy, ...] = ("last-exited", "full")


@dataclasses.dataclass(frozen=True, eq=False)
class Request:
    """One prompt, and what is its own."""

    prompt_ids: Ints  # S
    rng: np.random.Generator
    max_new_tokens: int = 128


@dataclasses.dataclass(eq=False)
class _Flight:
    """A request that has a place."""

    number: int
    request: Request
    seen: np.ndarray  # V: tokens of the prompt and the text
    count: int = 0  # tokens given out


class _PassReadout(Readout):
    """Logits of every loop that the positions in flight have run: those of a pass are multiplied together, once."""

    def __init__(self, weights: StoredWeights, loops: int, rows: int) -> None:
        super().__init__(weights.head)
        self.logits = np.empty((loops, rows, self.vocab_size), np.float32)
        self.rows, self.loops_run = np.arange(rows), loops  # what a rule asks about: these rows after so many loops

    def __call__(self, hidden: Floats) -> list[Floats]:
        """hidden: RBD, the last loops that `rows` ran -> for each loop, BV."""
        return [self.logits[r, self.rows] for r in range(self.loops_run - len(hidden), self.loops_run)]


class Batch:
    """Prompts being continued, up to `rows` at once.  Iterate over it: (number of the request, its next token).

    `stop` ends a text early.  `passes` counts passes over the weights, `rows_run` the rows they carried.

    Raises: UsageError for rows or a cache policy it cannot serve; DataError, before anything runs, if a prompt does not
    fit the model, or keys and values the memory.
    """

    def __init__(
        self,
        weights: Weights | StoredWeights,
        requests: Sequence[Request],
        *,
        rule: ExitRule,
        rows: int = ROWS,
        sampling: Sampling | None = None,
        stop_ids: Collection[int] = (),
        policy: Policy = "last-exited",
        kv_dtype: KeyValueType = "float32",
        threads: int = 1,
    ) -> None:
        config = weights.config
        check_rows(rows)
        check_policy(policy)
        for request in requests:
            check_prompt(request.prompt_ids, config)
        loops, most = rule.deepest(config.total_ut_steps), config.max_position_embeddings
        rows = max(1, min(rows, len(requests)))
        lengths = [(request.prompt_ids.size, request.max_new_tokens) for request in requests]
        longest = max((min(prompt + new, most) for prompt, new in lengths), default=1)
        check_memory(config, loops, longest, kv_dtype, rows + 1)  # one more: prompts are fed beside the others
        capacity = max((min(prompt + min(new, PREALLOCATED), most) for prompt, new in lengths), default=1)
        prompts = max((prompt for prompt, _ in lengths), default=1)

        self.passes = self.rows_run = 0
        self._sampling = Sampling() if sampling is None else sampling
        self._stop_ids, self._rule = frozenset(stop_ids), rule
        self._session = Session(
            weights, loops=loops, capacity=prompts, policy=policy, kv_dtype=kv_dtype, threads=threads
        )
        self._weights = self._session.weights
        self._loops = loops
        self._cache = KeyValueCache(config, rows, loops, capacity, policy, kv_dtype)
        self._decoder = Decoder(self._weights, self._cache, np.zeros(rows, np.int64), rows, team(threads))
        self._waiting = collections.deque(_numbered(requests))
        # By place:
        self._flights: list[_Flight | None] = [None] * rows
        self._position = np.zeros(rows, np.int64)  # of the token in progress
        self._token = np.zeros(rows, np.int64)
        self._loops_run = np.zeros(rows, np.int64)
        self._exit_at = np.full(rows, -1)  # the loop it will be read from; -1: not known yet
        self._states = aligned_empty((1 + loops, rows, config.hidden_size))  # embedded, then after each loop
        self._gate_logit = aligned_empty((loops, rows))
        # Of a pass:
        self._x, self._out = (aligned_empty((rows, config.hidden_size)) for _ in range(2))
        self._logit = aligned_empty((rows,))
        self._readout = None if readout_of(rule) is None else _PassReadout(self._weights, loops, rows)
        self._pass_rule = rule if self._readout is None else bind(rule, self._readout)

    @property
    def in_flight(self) -> int:
        return sum(flight is not None for flight in self._flights)

    def __iter__(self) -> Iterator[tuple[int, Generated]]:
        yield from self._fill_places()
        while self.in_flight:
            yield from self._run_pass()
            yield from self._fill_places()

    def stop(self, number: int) -> None:
        """End the text of a request in flight: its last token was the last."""
        for place, flight in enumerate(self._flights):
            if flight is not None and flight.number == number:
                self._flights[place] = None

    def _fill_places(self) -> Iterator[tuple[int, Generated]]:
        """Prompts into free places, each fed alone, with their first tokens."""
        for place in range(len(self._flights)):
            while self._flights[place] is None and self._waiting:
                number, request = self._waiting.popleft()
                seen = np.zeros(self._weights.config.vocab_size, np.bool_)
                seen[request.prompt_ids] = True
                self._flights[place] = flight = _Flight(number, request, seen)
                rewind(self._session, 0)
                exit_at, logits = feed_prompt(self._session, request.prompt_ids, self._rule)
                self._cache.take_row(place, self._session.cache, request.prompt_ids.size)
                self._position[place] = request.prompt_ids.size
                yield self._next_token(place, flight, logits, exit_at, self._loops)

    def _run_pass(self) -> Iterator[tuple[int, Generated]]:
        """Every row one loop further; those that stop looping with it give their tokens."""
        places = np.flatnonzero([flight is not None for flight in self._flights])
        self._run_loops(places)
        self._decide(places)
        left = places[self._exit_at[places] >= 0]
        if self._cache.policy == "full":
            left = left[self._loops_run[left] == self._loops]
        if not left.size:
            return
        exit_at, loops_run = self._exit_at[left], self._loops_run[left]
        logits = self._read(left, exit_at)
        self._cache.leave(left, self._position[left], exit_at)
        self._position[left] += 1
        for place, row, r, run in zip(left.tolist(), logits, exit_at.tolist(), loops_run.tolist(), strict=True):
            flight = self._flights[place]
            if flight is not None:  # else it was stopped by whoever got a neighbour's token
                yield self._next_token(place, flight, row, r, run)

    def _run_loops(self, places: Ints) -> None:
        """The next loop of each of these rows, all in one pass over the weights."""
        loops, rows = self._loops_run[places], len(places)
        new = places[loops == 0]
        if new.size:
            self._states[0, new] = self._weights.embedded(self._token[new])
            if self._cache.grow(int(self._position[new].max()) + 1):
                self._decoder.cache_moved()
        x, out, logit = self._x[:rows], self._out[:rows], self._logit[:rows]
        x[...] = self._states[loops, places]
        self._decoder.place(places, self._position[places], rows)
        self._decoder.run_rows(loops, x, out, logit)
        self._states[loops + 1, places], self._gate_logit[loops, places] = out, logit
        if self._readout is not None:
            self._readout.logits[loops, places] = self._decoder.logits(out)
        self._loops_run[places] += 1
        self.passes += 1
        self.rows_run += rows

    def _decide(self, places: Ints) -> None:
        """Which rows are to be read from the loop they have just run; the rule sees those of equal depth together."""
        places = places[self._exit_at[places] < 0]
        run = self._loops_run[places]
        self._exit_at[places[run == self._loops]] = self._loops - 1
        for loops_run in range(1, self._loops):
            rows = places[run == loops_run]
            if not rows.size:
                continue
            if self._readout is not None:
                self._readout.rows, self._readout.loops_run = rows, loops_run
            hidden = self._states[1 : loops_run + 1].take(rows, axis=1)
            stops = self._pass_rule.stops(hidden, self._gate_logit[:loops_run].take(rows, axis=1))
            self._exit_at[rows[stops]] = loops_run - 1

    def _read(self, places: Ints, exit_at: Ints) -> Floats:
        """Next-token logits of rows that have stopped, each read at its own loop.  places, exit_at: M -> MV"""
        if self._readout is not None:
            return self._readout.logits[exit_at, places]
        return self._decoder.logits(self._states[exit_at + 1, places])

    def _next_token(
        self, place: int, flight: _Flight, logits: Floats, exit_at: int, loops_run: int
    ) -> tuple[int, Generated]:
        """Choose it, and make the place ready to run it, or free.  logits: V"""
        request = flight.request
        flight.count += 1
        token_id, logprob = choose(logits, self._sampling, request.rng.random(), flight.seen)
        filled, more = int(self._position[place]), flight.count < request.max_new_tokens
        finish = why_last(token_id, self._stop_ids, more, filled < self._weights.config.max_position_embeddings)
        flight.seen[token_id] = True
        self._token[place], self._loops_run[place], self._exit_at[place] = token_id, 0, -1
        if finish is not None:
            self._flights[place] = None
        return flight.number, Generated(token_id, exit_at, loops_run, logprob, finish)


def _numbered(requests: Sequence[Request]) -> Iterator[tuple[int, Request]]:
    """Those that ask for anything, with their places in the list."""
    return ((number, request) for number, request in enumerate(requests) if request.max_new_tokens > 0)


def check_rows(rows: int) -> None:
    """Raises: UsageError if so many rows cannot be in flight at once."""
    if not 1 <= rows <= FEW_ROWS:
        raise UsageError(
            f"{rows} prompts cannot be in flight at once",
            f"use 1 to {FEW_ROWS}: more are computed in another way, and would round otherwise than alone",
        )


def check_policy(policy: str) -> None:
    """Raises: UsageError for a cache policy that rows which come and go do not have."""
    if policy not in SERVED:
        raise UsageError(f"the cache policy {policy} works on one prompt at a time", f"use {' or '.join(SERVED)}")


def useful_threads(weights: StoredWeights, rows: int) -> int:
    """As for one row, but a pass does the work of all of them."""
    return available_threads() if rows * weights.bytes_per_token >= WORTH_SHARING else 1
