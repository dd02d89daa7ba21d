"""Exit rules: when a position stops looping.

A rule sees the loops run so far and says, row by row, whether the position stops now.  It is asked after every loop
but the last possible one, where every position stops, and its answer depends on nothing else: the same rule serves a
decode step, a whole trace and several rows at once, and gives a row the same loop in all three.

Rules that look at predictions read them with a `Readout`, which `bind` gives them; a rule that does not ask costs no
product with the head.

Source: Algorithm 1 (the learned gate), Section 5.4.1 (small change of the state); the others are ours.
"""

import dataclasses
from collections import deque
from collections.abc import Sequence
from typing import Any, ClassVar, Protocol

import numpy as np

from .arrays import Array, Floats, Ints
from .errors import UsageError
from .kernels import (
    prediction_kl,
    relative_change,
    stable_loops,
    top_margin,
    top_probability,
)
from .kernels.exit_distribution import has_exited
from .kernels.product.stored import FEW_ROWS
from .stored import StoredMatrix, StoredWeights
from .weights import Weights

READ_AT_ONCE = 1 << 19  # logits of one loop alive at once when a finished trace is judged (2 MiB)
REMEMBERED = 16  # loops whose logits a readout keeps


class ExitRule(Protocol):
    """When to stop looping."""

    def deepest(self, loops: int) -> int:
        """Loops that have to be possible under this rule, of a model that was made for `loops`."""

    def stops(self, hidden: Floats, gate_logit: Floats) -> Array:
        """Which rows stop after the last loop given.  hidden: RBD, gate_logit: RB of the loops so far -> stop: B."""


class Readout:
    """Next-token logits of states, each state read once: several rules, and the loops of one position, share them.

    A row's logits are the same to the bit alone and in any batch.  It remembers by content, so nobody needs to say
    when a new position begins.
    """

    def __init__(self, head: Floats | StoredMatrix) -> None:
        """head: VD."""
        self._head = (
            head if isinstance(head, StoredMatrix) else StoredMatrix("float32", (len(head), head.shape[1]), head)
        )
        self.vocab_size = self._head.shape[0]
        self._known: deque[tuple[Floats, Floats]] = deque(maxlen=REMEMBERED)  # states, their logits

    def __call__(self, hidden: Floats) -> list[Floats]:
        """hidden: RBD -> for each loop given, logits: BV."""
        return [self._read(state) for state in hidden]

    def recall(self, state: Floats) -> Floats | None:
        """The logits of a state that was read before, None if it was not or is forgotten.  state: BD -> BV"""
        for known, logits in reversed(tuple(self._known)):  # a copy, since threads may share a readout
            # One number tells most states apart for a tenth of what comparing them whole costs.
            if known.shape == state.shape and known.item(0) == state.item(0) and np.array_equal(known, state):
                return logits
        return None

    def _read(self, state: Floats) -> Floats:
        logits = self.recall(state)
        if logits is not None:
            return logits
        state = np.array(state, order="C")
        # A few rows at a time: many would be multiplied in another way, and rounded otherwise.
        parts = [self._head.multiply(state[first : first + FEW_ROWS]) for first in range(0, len(state), FEW_ROWS)]
        logits = np.concatenate(parts) if parts else np.empty((0, self.vocab_size), np.float32)
        self._known.append((state, logits))
        return logits


@dataclasses.dataclass(frozen=True)
class LearnedGate:
    """Stop at the first loop whose exit probabilities add up to the threshold q; q = 1 means all loops, always.

    Raises: UsageError if q is not in [0, 1].
    """

    exit_threshold: float
    name: ClassVar[str] = "gate"

    def __post_init__(self) -> None:
        if not 0.0 <= self.exit_threshold <= 1.0:
            raise UsageError(f"q={self.exit_threshold} is outside [0, 1]", "use e.g. 0.7; 1 means all loops")

    def __str__(self) -> str:
        return f"gate:{self.exit_threshold:g}"

    def deepest(self, loops: int) -> int:
        return loops

    def stops(self, hidden: Floats, gate_logit: Floats) -> Array:
        if self.exit_threshold >= 1.0:
            return np.zeros(gate_logit.shape[1], np.bool_)
        return has_exited(gate_logit, self.exit_threshold)


@dataclasses.dataclass(frozen=True)
class FixedDepth:
    """Stop after that many loops, whatever the gate says.  Raises: UsageError if loops < 1."""

    loops: int
    name: ClassVar[str] = "fixed"

    def __post_init__(self) -> None:
        _check_bounds(self.loops, np.inf)

    def __str__(self) -> str:
        return f"fixed:{self.loops}"

    def deepest(self, loops: int) -> int:
        return self.loops

    def stops(self, hidden: Floats, gate_logit: Floats) -> Array:
        return np.full(gate_logit.shape[1], gate_logit.shape[0] >= self.loops)


@dataclasses.dataclass(frozen=True)
class Measured:
    """A rule that compares one number per position with its threshold: `statistic` gives it, `reached` compares.

    Raises: UsageError for a threshold outside the rule's range, or when a rule that reads predictions is asked unbound.
    """

    threshold: float
    readout: Readout | None = dataclasses.field(default=None, repr=False, compare=False)

    name: ClassVar[str]
    earliest: ClassVar[int] = 1  # loops that must have run before there is anything to compare
    falling: ClassVar[bool] = False  # whether a larger threshold stops earlier
    most: ClassVar[float] = np.inf
    example: ClassVar[str]

    def __post_init__(self) -> None:
        if not 0.0 <= self.threshold <= self.most or np.isinf(self.threshold):
            high = f"{self.most:g}" if np.isfinite(self.most) else "infinity"
            raise UsageError(f"{self}: the threshold is not between 0 and {high}", f"use e.g. {self.example}")

    def __str__(self) -> str:
        return f"{self.name}:{self.threshold:g}"

    def deepest(self, loops: int) -> int:
        return loops

    def statistic(self, hidden: Floats, gate_logit: Floats) -> Array:
        """What is compared after the last loop given.  hidden: RBD, gate_logit: RB -> B."""
        raise UsageError(f"{self.name} measures nothing", "use one of the rules in RULES")

    def reached(self, statistic: Array) -> Array:
        threshold = np.float64(self.threshold)  # not rounded to the statistic's float32
        return statistic < threshold if self.falling else statistic >= threshold

    def stops(self, hidden: Floats, gate_logit: Floats) -> Array:
        if gate_logit.shape[0] < self.earliest:
            return np.zeros(gate_logit.shape[1], np.bool_)
        return self.reached(self.statistic(hidden, gate_logit))

    def read(self, hidden: Floats) -> list[Floats]:
        """Logits of some loops.  hidden: RBD -> for each loop, BV."""
        if self.readout is None:
            raise UsageError(
                f"{self} has no head to read predictions with", "bind the rule to a model: bind(rule, ...)"
            )
        return self.readout(hidden)


class SmallChange(Measured):
    """Stop once a loop changes the state by less than this share of its length; 0 means all loops."""

    name, earliest, falling, example = "change", 2, True, "change:0.2"

    def statistic(self, hidden: Floats, gate_logit: Floats) -> Array:
        return relative_change(hidden[-2], hidden[-1])[0]


class SettledPrediction(Measured):
    """Stop once KL(prediction before the loop || after it) is below this many nats; 0 means all loops."""

    name, earliest, falling, example = "kl", 2, True, "kl:0.01"

    def statistic(self, hidden: Floats, gate_logit: Floats) -> Array:
        return prediction_kl(*self.read(hidden[-2:]))[0]


class TopProbability(Measured):
    """Stop once the best token has at least this probability; 1 means all loops, always."""

    name, most, example = "top", 1.0, "top:0.9"

    def statistic(self, hidden: Floats, gate_logit: Floats) -> Array:
        return top_probability(self.read(hidden[-1:])[0])[0]

    def reached(self, statistic: Array) -> Array:
        # A rounded probability can be 1.
        return super().reached(statistic) & (self.threshold < 1.0)


class TopMargin(Measured):
    """Stop once the best logit is at least this far above the second best (the log of the ratio of probabilities)."""

    name, example = "margin", "margin:2"

    def statistic(self, hidden: Floats, gate_logit: Floats) -> Array:
        return top_margin(self.read(hidden[-1:])[0])[0]


class StablePrediction(Measured):
    """Stop once the best token has been the same for this many loops."""

    name, example = "stable", "stable:2"

    def __post_init__(self) -> None:
        if not self.threshold >= 1 or self.threshold != int(min(self.threshold, 1e9)):
            raise UsageError(f"{self}: a number of loops is whole and at least 1", f"use e.g. {self.example}")

    def statistic(self, hidden: Floats, gate_logit: Floats) -> Array:
        return stable_loops(np.stack([logits.argmax(axis=1) for logits in self.read(hidden[-int(self.threshold) :])]))[
            0
        ]


MEASURED: dict[str, type[Measured]] = {
    rule.name: rule for rule in (SmallChange, SettledPrediction, TopProbability, TopMargin, StablePrediction)
}
RULES = ("gate", "fixed", *MEASURED)


@dataclasses.dataclass(frozen=True)
class Bounded:
    """Another rule, kept between `min_loops` and `max_loops` (None: the model's own number of loops).

    Raises: UsageError if not 1 <= min_loops <= max_loops.
    """

    rule: ExitRule
    min_loops: int = 1
    max_loops: int | None = None

    def __post_init__(self) -> None:
        _check_bounds(self.min_loops, np.inf if self.max_loops is None else self.max_loops)

    def __str__(self) -> str:
        most = "" if self.max_loops is None else f", at most {self.max_loops} loops"
        return f"{self.rule}" + (f", at least {self.min_loops} loops" if self.min_loops > 1 else "") + most

    def deepest(self, loops: int) -> int:
        return max(self.min_loops, self.rule.deepest(loops)) if self.max_loops is None else self.max_loops

    def stops(self, hidden: Floats, gate_logit: Floats) -> Array:
        run = gate_logit.shape[0]
        if run < self.min_loops:
            return np.zeros(gate_logit.shape[1], np.bool_)
        if self.max_loops is not None and run >= self.max_loops:
            return np.ones(gate_logit.shape[1], np.bool_)
        return self.rule.stops(hidden, gate_logit)


def _check_bounds(fewest: int, most: float) -> None:
    if not 1 <= fewest <= most:
        raise UsageError(f"a position cannot stop between loop {fewest} and loop {most}", "loops are counted from 1")


def make_rule(name: str, threshold: float) -> ExitRule:
    """A rule by its name, one of RULES.  Raises: UsageError for an unknown name or a threshold out of range."""
    if name == "gate":
        return LearnedGate(threshold)
    if name == "fixed":
        if not threshold >= 1 or threshold != int(min(threshold, 1e9)):
            raise UsageError(f"fixed:{threshold:g}: a number of loops is whole and at least 1", "use e.g. fixed:2")
        return FixedDepth(int(threshold))
    if name not in MEASURED:
        raise UsageError(f"{name!r} is not an exit rule", f"use one of {', '.join(RULES)}, e.g. gate:0.7 or kl:0.01")
    return MEASURED[name](threshold)


def bind(rule: ExitRule, readout: Readout | Weights | StoredWeights) -> ExitRule:
    """The rule, able to read predictions: with this readout (rules may share one) or with a model's head."""
    reader = readout if isinstance(readout, Readout) else Readout(readout.head)
    if isinstance(rule, Bounded):
        return dataclasses.replace(rule, rule=bind(rule.rule, reader))
    return dataclasses.replace(rule, readout=reader) if isinstance(rule, Measured) else rule


def choose_rule(wish: ExitRule | None, loops: int | None, default: ExitRule, min_loops: int = 1) -> ExitRule:
    """What optional wishes mean: a rule, a depth alone (fixed), both (the rule, at most that deep), or the default.

    Raises: UsageError if min_loops is above loops.
    """
    rule = wish or (default if loops is None else FixedDepth(loops))
    most = loops if wish is not None else None
    if min_loops > 1 and loops is not None:
        _check_bounds(min_loops, loops)
    return rule if most is None and min_loops <= 1 else Bounded(rule, min_loops, most)


def exit_index(rule: ExitRule, hidden: Floats, gate_logit: Floats) -> Ints:
    """The loop, counted from 0, at which each row of a finished trace stops.  hidden: RBD, gate_logit: RB -> B."""
    return exit_indices([rule], hidden, gate_logit)[0]


def exit_indices(rules: Sequence[ExitRule], hidden: Floats, gate_logit: Floats) -> list[Ints]:
    """The same for several rules, which share what they read.  hidden: RBD, gate_logit: RB -> per rule, B."""
    loops, rows = gate_logit.shape
    found = [np.full(rows, loops - 1, np.int64) for _ in rules]
    readouts = [reader for rule in rules if (reader := readout_of(rule)) is not None]
    chunk = max(1, READ_AT_ONCE // readouts[0].vocab_size if readouts else rows)
    for begin in range(0, rows, chunk):
        part = slice(begin, begin + chunk)
        states, logits = hidden[:, part], gate_logit[:, part]
        for index, rule in zip(found, rules, strict=True):
            for r in range(loops - 2, -1, -1):
                index[part][rule.stops(states[: r + 1], logits[: r + 1])] = r
    return found


def readout_of(rule: Any) -> Readout | None:
    """What a rule, or the one inside it, reads predictions with; None for one that does not, or is not bound."""
    return readout_of(rule.rule) if hasattr(rule, "rule") else getattr(rule, "readout", None)


def count_token(rule: Any, loops_run: int) -> None:
    """Tell a rule that keeps count that a token has stopped after so many loops; the first is the prompt's last."""
    if hasattr(rule, "count"):
        rule.count(loops_run)
    elif isinstance(rule, Bounded):
        count_token(rule.rule, loops_run)
