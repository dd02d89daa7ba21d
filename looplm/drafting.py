"""Draft and verify: a few loops guess the next tokens, the full depth checks all guesses together.

A round starts from a token whose position is new.  It and every draft behind it run the first loops, one after the
other, and the head reads each draft there.  Then the deeper loops run over all these positions at once, one pass over
the weights per loop instead of one per loop and token, on the states, keys and values that drafting left: those of a
loop depend on the same loop of earlier positions alone, so they are what full decoding would have.  What the full depth
says to each position either confirms the draft that follows or replaces it; positions behind a replaced draft are
forgotten.

In a flow nothing waits for a check: since the loops share their weights, a pass takes the newest position through its
next shallow loop and every earlier one through its next deeper loop, until a draft is replaced.

Greedy text is that of full decoding to the bit of its logits, and sampled text has exactly its distribution (accepted
with probability min(1, p / q), else drawn again from what p has more than q).  Knowingly not here: early exit.
"""

import dataclasses
import statistics
import time
from collections import deque
from collections.abc import Collection, Iterator
from typing import Literal

import numpy as np

from .arrays import Array, Floats, Ints
from .cache import KeyValueType
from .errors import UsageError
from .generation import Generated, Session, feed_prompt, open_session, why_last
from .kernels.product.stored import FEW_ROWS
from .sampling import Sampling, accepts, choose, draw, log_probability, probabilities, remainder
from .stored import StoredWeights
from .weights import Weights

MOST_DRAFTS = FEW_ROWS - 1  # with the token before them they must be few rows: more are rounded in another way
AUTOMATIC_DRAFTS = 8  # the most that are chosen automatically
MEMORY = 0.98  # what a round's evidence is still worth a round later, when drafts are chosen automatically
UNTIMED = 4  # passes over the weights
LONG_FLOW = 64  # tokens that a flow is thought to last at most
KEPT = 4  # rounds that a choice holds
REMEMBERED = 32  # times that a median is taken over


Length = int | Literal["flow"]
FLOW: Literal["flow"] = "flow"  # every draft is checked while the next ones are made


@dataclasses.dataclass(frozen=True)
class Drafts:
    """How to draft; None: chosen while running.  Raises: UsageError for numbers that cannot be."""

    loops: int | None = None  # that a draft runs
    tokens: Length | None = None  # drafted between two checks

    def __post_init__(self) -> None:
        if self.loops is not None and self.loops < 1:
            raise UsageError(f"drafts of {self.loops} loops cannot be", "a draft runs at least 1 loop")
        if isinstance(self.tokens, int) and not 1 <= self.tokens <= MOST_DRAFTS:
            raise UsageError(
                f"{self.tokens} drafted tokens cannot be checked together", f"draft between 1 and {MOST_DRAFTS} tokens"
            )

    def depths(self, full: int) -> list[int]:
        """The loops that a draft may run before `full` check it.  Raises: UsageError if they are not fewer."""
        if full < 2 or (self.loops or 1) >= full:
            raise UsageError(
                f"drafts of {self.loops or 1} loops cannot be checked by a full depth of {full}",
                f"draft with 1 to {full - 1} loops" if full > 1 else "a model of one loop has nothing to draft with",
            )
        return [self.loops] if self.loops else list(range(1, full))


@dataclasses.dataclass
class Timed:
    """Something done several times, and what it took in all; `typical` forgives the times that other work took."""

    seconds: float = 0.0
    count: int = 0
    recent: deque[float] = dataclasses.field(default_factory=lambda: deque(maxlen=REMEMBERED))

    def add(self, seconds: float, count: int = 1) -> None:
        self.seconds += seconds
        self.count += count
        self.recent.append(seconds / count)

    @property
    def mean(self) -> float:
        return self.seconds / self.count if self.count else 0.0

    @property
    def typical(self) -> float:
        """Median of the recent ones."""
        return statistics.median(self.recent) if self.recent else 0.0


@dataclasses.dataclass
class DraftAccount:
    """What drafting did and what it cost; the times leave out the first passes, which load kernels."""

    full: int = 0  # loops
    rounds: int = 0
    drafted: int = 0
    judged: int = 0  # those behind a replaced draft are not
    accepted: int = 0
    tokens: int = 0
    choices: dict[tuple[int, Length], int] = dataclasses.field(default_factory=dict)  # (loops, tokens): rounds
    new_tokens: Timed = dataclasses.field(default_factory=Timed)  # everything: whole rounds, per token they gave
    single_pass: Timed = dataclasses.field(default_factory=Timed)  # one loop of one position
    further_row: Timed = dataclasses.field(default_factory=Timed)  # what another position adds to such a pass
    choice: Timed = dataclasses.field(default_factory=Timed)  # head and choice of one draft
    check: Timed = dataclasses.field(default_factory=Timed)  # head and choice by the full depth, per position

    def begin_round(self, loops: int, length: Length) -> None:
        """Count a round, and how it drafts."""
        self.rounds += 1
        self.choices[loops, length] = self.choices.get((loops, length), 0) + 1

    @property
    def acceptance(self) -> float | None:
        """Share of the drafts that stood."""
        return self.accepted / self.drafted if self.drafted else None

    @property
    def tokens_per_round(self) -> float:
        return self.tokens / max(1, self.rounds)

    @property
    def speedup(self) -> float | None:
        """Time of a token in full decoding, by the cost of its passes here, over what one took; None if not known."""
        if not self.new_tokens.count or not self.single_pass.count:
            return None
        return (self.full * self.single_pass.mean + self.check.mean) / self.new_tokens.mean


class Drafter(Session):
    """A session of one row that takes several tokens per round."""

    account: DraftAccount
    _passes = 0  # over the weights, so far

    def draft(
        self, token: int, loops: int, count: int, sampling: Sampling, rng: np.random.Generator, seen: Array
    ) -> tuple[list[int], list[Array]]:
        """`token` and `count` drafts through the first loops -> the drafts, and the distribution each was drawn from.

        seen: V, as it was before.
        """
        drafts: list[int] = []
        guesses: list[Array] = []
        known = seen.copy() if sampling.repetition_penalty != 1.0 else seen
        for row in range(count + 1):
            began = time.perf_counter()
            self._run_first_loops(token, row, loops)
            ran = time.perf_counter()
            self._time_pass(1, ran - began, loops)
            if row == count:
                break
            guess = probabilities(self._read(loops, row, 1)[0], sampling, known)
            token = self._drawn(guess, sampling, rng)
            drafts.append(token)
            guesses.append(guess)
            if known is not seen:
                known[token] = True
            self._timed(self.account.choice, time.perf_counter() - ran)
        return drafts, guesses

    def check(self, loops: int, count: int) -> None:
        """The deeper loops over the `count` positions that `draft` began, all at once."""
        began = time.perf_counter()
        self._decoder.place(0, self._positions(count), count)
        for r in range(loops, self.loops):
            self._decoder.run_loop(r, count, 1)
        self._time_pass(count, time.perf_counter() - began, self.loops - loops)

    def judge(
        self,
        logits: Floats,
        drafts: list[int],
        guesses: list[Array],
        sampling: Sampling,
        rng: np.random.Generator,
        seen: Array,
    ) -> list[int]:
        """The tokens that stand: the drafts accepted, then one of the full depth's own.  logits: (drafts + 1) x V.

        seen: V, to which the tokens are added.
        """
        found: list[int] = []
        for row, scores in enumerate(logits):
            draft, guess = (drafts[row], guesses[row]) if row < len(drafts) else (None, None)
            token, stands = self._judged(scores, draft, guess, sampling, rng, seen)
            found.append(token)
            if not stands:
                break
        return found

    def _judged(
        self,
        scores: Floats,
        draft: int | None,
        guess: Array | None,
        sampling: Sampling,
        rng: np.random.Generator,
        seen: Array,
    ) -> tuple[int, bool]:
        """The token that the full depth lets follow, and whether it is the draft.  scores: V; seen: V, added to."""
        prob = probabilities(scores, sampling, seen)
        stands = draft is not None and guess is not None and self._accepts(prob, guess, draft, rng)
        if stands:
            token = int(draft or 0)
        else:
            token = self._drawn(prob if guess is None else remainder(prob, guess), sampling, rng)
        seen[token] = True
        self.account.judged += draft is not None
        self.account.accepted += stands
        return token, stands

    def _drawn(self, prob: Array, sampling: Sampling, rng: np.random.Generator) -> int:
        return draw(prob, rng.random()) if sampling.temperature else int(prob.argmax())

    def round(
        self, token: int, loops: int, count: int, sampling: Sampling, rng: np.random.Generator, seen: Array
    ) -> Iterator[tuple[int, float]]:
        """One round behind a token not yet fed -> the tokens that follow it, and their log-probabilities.  seen: V."""
        began = time.perf_counter()
        self.account.begin_round(loops, count)
        self._make_room(count + 1)
        drafts, guesses = self.draft(token, loops, count, sampling, rng, seen)
        self.check(loops, count + 1)
        ran = time.perf_counter()
        logits = self._read(self.loops, 0, count + 1)
        found = self.judge(logits, drafts, guesses, sampling, rng, seen)
        told = [(one, log_probability(scores, one)) for one, scores in zip(found, logits, strict=False)]
        self._keep(len(found), count + 1)
        ended = time.perf_counter()
        self._timed(self.account.check, ended - ran, count + 1)
        self._timed(self.account.new_tokens, ended - began, len(found))
        self.account.drafted += count
        self.account.tokens += len(found)
        yield from told

    def flow(
        self, token: int, loops: int, most: int, sampling: Sampling, rng: np.random.Generator, seen: Array
    ) -> Iterator[tuple[int, float]]:
        """At most so many tokens, as `round` gives them, until one replaces a draft; checks overlap with drafting."""
        decoder, (x, y) = self._decoder, self._decoder.states[:2]
        flight: list[_Flight] = []  # oldest first; rows of x, positions from `filled` on
        waiting: int | None = token
        given, began = 0, time.perf_counter()
        self.account.begin_round(loops, FLOW)
        while True:
            if waiting is not None and len(flight) < min(FEW_ROWS, most - given):
                x[len(flight)] = self.weights.embedded(np.array([waiting]))[0]
                flight.append(_Flight())
                waiting = None
            rows = len(flight)
            self._make_room(rows)
            passing = time.perf_counter()
            decoder.place(0, self._positions(rows), rows)
            decoder.run_rows(np.array([one.done for one in flight]), x[:rows], y[:rows], decoder.gate_logit[0, :rows])
            x, y = y, x
            passed = time.perf_counter()
            self._time_pass(rows, passed - passing)
            for one in flight:
                one.done += 1
            oldest, newest = flight[0], flight[-1]
            checked, drafted = oldest.done == self.loops, newest.done == loops and given + rows < most
            if not checked and not drafted:
                continue
            logits = decoder.logits(x[[0] * checked + [rows - 1] * drafted])
            if drafted:
                known = _with(seen, [one.draft for one in flight[:-1]]) if sampling.repetition_penalty != 1.0 else seen
                newest.guess = probabilities(logits[-1], sampling, known)
                waiting = newest.draft = self._drawn(newest.guess, sampling, rng)
                self.account.drafted += 1
            if checked:
                token, stands = self._judged(logits[0], oldest.draft, oldest.guess, sampling, rng, seen)
                self._keep(1, 1 if stands else rows)
                del flight[0]
                x[: rows - 1] = x[1:rows]
                given += 1
                self._timed(self.account.check, time.perf_counter() - passed, 1 + drafted)
                self._timed(self.account.new_tokens, time.perf_counter() - began)
                self.account.tokens += 1
                yield token, log_probability(logits[0], token)
                if not stands or given == most:
                    return
                began = time.perf_counter()

    def _run_first_loops(self, token: int, row: int, loops: int) -> None:
        decoder, at = self._decoder, slice(row, row + 1)
        decoder.embedded[at] = self.weights.embedded(np.array([token]))
        decoder.place(0, self.filled + row)
        x = decoder.embedded[at]
        for r in range(loops):
            decoder.run_rows(np.array([r]), x, decoder.states[r, at], decoder.gate_logit[r, at])
            x = decoder.states[r, at]

    def _read(self, loops: int, row: int, count: int) -> Floats:
        return self._decoder.logits(self._decoder.states[loops - 1, row : row + count])

    def _positions(self, count: int) -> Ints:
        return self.filled + np.arange(count)

    def _accepts(self, prob: Array, guess: Array, token: int, rng: np.random.Generator) -> bool:
        return accepts(prob, guess, token, rng.random())

    def _keep(self, count: int, run: int) -> None:
        """Of the positions that ran, the first ones hold what was written; later rounds overwrite the others."""
        self.cache.append(count)

    def _timed(self, what: Timed, seconds: float, count: int = 1) -> None:
        if self._passes > UNTIMED:
            what.add(seconds, count)

    def _time_pass(self, rows: int, seconds: float, passes: int = 1) -> None:
        account, self._passes = self.account, self._passes + passes
        if rows == 1:
            self._timed(account.single_pass, seconds, passes)
        elif account.single_pass.count:
            extra = seconds - passes * account.single_pass.typical
            self._timed(account.further_row, extra, passes * (rows - 1))


@dataclasses.dataclass
class _Flight:
    """A position whose loops are not all done, and what was drafted from it."""

    done: int = 0
    draft: int | None = None
    guess: Array | None = None


def _with(seen: Array, tokens: list[int | None]) -> Array:
    known = seen.copy()
    known[[token for token in tokens if token is not None]] = True
    return known


class Planner:
    """How deep and how far to draft: what is cheapest per expected token, by acceptance and cost so far.

    Drafting k tokens that each stand with chance a gives 1 + a + ... + a^k tokens a round.  The chance of a depth is
    that of its drafts so far, and one success more: what was not tried is thought well of, and so are, since evidence
    fades, depths that failed long ago.  Not to draft at all is one of the choices.
    """

    def __init__(self, drafts: Drafts, full: int, account: DraftAccount) -> None:
        self._full, self._account = full, account
        lengths: list[Length] = [drafts.tokens] if drafts.tokens else [FLOW, *range(AUTOMATIC_DRAFTS + 1)]
        self._choices = [(loops, count) for loops in drafts.depths(full) for count in lengths]
        self._stood = dict.fromkeys(drafts.depths(full), 0.0)
        self._judged = dict.fromkeys(drafts.depths(full), 0.0)
        self._rounds, self._chosen = 0, self._choices[0]
        self._known = (0, 0)  # judged and accepted when the last round began

    def choose(self) -> tuple[int, Length]:
        """Loops and tokens of the next round, after what came of the last."""
        known = (self._account.judged, self._account.accepted)
        self._learn(self._chosen[0], known[0] - self._known[0], known[1] - self._known[1])
        self._known = known
        if len(self._choices) > 1 and self._rounds % KEPT == 0:
            self._chosen = self._cheapest()
        self._rounds += 1
        return self._chosen

    def _learn(self, loops: int, judged: int, stood: int) -> None:
        """So many drafts were judged, and so many of them stood."""
        for depth in self._judged:
            self._judged[depth] *= MEMORY
            self._stood[depth] *= MEMORY
        self._judged[loops] += judged
        self._stood[loops] += stood

    def _cheapest(self) -> tuple[int, Length]:
        """By seconds per expected token; as long as nothing is timed, by passes."""
        account, full = self._account, self._full
        single, further = account.single_pass.typical or 1.0, max(0.0, account.further_row.typical)
        draft, check = account.choice.typical, account.check.typical

        def cost(choice: tuple[int, Length]) -> float:
            loops, count = choice
            chance = (self._stood[loops] + 1.0) / (self._judged[loops] + 1.0)
            if isinstance(count, str):
                drafts = checks = tokens = min(LONG_FLOW, 1.0 / max(1e-9, 1.0 - chance))
                passes = loops * (tokens - 1.0) + full
                rows = tokens * full + (full - loops) * full / loops / 2.0  # and those begun in vain
            else:
                tokens = sum(chance**i for i in range(count + 1))
                passes = loops * (count + 1) + full - loops
                rows = full * (count + 1)
                drafts, checks = count, count + 1
            seconds = passes * single + (rows - passes) * further + drafts * draft + checks * check
            return seconds / tokens

        return min(self._choices, key=cost)


def generate_drafted(
    weights: Weights | StoredWeights,
    prompt_ids: Ints,
    drafts: Drafts,
    *,
    rng: np.random.Generator,
    sampling: Sampling | None = None,
    loops: int | None = None,
    max_new_tokens: int = 128,
    stop_ids: Collection[int] = (),
    kv_dtype: KeyValueType = "float32",
    threads: int = 1,
    account: DraftAccount | None = None,
    kind: type[Drafter] = Drafter,
) -> Iterator[Generated]:
    """As `generate` with all loops (or `loops` of them), by draft and verify.  prompt_ids: S.

    `account` is filled while tokens come.

    Raises: DataError, before anything runs, if the prompt does not fit the model; UsageError if the drafts do not.
    """
    full = weights.config.total_ut_steps if loops is None else loops
    account = DraftAccount() if account is None else account
    account.full = full
    planner = Planner(drafts, full, account)
    session = open_session(weights, prompt_ids, full, max_new_tokens, "full", kv_dtype, threads, kind)
    session.account = account
    chosen, ends = Sampling() if sampling is None else sampling, frozenset(stop_ids)
    return _continue(session, planner, np.ascontiguousarray(prompt_ids, np.int64), rng, chosen, max_new_tokens, ends)


def _continue(
    session: Drafter,
    planner: Planner,
    prompt: Ints,
    rng: np.random.Generator,
    sampling: Sampling,
    max_new_tokens: int,
    stop_ids: frozenset[int],
) -> Iterator[Generated]:
    if max_new_tokens < 1:
        return
    context, last = session.weights.config.max_position_embeddings, session.loops - 1
    logits = session.weights.logits(feed_prompt(session, prompt).hidden[last, 0, -1])
    seen = np.zeros(session.weights.config.vocab_size, np.bool_)
    seen[prompt] = True
    token, logprob = choose(logits, sampling, rng.random(), seen)
    seen[token] = True
    found: Iterator[tuple[int, float]] = iter([(token, logprob)])
    written, position = 0, prompt.size  # tokens given out, and the position of the next one
    while True:
        for token, logprob in found:
            written += 1
            finish = why_last(token, stop_ids, written < max_new_tokens, position < context)
            yield Generated(token, last, session.loops, logprob, finish)
            if finish is not None:
                return
            position += 1
        depth, length = planner.choose()
        most = min(max_new_tokens - written, context - session.filled)
        found = (
            session.flow(token, depth, most, sampling, rng, seen)
            if isinstance(length, str)
            else session.round(token, depth, min(length, most - 1), sampling, rng, seen)
        )
