"""The curves of a contest: points with intervals, the Pareto front, the winner at each budget, the paper's Figure 5.

An interval is that of a mean over neighbouring chunks of text (95 %, Student's t); differences are taken chunk by
chunk, since all competitors see the same ones.
"""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

from .arrays import Array
from .contest import Entry, Evidence, Figures, by_group, figures
from .timing import Decoded

# 97.5 % points of Student's t for 1 to 30 degrees of freedom.
STUDENT = (
    *(12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131),
    *(2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042),
)
QUANTILES = (0.1, 0.5, 0.9)


def half_width(values: Sequence[float] | Array) -> float:
    """Half the 95 % interval of a mean of some numbers; infinite for a single one."""
    count = len(values)
    if count < 2:
        return math.inf
    student = STUDENT[count - 2] if count - 2 < len(STUDENT) else 1.96
    return student * float(np.std(values, ddof=1)) / math.sqrt(count)


@dataclasses.dataclass
class Point:
    """One entry at one threshold: figures over all positions, and chunk by chunk."""

    entry: Entry
    threshold: float
    whole: Figures
    chunks: list[Figures]
    exits: list[float]  # share of positions that stop after each loop
    quantiles: tuple[int, ...]  # of the exit loop, counted from 1
    groups: list[Figures | None]
    decoded: Decoded | None = None

    @property
    def exit(self) -> str:
        return f"{self.entry.rule}:{self.threshold:.6g}"

    @property
    def ms(self) -> float:
        """Median milliseconds per token, infinite where it was not measured."""
        return math.inf if self.decoded is None else self.decoded.ms

    def interval(self, name: str) -> float:
        return half_width([float(getattr(chunk, name)) for chunk in self.chunks])


def point(entry: Entry, threshold: float, seen: Evidence, chunks: list[Evidence], groups: Sequence[int] = ()) -> Point:
    exits = entry.exits(entry.values(seen), threshold)
    edges = np.cumsum([0] + [chunk.loss.shape[1] for chunk in chunks])
    parts = [figures(chunk, exits[a:b]) for chunk, a, b in zip(chunks, edges[:-1], edges[1:], strict=True)]
    shares = np.bincount(exits, minlength=seen.loops) / max(1, exits.size)
    return Point(
        entry,
        threshold,
        figures(seen, exits),
        parts,
        [float(share) for share in shares],
        tuple(int(q) + 1 for q in np.quantile(exits, QUANTILES, method="inverted_cdf")),
        by_group(seen, exits, groups),
    )


def spread(points: list[Point], count: int) -> list[Point]:
    """At most so many points of one entry, about evenly far apart in mean loops, the first and the last among them.

    The points come from stopping early to never.
    """
    loops = np.array([p.whole.mean_loops for p in points])
    between = np.linspace(loops[0], loops[-1], count)[1:-1]
    return [points[i] for i in sorted({0, len(points) - 1, *(int(np.abs(loops - x).argmin()) for x in between)})]


def front(points: Sequence[Point], cost: str) -> list[bool]:
    """Which points no other beats: none costs as little and loses less.  `cost`: "loops" or "ms"."""
    pairs = [(_cost(p, cost), p.whole.loss) for p in points]
    return [
        math.isfinite(c) and not any((a <= c and b < loss) or (a < c and b <= loss) for a, b in pairs)
        for c, loss in pairs
    ]


def _cost(found: Point, cost: str) -> float:
    return found.whole.mean_loops if cost == "loops" else found.ms


@dataclasses.dataclass(frozen=True)
class Standing:
    """An entry at a budget, read off its curve between two thresholds: means, and the loss of each chunk."""

    entry: str
    loss: float
    accuracy: float
    losses: tuple[float, ...]
    accuracies: tuple[float, ...]


@dataclasses.dataclass(frozen=True)
class Budget:
    """Who loses least at one budget.  Entries that cannot do with it are not in the ranking."""

    cost: str  # "loops" or "ms"
    amount: float
    ranking: list[Standing]  # best first

    @property
    def advantage(self) -> tuple[float, float]:
        """How much less the winner loses than the next, and half the interval; NaN where there is no next."""
        return (math.nan, math.nan) if len(self.ranking) < 2 else lead(self.ranking[0], self.ranking[1])


def lead(one: Standing, other: Standing) -> tuple[float, float]:
    """How much less `one` loses, chunk by chunk: mean, and half the 95 % interval."""
    difference = np.array(other.losses) - np.array(one.losses)
    return float(difference.mean()), half_width(difference)


def budgets(points: Sequence[Point], loops: int) -> list[Budget]:
    """Winners at a quarter, half and three quarters of the way from one loop to all, and from its time to theirs."""
    amounts = [("loops", 1.0 + (loops - 1.0) * share) for share in (0.25, 0.5, 0.75)]
    times = [p.ms for p in points if p.entry.rule == "fixed" and math.isfinite(p.ms)]
    if times:
        amounts += [("ms", min(times) + (max(times) - min(times)) * share) for share in (0.25, 0.5, 0.75)]
    return [standings(points, cost, amount) for cost, amount in amounts]


def standings(points: Sequence[Point], cost: str, amount: float, exactly: bool = False) -> Budget:
    """Every entry at a budget, of which it spends what lowers its loss, unless it is to spend `exactly` that much."""
    found = [_standing(name, own, cost, amount, exactly) for name, own in by_entry(points).items()]
    return Budget(cost, amount, sorted((s for s in found if s is not None), key=lambda s: s.loss))


def by_entry(points: Sequence[Point]) -> dict[str, list[Point]]:
    found: dict[str, list[Point]] = {}
    for each in points:
        found.setdefault(each.entry.name, []).append(each)
    return found


def _standing(name: str, points: list[Point], cost: str, amount: float, exactly: bool) -> Standing | None:
    """Between two thresholds: a token may take either, so every mixture of two points is in reach."""
    known = [p for p in points if math.isfinite(_cost(p, cost))]
    if not exactly:
        known = [p for p, unbeaten in zip(known, front(known, cost), strict=True) if unbeaten]
    ordered = sorted(known, key=lambda p: (_cost(p, cost), -p.whole.loss))
    x = np.array([_cost(p, cost) for p in ordered])
    slack = 1e-9 * amount
    if not ordered or amount < x[0] - slack or (exactly and amount > x[-1] + slack):
        return None
    spent = min(amount, x[-1])

    def at(name: str) -> tuple[float, ...]:
        rows = np.array([[getattr(chunk, name) for chunk in p.chunks] for p in ordered])
        own = x[:, None] if cost == "ms" else np.array([[c.mean_loops for c in p.chunks] for p in ordered])
        own = np.broadcast_to(own, rows.shape)
        return tuple(_interpolated(spent, own[:, c], rows[:, c]) for c in range(rows.shape[1]))

    losses, accuracies = at("loss"), at("accuracy")
    return Standing(name, float(np.mean(losses)), float(np.mean(accuracies)), losses, accuracies)


def _interpolated(amount: float, x: Array, y: Array) -> float:
    order = np.argsort(x, kind="stable")
    return float(np.interp(amount, x[order], y[order]))


@dataclasses.dataclass(frozen=True)
class Claim:
    """Something the paper's Figure 5 says, and what was found: a lead in accuracy, and half its interval."""

    says: str
    holds: bool
    lead: float
    interval: float


def figure_five(points: Sequence[Point], loops: int) -> tuple[float, list[Claim]]:
    """The order of the paper's four strategies at its mean of 2.5 of 4 loops, by next-token accuracy.

    Source: Section 5.4.1, Figure 5.  A claim holds if the lead is above 0 by more than the interval, "within 2 points"
    if it is above -0.02.  -> the budget, and the claims that these points can speak of.
    """
    budget = 1.0 + (loops - 1.0) * 0.5
    at = {s.entry: s for s in standings(points, "loops", budget, exactly=True).ranking}
    claims = []
    for says, one, other, close in (
        ("the paper's Stage II gate beats the gate of Stage I", "gate, paper", "gate, Stage I", False),
        ("the gate of Stage I beats a fixed depth", "gate, Stage I", "fixed", False),
        ("stopping on a small change of the state stays within 2 points of it", "change", "gate, paper", True),
        ("the paper's Stage II gate beats stopping on a small change", "gate, paper", "change", False),
    ):
        if one in at and other in at:
            difference = np.array(at[one].accuracies) - np.array(at[other].accuracies)
            mean, interval = float(difference.mean()), half_width(difference)
            holds = mean > -0.02 if close else mean - interval > 0.0
            claims.append(Claim(says, holds, mean, interval))
    return budget, claims
