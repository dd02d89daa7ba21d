"""The judge of cache policies: a prompt, then token by token with exits that are given, state by state.

Exits are given so that rounding cannot move them.  Rows of a batch exit at different loops, and what a row gets is what
the reference gives it alone.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

import numpy as np

from .contract import Row, first_failure, relative_error
from .judge import MODELS, TOLERANCE, random_tensors
from .model import LoopLM
from .ops import Array
from .policies import POLICIES, Deferred, Full, Kept, KeyValue, LastExited, Shared, SharedAverage, SharedFirst

BATCH, PROMPT, DECODED = 2, 5, 12
BOUNDS = (2, 5, 16)  # of the tokens that wait under `exact`


class Candidate(Protocol):
    """What is judged.

    `decoded` reads the first `prompt` of input_ids (BS) and decodes the N after them; the n-th of row b is read after
    loop exit_at[n, b] (from 0) -> hidden: RBND; what lies beyond an exit is not looked at.
    """

    name: str

    def decoded(
        self,
        tensors: Mapping[str, Array],
        config: Mapping[str, Any],
        input_ids: Array,
        prompt: int,
        exit_at: Array,
        policy: str,
        max_deferred: int,
    ) -> Array: ...


class ReferenceCandidate:
    """The reference's own policies, or wrong ones, in the candidate's seat; `exact` is the deferral."""

    def __init__(self, changed: Mapping[str, Callable[..., Full]] | None = None, name: str = "reference") -> None:
        self.name = name
        self.policies: dict[str, Callable[..., Full]] = {**POLICIES, "exact": Deferred, **(changed or {})}

    def decoded(
        self,
        tensors: Mapping[str, Array],
        config: Mapping[str, Any],
        input_ids: Array,
        prompt: int,
        exit_at: Array,
        policy: str,
        max_deferred: int,
    ) -> Array:
        bound = {"most": max_deferred} if policy == "exact" else {}
        make = functools.partial(self.policies[policy], LoopLM(tensors, config), **bound)
        return _decode(make, input_ids, prompt, exit_at)


def _decode(make: Callable[[], Full], input_ids: Array, prompt: int, exit_at: Array) -> Array:
    """Row by row.  -> RBSD of the decoded positions, NaN beyond exits."""
    rows = []
    for b, ids in enumerate(input_ids):
        decoder, states = make(), []
        decoder.read(ids[:prompt])
        for token, exits in zip(ids[prompt:], exit_at[:, b], strict=True):
            hidden = decoder.advance(int(token), int(exits))
            missing = np.full((decoder.model.loops - len(hidden), hidden.shape[1]), np.nan)
            states.append(np.concatenate([hidden, missing]))
        rows.append(np.stack(states, axis=1))
    return np.stack(rows, axis=1)


def compare(candidate: Candidate, policy: str, name: str, tolerance: float = TOLERANCE) -> Iterator[Row]:
    """One policy on one of the judge's models: the states of each position and loop that a row ran."""
    config = MODELS[name]
    tensors, loops = random_tensors(config), config["total_ut_steps"]
    rng = np.random.default_rng(11)
    ids = rng.integers(0, config["vocab_size"], (BATCH, PROMPT + DECODED))
    exit_at = rng.integers(0, loops, (DECODED, BATCH))
    expected = _decode(lambda: POLICIES[policy](LoopLM(tensors, config)), ids, PROMPT, exit_at)
    for bound in BOUNDS if policy == "exact" else BOUNDS[-1:]:
        found = candidate.decoded(tensors, config, ids, PROMPT, exit_at, policy, bound)
        told = f", at most {bound} wait" if policy == "exact" else ""
        for s in range(DECODED):
            for r in range(loops):
                ran = exit_at[s] >= r
                if ran.any():
                    error = relative_error(expected[r, ran, s], found[r, ran, s])
                    yield Row(f"{name}: {policy}{told}.token{s + 1}.loop{r + 1}.hidden", error, tolerance)


# ---- mistakes made on purpose


class _DeeperLeftEmpty(LastExited):
    """Deeper loops do not know the token at all."""

    def leave(self, exit_at: int, x: Array) -> None:
        pass


class _CopiedFromTheFirst(LastExited):
    def leave(self, exit_at: int, x: Array) -> None:
        super().leave(0, x)


class _RowSkipped(Deferred):
    """Of those that wait, the latest does not catch up; the slot has a hole."""

    def enter(self, r: int, x: Array) -> Array:
        for position in sorted(self.waiting)[:-1]:
            self.catch_up(position, r)
        return Full.enter(self, r, x)


class _WrongState(Deferred):
    """Catches up from the embedding instead of the state that the token stopped with."""

    def advance(self, token: int, exit_at: int) -> Array:
        hidden = super().advance(token, exit_at)
        for position in self.waiting.keys() & {self.filled - 1}:
            self.waiting[position] = exit_at + 1, self.embedded(np.array([token]))
        return hidden


class _WrongPosition(Deferred):
    """What catches up is turned and appended where the token in progress is."""

    def catch_up(self, position: int, r: int) -> None:
        depth, x = self.waiting[position]
        if depth == r:
            self.waiting[position] = r + 1, self.loop(r, x, self.filled)


class _LatestFirst(Deferred):
    """Those that wait run one after the other in the wrong order, and do not see each other."""

    def enter(self, r: int, x: Array) -> Array:
        for position in sorted(self.waiting, reverse=True):
            self.catch_up(position, r)
        return Full.enter(self, r, x)


class _BoundSkipsALoop(Deferred):
    """When too many wait, they run only their deepest loop."""

    def leave(self, exit_at: int, x: Array) -> None:
        self.waiting[self.filled] = exit_at + 1, x
        last = self.model.loops - 1
        if len(self.waiting) >= self.most:
            for position in sorted(self.waiting):
                self.waiting[position] = last, self.waiting[position][1]
                self.catch_up(position, last)
            self.waiting = {}


class _NothingDeferred(LastExited):
    """Deferral that copies instead."""

    def __init__(self, model: LoopLM, most: int = 16) -> None:
        super().__init__(model)


class _PromptNotUnited(Shared):
    """Loops go on seeing the prompt's own slots: for the first loop, its own keys and values."""

    def read(self, prompt: Array) -> Array:
        return Full.read(self, prompt)


class _OwnNotSeen(Shared):
    """A token that is decoded sees the past alone, not its own keys and values."""

    def __init__(self, model: LoopLM) -> None:
        super().__init__(model)
        self.kept = _PastAlone()


class _PastAlone(Kept):
    def store(self, slot: int, k: Array, v: Array) -> tuple[Array, Array]:
        keys, values = super().store(slot, k, v)
        own = int(k.shape[1] == 1)
        return keys[:, : keys.shape[1] - own], values[:, : values.shape[1] - own]


class _AverageOverAllSlots(SharedAverage):
    """Divides by the loops of the model, not by those that ran."""

    def choose(self, by_loop: list[KeyValue]) -> KeyValue:
        keys, values = super().choose(by_loop)
        share = len(by_loop) / self.model.loops
        return keys * share, values * share


@dataclasses.dataclass(frozen=True)
class Mutant:
    """One mistake in one policy."""

    policy: str
    name: str
    decoder: Callable[..., Full]

    def first_failure(self) -> Row | None:
        """The first row that catches it, if any does."""
        wrong = ReferenceCandidate({self.policy: self.decoder}, self.name)
        with np.errstate(all="ignore"):
            return first_failure(row for name in MODELS for row in compare(wrong, self.policy, name))


MUTANTS = (
    Mutant("full", "a token stops early", LastExited),
    Mutant("last-exited", "deeper slots left empty", _DeeperLeftEmpty),
    Mutant("last-exited", "copied from the first loop", _CopiedFromTheFirst),
    Mutant("exact", "nothing is caught up", _NothingDeferred),
    Mutant("exact", "catching up skips a row", _RowSkipped),
    Mutant("exact", "catching up from the wrong state", _WrongState),
    Mutant("exact", "caught up at the wrong position", _WrongPosition),
    Mutant("exact", "caught up latest first", _LatestFirst),
    Mutant("exact", "the bound skips a loop", _BoundSkipsALoop),
    Mutant("shared-last", "the prompt keeps its first loop", _PromptNotUnited),
    Mutant("shared-last", "own keys and values not seen", _OwnNotSeen),
    Mutant("shared-last", "first kept instead of last", SharedFirst),
    Mutant("shared-last", "slots never become one", LastExited),
    Mutant("average", "last kept instead of the mean", Shared),
    Mutant("average", "mean over loops that did not run", _AverageOverAllSlots),
    Mutant("first", "last kept instead of first", Shared),
)
