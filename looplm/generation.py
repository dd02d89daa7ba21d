"""Continuing a text: a prompt through all loops, then token by token, each looping only as long as its exit rule says.

Here: a session over one or several rows in lockstep, the generator of tokens, and stop strings.  Knowingly not here:
rows that come and go (batching.py), drafts (drafting.py), and anything that prints.
"""

import dataclasses
from collections.abc import Collection, Iterator, Sequence
from typing import Any, Literal, TypeVar

import numpy as np

from .arrays import Floats, Ints, aligned_empty
from .cache import SHARED, KeyValueCache, KeyValueType, Policy, kept_loops
from .config import ModelConfig
from .decoder import Decoder
from .deferral import MAX_DEFERRED, Deferral
from .errors import DataError, UsageError
from .exits import ExitRule, count_token, exit_index, readout_of
from .memory import GIB, SHARE, available_memory, resident
from .model import Trace
from .sampling import Sampling, choose
from .sharing import SharedCache
from .sizes import key_value_bytes
from .stored import StoredWeights
from .threads import available_threads, team
from .weights import Weights

PREFILL_ROWS = 256  # positions at a time: bounds the scratch memory of a long prompt
WORTH_SHARING = 1 << 20  # bytes read for a token from which on threads gain
PREALLOCATED = 1024  # new positions the cache has room for from the start; a longer text makes it grow

Finish = Literal["stop token", "max_new_tokens", "context full"]


class Session:
    """Rows being continued in lockstep: their key/value cache and the buffers of a pass.

    `feed` runs all loops over new positions.  `advance` runs one token per row, loop by loop, until the rule stops it;
    `begin`, `next_loop` and `finish` are its parts.  After it, `hidden` (RBD) and `gate_logit` (RB) hold the loops run.
    `start` (B) is each row's first real position (left padding).
    """

    def __init__(
        self,
        weights: Weights | StoredWeights,
        *,
        batch: int = 1,
        loops: int | None = None,
        start: Ints | None = None,
        capacity: int = 64,
        policy: Policy = "last-exited",
        max_deferred: int = MAX_DEFERRED,
        kv_dtype: KeyValueType = "float32",
        threads: int = 1,
    ) -> None:
        config = weights.config
        self.weights = StoredWeights.of(weights) if isinstance(weights, Weights) else weights
        self.batch = batch
        self.loops = config.total_ut_steps if loops is None else loops
        self.start = np.zeros(batch, np.int64) if start is None else np.ascontiguousarray(start, np.int64)
        kind = SharedCache if policy in SHARED else KeyValueCache
        self.cache = kind(config, batch, self.loops, capacity, policy, kv_dtype)
        rows = max(batch, PREFILL_ROWS)
        self._decoder = Decoder(self.weights, self.cache, self.start, rows, team(threads))
        self.deferral = Deferral(self._decoder, self.cache, max_deferred) if policy == "exact" else None
        self.hidden = self._decoder.states[:, :batch]
        self.gate_logit = self._decoder.gate_logit[:, :batch]
        self.loops_run = 0  # of the position in progress

    @property
    def filled(self) -> int:
        """Positions known so far, padding included."""
        return self.cache.filled

    def feed(self, input_ids: Ints) -> Trace:
        """Append positions, all loops.  input_ids: BS -> a Trace of these positions alone.

        Ids must be below vocab_size: they index memory.  Raises: DataError beyond the model's context.
        """
        length, decoder = input_ids.shape[1], self._decoder
        self._make_room(length, fed=True)
        if self.deferral:
            self.deferral.catch_up()
        hidden = aligned_empty((self.loops, self.batch, length, self.weights.config.hidden_size))
        chunk = max(1, PREFILL_ROWS // self.batch)
        for begin in range(0, length, chunk):
            part = slice(begin, min(begin + chunk, length))
            ids = input_ids[:, part]
            decoder.embedded[: ids.size] = self.weights.embedded(ids).reshape(ids.size, -1)
            positions = self.filled + np.arange(ids.shape[1])
            decoder.place(np.repeat(np.arange(self.batch), ids.shape[1]), np.tile(positions, self.batch), ids.size)
            for r in range(self.loops):
                decoder.run_loop(r, self.batch, ids.shape[1])
                hidden[r, :, part] = decoder.states[r, : ids.size].reshape(hidden[r, :, part].shape)
            self.cache.append(ids.shape[1])
        return Trace(self.weights, hidden, self.start)

    def begin(self, input_ids: Ints) -> None:
        """Start one position per row.  input_ids: B.  Raises: DataError beyond the model's context."""
        self._make_room(1)
        self._decoder.embedded[: self.batch] = self.weights.embedded(input_ids)
        self._decoder.place(np.arange(self.batch), self.filled, self.batch)
        self.loops_run = 0

    def next_loop(self) -> tuple[Floats, Floats]:
        """One more loop over the position in progress -> hidden: BD, gate_logit: B."""
        r = self.loops_run
        if self.deferral:
            self.deferral.run_loop(r)
        else:
            self._decoder.run_loop(r, self.batch, 1)
        self.cache.ran(r)
        self.loops_run = r + 1
        return self.hidden[r], self.gate_logit[r]

    def finish(self, exit_at: Ints) -> None:
        """Append the position in progress, which row b left at loop exit_at[b] (B)."""
        if self.deferral:
            self.deferral.finish(self.loops_run)
        self.cache.append_exited(exit_at)

    def advance(self, input_ids: Ints, rule: ExitRule) -> Ints:
        """One token per row, until every row has stopped.  input_ids: B -> exit_index: B, counted from 0.

        A row that stops before the others gets what it would get alone.  With the cache policy "full" all loops run.
        """
        self.begin(input_ids)
        exit_at = np.full(self.batch, self.loops - 1, np.int64)
        running = np.ones(self.batch, np.bool_)
        for r in range(self.loops):
            self.next_loop()
            if r == self.loops - 1:
                break
            stopping = running & rule.stops(self.hidden[: r + 1], self.gate_logit[: r + 1])
            exit_at[stopping] = r
            running &= ~stopping
            if not running.any() and self.cache.policy != "full":
                break
        self.finish(exit_at)
        return exit_at

    def logits(self, exit_at: Ints, rule: ExitRule | None = None) -> Floats:
        """Next-token logits of the position last advanced, read at each row's own loop.  exit_at: B -> logits: BV.

        What the rule that stopped it has read already is not multiplied again; the bits are the same.
        """
        readout = readout_of(rule)
        if readout is not None and (exit_at == exit_at[0]).all():
            known = readout.recall(self.hidden[exit_at[0]])
            if known is not None:
                return known
        if self.batch == 1:
            return self._decoder.logits(self.hidden[exit_at[0]])  # as it lies: gathering takes ten microseconds
        return self._decoder.logits(self.hidden[exit_at, np.arange(self.batch)])

    def _make_room(self, positions: int, fed: bool = False) -> None:
        most = self.weights.config.max_position_embeddings
        if self.filled + positions > most:
            raise DataError(
                f"{self.filled + positions} tokens are more than the model's context of {most}",
                "start from a shorter text",
            )
        if self.cache.reserve(positions, fed):
            self._decoder.cache_moved()


SomeSession = TypeVar("SomeSession", bound=Session)


@dataclasses.dataclass(frozen=True)
class Generated:
    """One new token, the loops it took, and on the last one why it is the last."""

    token_id: int
    exit_loop: int  # counted from 0: the state it was read from
    loops_run: int  # what really ran to predict it; the first token's are the prompt's, which runs all loops
    logprob: float  # under the model itself, nats
    finish: Finish | None = None


def useful_threads(weights: StoredWeights) -> int:
    """All cores, unless the model is so small that threads would spend their time waiting for each other."""
    return available_threads() if weights.bytes_per_token >= WORTH_SHARING else 1


def check_memory(config: ModelConfig, loops: int, positions: int, kv_dtype: KeyValueType, rows: int = 1) -> None:
    """Raises: DataError if keys and values of so many positions in each row do not fit into the memory there is.

    Beside them there are the states of all loops, of the positions that a prompt is fed at a time.
    """
    states = loops * max(rows, PREFILL_ROWS) * config.hidden_size * 4
    available, needed = available_memory(), rows * positions * key_value_bytes(config, loops, kv_dtype) + states
    if available is not None and needed > SHARE * (available - (resident() or 0)):
        several = rows > 1
        raise DataError(
            f"states, keys and values of {f'{rows} x ' if several else ''}{positions} tokens in {loops} loops take "
            f"{needed / GIB:.1f} GiB in {kv_dtype}, more than {SHARE:.0%} of the "
            f"{(available - (resident() or 0)) / GIB:.1f} GiB free",
            f"ask for fewer tokens or loops{', or fewer rows at once' if several else ''}"
            + (", or keep them in bfloat16" if kv_dtype == "float32" else ""),
        )


def check_policy_memory(
    config: ModelConfig, loops: int, prompt: int, positions: int, kv_dtype: KeyValueType, policy: Policy
) -> None:
    """The same under a policy: for all positions in the end, and for the prompt, which takes slots for every loop."""
    check_memory(config, kept_loops(policy, loops), positions, kv_dtype)
    check_memory(config, loops, prompt, kv_dtype)


def check_prompt(prompt_ids: Ints, config: ModelConfig) -> None:
    """Raises: DataError if a prompt is empty, longer than the context, or holds an id outside the vocabulary."""
    if not prompt_ids.size:
        raise DataError("the prompt has no tokens", "start from a text, or from the token that begins a document")
    if prompt_ids.size > config.max_position_embeddings:
        raise DataError(
            f"the prompt has {prompt_ids.size} tokens, but the model's context is {config.max_position_embeddings}",
            f"shorten the prompt by at least {prompt_ids.size - config.max_position_embeddings} tokens",
        )
    outside = prompt_ids[(prompt_ids < 0) | (prompt_ids >= config.vocab_size)]
    if outside.size:
        raise DataError(
            f"token id {outside[0]} is outside the model's vocabulary of {config.vocab_size}",
            "the tokenizer belongs to another model",
        )


def open_session(
    weights: Weights | StoredWeights,
    prompt_ids: Ints,
    loops: int,
    max_new_tokens: int,
    kind: type[SomeSession],
    policy: Policy,
    kv_dtype: KeyValueType,
    **settings: Any,
) -> SomeSession:
    """A session for a prompt (S) and what follows it.  Raises: DataError if one of them does not fit."""
    config = weights.config
    check_prompt(prompt_ids, config)
    longest = min(prompt_ids.size + max_new_tokens, config.max_position_embeddings)
    check_policy_memory(config, loops, prompt_ids.size, longest, kv_dtype, policy)
    capacity = min(prompt_ids.size + min(max_new_tokens, PREALLOCATED), config.max_position_embeddings)
    return kind(weights, loops=loops, capacity=capacity, policy=policy, kv_dtype=kv_dtype, **settings)


def generate(
    weights: Weights | StoredWeights,
    prompt_ids: Ints,
    *,
    rule: ExitRule,
    rng: np.random.Generator,
    sampling: Sampling | None = None,
    max_new_tokens: int = 128,
    stop_ids: Collection[int] = (),
    policy: Policy = "last-exited",
    max_deferred: int = MAX_DEFERRED,
    kv_dtype: KeyValueType = "float32",
    threads: int = 1,
) -> Iterator[Generated]:
    """Continue a prompt, one token at a time.  prompt_ids: S.

    The prompt runs all loops; the same rule then says which of them its last position is read from.  Every new token
    stops looping when the rule says so.  A token of `stop_ids` is given out, as the last.

    Raises: DataError, before anything runs, if the prompt does not fit the model, or its keys and values the memory.
    """
    loops, chosen = rule.deepest(weights.config.total_ut_steps), Sampling() if sampling is None else sampling
    session = open_session(
        weights,
        prompt_ids,
        loops,
        max_new_tokens,
        Session,
        policy,
        kv_dtype,
        max_deferred=max_deferred,
        threads=threads,
    )
    return _continue(session, prompt_ids, prompt_ids[:0], rule, rng, chosen, max_new_tokens, frozenset(stop_ids))


def _continue(
    session: Session,
    prompt_ids: Ints,
    before: Ints,
    rule: ExitRule,
    rng: np.random.Generator,
    sampling: Sampling,
    max_new_tokens: int,
    stop_ids: frozenset[int],
) -> Iterator[Generated]:
    if max_new_tokens < 1:
        return
    config = session.weights.config
    exit_at, logits = feed_prompt(session, prompt_ids, rule)
    loops_run = session.loops
    count_token(rule, loops_run)
    seen = np.zeros(config.vocab_size, np.bool_)
    seen[prompt_ids] = seen[before] = True
    token = np.empty(1, np.int64)
    for count in range(1, max_new_tokens + 1):
        token[0], logprob = choose(logits, sampling, rng.random(), seen)
        room = session.filled < config.max_position_embeddings
        finish = why_last(int(token[0]), stop_ids, count < max_new_tokens, room)
        yield Generated(int(token[0]), exit_at, loops_run, logprob, finish)
        if finish is not None:
            return
        seen[token] = True
        exits = session.advance(token, rule)
        exit_at, loops_run = int(exits[0]), session.loops_run
        count_token(rule, loops_run)
        logits = session.logits(exits, rule)[0]


def feed_prompt(session: Session, prompt_ids: Ints, rule: ExitRule) -> tuple[int, Floats]:
    """A prompt through all loops -> the loop its last position is read from, and the logits there.  prompt_ids: S."""
    prompt = np.ascontiguousarray(prompt_ids, np.int64)
    for begin in range(0, prompt.size, PREFILL_ROWS):
        trace = session.feed(prompt[None, begin : begin + PREFILL_ROWS])
    last = trace.hidden[:, :, -1]
    exit_at = int(exit_index(rule, last, trace.gate_logit[:, :, -1])[0])
    readout = readout_of(rule)
    known = None if readout is None else readout.recall(last[exit_at])
    return exit_at, session.weights.logits(last[exit_at, 0]) if known is None else known[0]


def why_last(token: int, stop_ids: Collection[int], more_wanted: bool, room: bool) -> Finish | None:
    """Why a new token is the last one; None if it is not."""
    if token in stop_ids:
        return "stop token"
    return "max_new_tokens" if not more_wanted else None if room else "context full"


class StopStrings:
    """Cuts a stream of text before the first stop string, and never lets part of one out.

    The stop string that is complete first counts, of several the one that began first; how the text is cut into
    pieces makes no difference.

    Raises: UsageError for an empty stop string.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        if "" in stops:
            raise UsageError("a stop string is empty", "give at least one character")
        self.found = False
        self._stops = tuple(stops)
        self._longest = max(map(len, stops), default=1)
        self._held = ""  # not given out yet: it may be the beginning of a stop string

    def push(self, text: str) -> str:
        """What can be shown of the text so far and has not been; nothing more once a stop string was found."""
        if self.found:
            return ""
        held = self._held + text
        places = [(held.index(stop) + len(stop), held.index(stop)) for stop in self._stops if stop in held]
        if places:
            self.found = True
            return held[: min(places)[1]]
        keep = min(self._longest - 1, len(held))
        while keep and not any(stop.startswith(held[-keep:]) for stop in self._stops):
            keep -= 1
        self._held = held[len(held) - keep :]
        return held[: len(held) - keep]

    def flush(self) -> str:
        """What was held back, at the end of the text."""
        held, self._held = self._held, ""
        return "" if self.found else held


def continue_session(
    session: Session,
    input_ids: Ints,
    *,
    rule: ExitRule,
    rng: np.random.Generator,
    sampling: Sampling,
    max_new_tokens: int,
    stop_ids: Collection[int] = (),
    before: Ints,
) -> Iterator[Generated]:
    """As `generate`, behind the positions that a session of one row already holds.  input_ids: S, before: S'.

    `before` are the ids of those positions, for the repetition penalty.  At least one new id is needed.  Whenever it is
    left, the session holds whole positions: a prefix of `before`, `input_ids` and the tokens given out.
    """
    return _continue(session, input_ids, before, rule, rng, sampling, max_new_tokens, frozenset(stop_ids))


def rewind(session: Session, positions: int) -> None:
    """Forget all but the first positions, which must be there; what waits among those goes on waiting."""
    session.cache.filled = min(session.filled, positions)
