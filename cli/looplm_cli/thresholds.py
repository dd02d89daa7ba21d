"""Thresholds from a goal: what `looplm calibrate --target-loops` and `--max-loss-increase` solve, check and store."""

import math
from typing import TYPE_CHECKING, Any

from looplm.errors import UsageError
from looplm_cli.inputs import Opened, thread_count

if TYPE_CHECKING:
    from looplm.calibration import Gate
    from looplm.contest import Evidence, Goal
    from looplm.data import Batch

SOLVED_TOKENS = 16384  # of each half: what every rule compares is computed for all loops of each
DEPTH_TOKENS = 16384  # for the losses beyond the trained depth: enough for two digits, and seconds


def parse_goal(model: Opened, target_loops: float | None, max_loss_increase: str | None) -> "Goal | None":
    """The goal two options ask for, None if neither is given.

    Raises: UsageError for both at once, a number of loops the model does not have, or what is no share.
    """
    from looplm.contest import Goal

    if target_loops is None and max_loss_increase is None:
        return None
    if target_loops is not None and max_loss_increase is not None:
        raise UsageError("--target-loops and --max-loss-increase are two goals for one threshold", "give one of them")
    if target_loops is not None:
        most = model.config.total_ut_steps
        if not 1.0 <= target_loops <= most:
            raise UsageError(
                f"--target-loops {target_loops:g} is not between 1 and the model's {most} loops", "use e.g. 2.5"
            )
        return Goal(target_loops=target_loops)
    return Goal(max_loss_increase=_share(max_loss_increase or ""))


def _share(text: str) -> float:
    number, percent = text.strip().removesuffix("%"), text.strip().endswith("%")
    try:
        share = float(number) / (100.0 if percent else 1.0)
    except ValueError:
        share = -1.0
    if not 0.0 <= share <= 1.0:
        raise UsageError(f"--max-loss-increase {text!r} is not a share of the loss", "use e.g. 1% or 0.01")
    return share


def solve_thresholds(
    model: Opened,
    gate: "Gate",
    halves: "tuple[list[Batch], list[Batch]]",
    goal: "Goal",
    threads: int | None,
) -> dict[str, Any]:
    """Each rule's threshold, solved for on the first half and checked on the second: what goes into `looplm.json`."""
    from looplm.contest import Entry, figures, gather, solve
    from looplm.exits import MEASURED

    solving, checking = (
        gather(model.weights, ((batch, None) for batch in half), SOLVED_TOKENS, thread_count(threads))
        for half in halves
    )
    entries = [Entry("gate", "gate", gate), *(Entry(name, name) for name in MEASURED)]
    found: dict[str, Any] = {"goal": str(goal), "rule": "gate", "thresholds": {}, "solved": {}, "checked": {}}
    for entry in entries:
        threshold = solve(entry, solving, goal)
        found["thresholds"][entry.rule] = threshold
        for name, seen in (("solved", solving), ("checked", checking)):
            at = figures(seen, entry.exits(entry.values(seen), threshold))
            found[name][entry.rule] = {"mean_loops": round(at.mean_loops, 4), "loss": round(at.loss, 5)}
    for name, seen in (("solved", solving), ("checked", checking)):
        found[name]["all loops"] = {"mean_loops": float(seen.loops), "loss": round(_full_loss(seen), 5)}
    return found


def _full_loss(seen: "Evidence") -> float:
    return float(seen.loss[-1].mean(dtype=float))


def losses_by_depth(model: Opened, batches: "list[Batch]", threads: int | None) -> dict[str, float]:
    """Held-out loss after each loop, up to twice as many as trained: what a warning about depth can tell."""
    from looplm.analysis import evaluate

    taken, seen = [], 0
    for batch in batches:
        if seen >= DEPTH_TOKENS:
            break
        taken.append(batch)
        seen += batch.target.size
    found = evaluate(model.weights, taken, max_loops=2 * model.config.total_ut_steps, threads=thread_count(threads))
    return {str(r + 1): round(float(loss), 5) for r, loss in enumerate(found.loss) if math.isfinite(loss)}


def print_thresholds(found: dict[str, Any]) -> None:
    """The table of what was solved for on one half and what it comes to on the other."""
    from looplm_cli.render import print_table

    rows = [
        [
            name,
            f"{found['thresholds'][name]:.4g}" if name in found["thresholds"] else "",
            *(f"{found[half][name]['mean_loops']:.2f}  {found[half][name]['loss']:.4f}" for half in HALVES),
        ]
        for name in (*found["thresholds"], "all loops")
    ]
    title = f"goal: {found['goal']}, on up to {SOLVED_TOKENS:,} positions of each half"
    print_table(["mean loops and loss", "threshold", "solved on", "checked on"], rows, title)


HALVES = ("solved", "checked")


def verdict(found: dict[str, Any]) -> str:
    """What is stored, and which rule did best, with as many loops, on the half it was not solved on."""
    kept = found["rule"]
    at = found["checked"][kept]
    fair = [name for name in found["thresholds"] if found["checked"][name]["mean_loops"] <= at["mean_loops"] + 0.05]
    best = min(fair, key=lambda name: found["checked"][name]["loss"])
    other = ""
    if best != kept:
        loss, loops = found["checked"][best]["loss"], found["checked"][best]["mean_loops"]
        other = f"; {best} loses least, {loss:.4f} at {loops:.2f} loops: looplm generate --exit {best}"
    return (
        f"looplm generate now stops by {kept}:{found['thresholds'][kept]:.4g}: on the other half "
        f"{at['mean_loops']:.2f} loops on average, loss {at['loss']:.4f}{other}"
    )
