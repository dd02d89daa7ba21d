"""Exit rules: when a position stops looping.

A rule sees the loops run so far and says, row by row, whether the position stops now.  It is asked after every loop
but the last possible one, where every position stops, and keeps no state: the same rule serves a decode step, a whole
trace and several rows at once.

Source: Algorithm 1 (the learned gate); fixed depth and bounds are ours.
"""

import dataclasses
import math
from typing import Protocol

import numpy as np

from .arrays import Array, Floats, Ints
from .errors import UsageError
from .kernels import exit_distribution_forward, exit_loop


class ExitRule(Protocol):
    """When to stop looping."""

    def deepest(self, loops: int) -> int:
        """Loops that have to be possible under this rule, of a model that was made for `loops`."""

    def stops(self, hidden: Floats, gate_logit: Floats) -> Array:
        """Which rows stop after the last loop given.  hidden: RBD, gate_logit: RB of the loops so far -> stop: B."""


@dataclasses.dataclass(frozen=True)
class LearnedGate:
    """Stop at the first loop whose exit probabilities add up to the threshold q; q = 1 means all loops, always.

    Raises: UsageError if q is not in [0, 1].
    """

    exit_threshold: float

    def __post_init__(self) -> None:
        if not 0.0 <= self.exit_threshold <= 1.0:
            raise UsageError(f"q={self.exit_threshold} is outside [0, 1]", "use e.g. 0.7; 1 means all loops")

    def deepest(self, loops: int) -> int:
        return loops

    def stops(self, hidden: Floats, gate_logit: Floats) -> Array:
        seen = gate_logit.shape[0]
        # One row more, of any value: the last row takes the remainder, and the loops seen are not the last.
        exit_prob, _ = exit_distribution_forward(gate_logit[[*range(seen), -1]])
        return exit_loop(exit_prob, self.exit_threshold)[0] < seen


@dataclasses.dataclass(frozen=True)
class FixedDepth:
    """Stop after that many loops, whatever the gate says.  Raises: UsageError if loops < 1."""

    loops: int

    def __post_init__(self) -> None:
        _check_bounds(self.loops, math.inf)

    def deepest(self, loops: int) -> int:
        return self.loops

    def stops(self, hidden: Floats, gate_logit: Floats) -> Array:
        return np.full(gate_logit.shape[1], gate_logit.shape[0] >= self.loops)


@dataclasses.dataclass(frozen=True)
class Bounded:
    """Another rule, kept between `min_loops` and `max_loops` (None: the model's own number of loops).

    Raises: UsageError if not 1 <= min_loops <= max_loops.
    """

    rule: ExitRule
    min_loops: int = 1
    max_loops: int | None = None

    def __post_init__(self) -> None:
        _check_bounds(self.min_loops, math.inf if self.max_loops is None else self.max_loops)

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


def choose_rule(exit_threshold: float | None, loops: int | None, default_threshold: float) -> ExitRule:
    """What two optional wishes mean: q alone, a depth alone (fixed), both (q, at most that deep), or neither."""
    if exit_threshold is None:
        return LearnedGate(default_threshold) if loops is None else FixedDepth(loops)
    gate = LearnedGate(exit_threshold)
    return gate if loops is None else Bounded(gate, max_loops=loops)


def exit_index(rule: ExitRule, hidden: Floats, gate_logit: Floats) -> Ints:
    """The loop, counted from 0, at which each row of a finished trace stops.  hidden: RBD, gate_logit: RB -> B."""
    loops, rows = gate_logit.shape
    found = np.full(rows, loops - 1, np.int64)
    for r in range(loops - 2, -1, -1):
        found[rule.stops(hidden[: r + 1], gate_logit[: r + 1])] = r
    return found
