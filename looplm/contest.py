"""The contest of exit rules: what each costs and gives on the same positions, and which threshold reaches a goal.

Every loop of a position is run once; what a rule would have done follows from the numbers it compares.  Figures are
those of undisturbed keys and values (every loop of every earlier token); what stopping early does to later tokens shows
in a real decode, which `timing` does.
"""

import dataclasses
import itertools
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from .arrays import Array, Floats, Ints
from .calibration import Gate
from .data import Batch
from .errors import DataError
from .exits import MEASURED, READ_AT_ONCE, ExitRule, Measured, Readout, bind, make_rule
from .model import forward
from .weights import Weights

GRID = 400  # thresholds tried when one is solved for


@dataclasses.dataclass(frozen=True)
class Evidence:
    """What all loops said at counted positions.  `statistics` is NaN where a rule has nothing to compare yet."""

    hidden: Floats  # RND
    loss: Floats  # RN, nats
    right: Array  # RN, whether the best token is the target
    agrees: Array  # RN, whether the best token is the last loop's
    statistics: dict[str, Array]  # rule -> RN
    group: Ints  # N, what positions are told apart by, e.g. the hops a question needs; 0 where nothing is

    @property
    def loops(self) -> int:
        return len(self.loss)

    def part(self, rows: slice) -> "Evidence":
        statistics = {name: value[:, rows] for name, value in self.statistics.items()}
        hidden, loss, right, agrees = (x[:, rows] for x in (self.hidden, self.loss, self.right, self.agrees))
        return Evidence(hidden, loss, right, agrees, statistics, self.group[rows])

    def chunks(self, count: int) -> list["Evidence"]:
        """Neighbouring positions together, as near to equal in number as can be."""
        edges = np.linspace(0, self.loss.shape[1], count + 1).astype(int)
        return [self.part(slice(int(a), int(b))) for a, b in itertools.pairwise(edges)]


@dataclasses.dataclass(frozen=True)
class Entry:
    """One competitor: a rule, and for the learned gate which gate."""

    name: str
    rule: str  # one of looplm.exits.RULES
    gate: Gate | None = None

    def values(self, seen: Evidence) -> Array:
        """What the rule compares with its threshold, after each loop.  -> RN"""
        if self.gate is not None:
            return np.cumsum(self.gate.exit_prob(seen.hidden), axis=0, dtype=np.float64)
        if self.rule == "fixed":
            return np.repeat(np.arange(1.0, seen.loops + 1)[:, None], seen.loss.shape[1], axis=1)
        return seen.statistics[self.rule]

    def exits(self, values: Array, threshold: float) -> Ints:
        """Where each position stops, counted from 0.  values: RN -> N"""
        if self.gate is not None:
            passed = (values >= threshold) & (threshold < 1.0)
        elif self.rule == "fixed":
            passed = values >= threshold
        else:
            rule = make_rule(self.rule, threshold)
            assert isinstance(rule, Measured)
            passed = rule.reached(values)
        passed[-1] = True
        return passed.argmax(0)

    def thresholds(self, seen: Evidence, count: int) -> list[float]:
        """From stopping early to never, spread as the compared numbers are; few where few are possible."""
        whole = [float(r + 1) for r in range(seen.loops)]
        if self.rule == "fixed":
            return whole
        if self.rule == "stable":
            return [*whole, whole[-1] + 1.0]
        values = self.values(seen)[:-1]
        values = values[np.isfinite(values)]
        most = 1.0 if self.rule in ("gate", "top") else np.inf
        # Twice what was seen: on other positions, too, it is beyond everything.
        ends = [0.0, min(most, 2.0 * float(values.max(initial=0.0))), *([1.0] if most == 1.0 else [])]
        spread = np.quantile(values, np.linspace(0.0, 1.0, count)) if values.size else np.zeros(0)
        rounded = {float(f"{x:.6g}") for x in (*ends, *spread)}
        falling = self.rule in MEASURED and MEASURED[self.rule].falling
        return sorted((x for x in rounded if x <= most), reverse=falling)


def gather(
    weights: Weights,
    batches: Iterable[tuple[Batch, Ints | None]],
    max_tokens: int,
    threads: int = 1,
) -> Evidence:
    """Run all loops over up to `max_tokens` counted positions; with each batch a group per row (B), or None.

    Raises: DataError if there are none.
    """
    parts: list[Evidence] = []
    seen = 0
    for batch, group in batches:
        parts.append(_observe(weights, batch, group, threads))
        seen += parts[-1].loss.shape[1]
        if seen >= max_tokens:
            break
    if not seen:
        raise DataError("there is no position to measure on", "give a longer text")
    return _joined(parts).part(slice(max_tokens))


def _joined(parts: list[Evidence]) -> Evidence:
    statistics = {name: np.concatenate([p.statistics[name] for p in parts], axis=1) for name in parts[0].statistics}
    return Evidence(
        np.concatenate([p.hidden for p in parts], axis=1),
        np.concatenate([p.loss for p in parts], axis=1),
        np.concatenate([p.right for p in parts], axis=1),
        np.concatenate([p.agrees for p in parts], axis=1),
        statistics,
        np.concatenate([p.group for p in parts]),
    )


def _observe(weights: Weights, batch: Batch, group: Ints | None, threads: int) -> Evidence:
    trace = forward(weights, batch.input_ids, start=batch.start, threads=threads)
    counted, loops = batch.target >= 0, len(trace.hidden)
    best: Ints = np.empty((loops, batch.target.size), np.int64)

    def keep(r: int, rows: slice, logits: Floats) -> None:
        best[r, rows] = logits.argmax(axis=1)

    loss = trace.token_loss(batch.target, keep)[:, counted]
    best = best.reshape(loops, *counted.shape)[:, counted]
    hidden = trace.hidden[:, counted]
    rows = np.zeros(len(batch.target), np.int64) if group is None else group
    return Evidence(
        hidden,
        loss,
        best == batch.target[counted],
        best == best[-1],
        _statistics(weights, hidden, trace.gate_logit[:, counted]),
        np.broadcast_to(rows[:, None], counted.shape)[counted],
    )


def _statistics(weights: Weights, hidden: Floats, gate_logit: Floats) -> dict[str, Array]:
    """What each measured rule compares after each loop.  hidden: RND, gate_logit: RN -> rule -> RN"""
    loops, rows = gate_logit.shape
    found = {name: np.full((loops, rows), np.nan) for name in MEASURED}
    readout = Readout(weights.head)
    rules: list[ExitRule] = [bind(kind(loops if name == "stable" else 1.0), readout) for name, kind in MEASURED.items()]
    chunk = max(1, READ_AT_ONCE // readout.vocab_size)
    for begin in range(0, rows, chunk):
        part = slice(begin, begin + chunk)
        for rule in rules:
            assert isinstance(rule, Measured)
            for r in range(rule.earliest - 1, loops):
                found[rule.name][r, part] = rule.statistic(hidden[: r + 1, part], gate_logit[: r + 1, part])
    return found


class Figures(NamedTuple):
    """Means over positions."""

    mean_loops: float
    loss: float
    accuracy: float
    agreement: float


def figures(seen: Evidence, exits: Ints) -> Figures:
    """exits: N, counted from 0."""
    at = (exits, np.arange(exits.size))
    means = (float(array[at].mean(dtype=np.float64)) for array in (seen.loss, seen.right, seen.agrees))
    return Figures(float(exits.mean()) + 1.0, *means)


def by_group(seen: Evidence, exits: Ints, groups: Sequence[int]) -> list[Figures | None]:
    """The same for the positions of each group; None for a group without any."""
    found: list[Figures | None] = []
    for group in groups:
        rows = np.flatnonzero(seen.group == group)
        if not rows.size:
            found.append(None)
            continue
        at = (exits[rows], rows)
        means = (float(array[at].mean(dtype=np.float64)) for array in (seen.loss, seen.right, seen.agrees))
        found.append(Figures(float(exits[rows].mean()) + 1.0, *means))
    return found


@dataclasses.dataclass(frozen=True)
class Goal:
    """What a threshold is to reach: mean loops, or at most so much more loss than all loops (a share, 0.01 = 1 %).

    Exactly one of the two is given.
    """

    target_loops: float | None = None
    max_loss_increase: float | None = None

    def __str__(self) -> str:
        if self.target_loops is not None:
            return f"{self.target_loops:g} loops on average"
        return f"at most {100 * (self.max_loss_increase or 0.0):g} % more loss than all loops"


def solve(entry: Entry, seen: Evidence, goal: Goal) -> float:
    """The threshold that comes nearest to the mean loops wanted, or that loops least within the loss allowed."""
    values = entry.values(seen)
    tried = [(q, figures(seen, entry.exits(values, q))) for q in entry.thresholds(seen, GRID)]
    if goal.target_loops is not None:
        wanted = goal.target_loops
        return min(tried, key=lambda pair: abs(pair[1].mean_loops - wanted))[0]
    allowed = float(seen.loss[-1].mean(dtype=np.float64)) * (1.0 + (goal.max_loss_increase or 0.0))
    within = [pair for pair in tried if pair[1].loss <= allowed] or [max(tried, key=lambda pair: pair[1].mean_loops)]
    return min(within, key=lambda pair: (pair[1].mean_loops, pair[1].loss))[0]
