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

import time
from collections.abc import Collection, Iterator, Sequence

import numpy as np

from .arrays import Array, Floats, Ints
from .cache import KeyValueType
from .draft_plans import FLOW, DraftAccount, Drafts, Planner, Timed
from .exits import FixedDepth
from .generation import Generated, Session, feed_prompt, open_session, why_last
from .kernels.product.stored import FEW_ROWS
from .sampling import Sampling, accepts, choose, draw, log_probability, probabilities, remainder
from .stored import StoredWeights
from .weights import Weights

UNTIMED = 4  # passes over the weights

_Draft = tuple[int, Array]  # a token, and the distribution it was drawn from


class Drafter(Session):
    """A session of one row that takes several tokens per round, after `prepare`.

    `seen` (V) are the tokens that were there before, for the repetition penalty.
    """

    account: DraftAccount
    sampling: Sampling
    rng: np.random.Generator
    seen: Array
    _passes = 0  # over the weights, so far

    def prepare(self, account: DraftAccount, sampling: Sampling, rng: np.random.Generator) -> None:
        """How tokens are chosen, and where it is told what that took."""
        self.account, self.sampling, self.rng = account, sampling, rng
        self.seen = np.zeros(self.weights.config.vocab_size, np.bool_)

    def draft(self, token: int, loops: int, count: int) -> list[_Draft]:
        """`token` and `count` drafts behind it through the first loops -> the drafts."""
        drafts: list[_Draft] = []
        for row in range(count + 1):
            began = time.perf_counter()
            self._run_first_loops(token, row, loops)
            ran = time.perf_counter()
            self._time_pass(1, ran - began, loops)
            if row == count:
                break
            guess = probabilities(self._read(loops, row, 1)[0], self.sampling, self._seen_with(drafts))
            token = self._drawn(guess)
            drafts.append((token, guess))
            self._timed(self.account.choice, time.perf_counter() - ran)
        return drafts

    def check(self, loops: int, count: int) -> None:
        """The deeper loops over the `count` positions that `draft` began, all at once."""
        began = time.perf_counter()
        self._decoder.place(0, self._positions(count), count)
        for r in range(loops, self.loops):
            self._decoder.run_loop(r, count, 1)
        self._time_pass(count, time.perf_counter() - began, self.loops - loops)

    def judge(self, logits: Floats, drafts: list[_Draft]) -> list[int]:
        """The tokens that stand: the drafts accepted, then one of the full depth's own.  logits: (drafts + 1) x V."""
        found: list[int] = []
        for scores, draft in zip(logits, [*drafts, None], strict=True):
            token, stands = self._judged(scores, draft)
            found.append(token)
            if not stands:
                break
        return found

    def _judged(self, scores: Floats, draft: _Draft | None) -> tuple[int, bool]:
        """The token that the full depth lets follow, and whether it is the draft.  scores: V."""
        prob, stands = probabilities(scores, self.sampling, self.seen), False
        if draft is not None:
            token, guess = draft
            stands = self._accepts(prob, guess, token)
            self.account.judged += 1
            self.account.accepted += stands
            prob = prob if stands else remainder(prob, guess)
        if not stands:
            token = self._drawn(prob)
        self.seen[token] = True
        return token, stands

    def _drawn(self, prob: Array) -> int:
        return draw(prob, self.rng.random()) if self.sampling.temperature else int(prob.argmax())

    def _seen_with(self, drafts: Sequence[_Draft | None]) -> Array:
        """What a token behind these drafts has before it, where that matters."""
        if self.sampling.repetition_penalty == 1.0:
            return self.seen
        known = self.seen.copy()
        known[[draft[0] for draft in drafts if draft is not None]] = True
        return known

    def round(self, token: int, loops: int, count: int) -> Iterator[tuple[int, float]]:
        """One round behind a token not yet fed -> the tokens that follow it, and their log-probabilities."""
        began = time.perf_counter()
        self.account.begin_round(loops, count)
        self._make_room(count + 1)
        drafts = self.draft(token, loops, count)
        self.check(loops, count + 1)
        ran = time.perf_counter()
        logits = self._read(self.loops, 0, count + 1)
        found = self.judge(logits, drafts)
        told = [(one, log_probability(scores, one)) for one, scores in zip(found, logits, strict=False)]
        self._keep(len(found), count + 1)
        ended = time.perf_counter()
        self._timed(self.account.check, ended - ran, count + 1)
        self._timed(self.account.new_tokens, ended - began, len(found))
        self.account.drafted += count
        self.account.tokens += len(found)
        yield from told

    def flow(self, token: int, loops: int, most: int) -> Iterator[tuple[int, float]]:
        """At most so many tokens, as `round` gives them, until one replaces a draft; checks overlap with drafting."""
        decoder, (x, y), gate_logit = self._decoder, self._decoder.states[:2], self._decoder.gate_logit[0]
        # Positions in flight, oldest first, from `filled` on: loops done, and what was drafted behind each.
        done, drafts = np.zeros(FEW_ROWS, np.int64), list[_Draft | None]()
        waiting: int | None = token
        given, began = 0, time.perf_counter()
        self.account.begin_round(loops, FLOW)
        while True:
            if waiting is not None and len(drafts) < min(FEW_ROWS, most - given):
                rows = len(drafts) + 1
                x[rows - 1], done[rows - 1] = self.weights.embedded(np.array([waiting]))[0], 0
                drafts.append(None)
                waiting = None
                self._make_room(rows)
                decoder.place(0, self._positions(rows), rows)
            passing = time.perf_counter()
            decoder.run_rows(done[:rows], x, y, gate_logit)
            x, y = y, x
            done[:rows] += 1
            passed = time.perf_counter()
            self._time_pass(rows, passed - passing)
            checked = int(done[0]) == self.loops
            drafted = int(done[rows - 1]) == loops and given + rows < most
            if not checked and not drafted:
                continue
            logits = decoder.logits(x[[0] * checked + [rows - 1] * drafted])
            if drafted:
                guess = probabilities(logits[-1], self.sampling, self._seen_with(drafts[:-1]))
                waiting = self._drawn(guess)
                drafts[-1] = (waiting, guess)
                self.account.drafted += 1
            if checked:
                token, stands = self._judged(logits[0], drafts.pop(0))
                self._keep(1, 1 if stands else rows)
                rows, given = rows - 1, given + 1
                x[:rows], done[:rows] = x[1 : rows + 1], done[1 : rows + 1]
                if rows:
                    decoder.place(0, self._positions(rows), rows)
                logprob, ended = log_probability(logits[0], token), time.perf_counter()
                self._timed(self.account.check, ended - passed, 1 + drafted)
                self._timed(self.account.new_tokens, ended - began)
                self.account.tokens += 1
                yield token, logprob
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

    def _accepts(self, prob: Array, guess: Array, token: int) -> bool:
        return accepts(prob, guess, token, self.rng.random())

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
    session = open_session(weights, prompt_ids, full, max_new_tokens, kind, "full", kv_dtype, threads=threads)
    session.prepare(account, Sampling() if sampling is None else sampling, rng)
    return _continue(session, planner, np.ascontiguousarray(prompt_ids, np.int64), max_new_tokens, frozenset(stop_ids))


def _continue(
    session: Drafter, planner: Planner, prompt: Ints, max_new_tokens: int, stop_ids: frozenset[int]
) -> Iterator[Generated]:
    if max_new_tokens < 1:
        return
    config = session.weights.config
    last, logits = feed_prompt(session, prompt, FixedDepth(session.loops))
    session.seen[prompt] = True
    token, logprob = choose(logits, session.sampling, session.rng.random(), session.seen)
    session.seen[token] = True
    found: Iterator[tuple[int, float]] = iter([(token, logprob)])
    written, position = 0, prompt.size  # tokens given out, and the position of the next one
    while True:
        for token, logprob in found:
            written += 1
            finish = why_last(token, stop_ids, written < max_new_tokens, position < config.max_position_embeddings)
            yield Generated(token, last, session.loops, logprob, finish)
            if finish is not None:
                return
            position += 1
        depth, length = planner.choose()
        most = min(max_new_tokens - written, config.max_position_embeddings - session.filled)
        if isinstance(length, str):
            found = session.flow(token, depth, most)
        else:
            found = session.round(token, depth, min(length, most - 1))
