"""A contest of exit rules as one JSON object, and as tables and a small plot for the terminal."""

import math
from typing import TYPE_CHECKING, Any

from looplm_cli.inputs import Opened

if TYPE_CHECKING:
    from looplm.contest import Evidence
    from looplm.pareto import Budget, Point
    from looplm_cli.held_out import HeldOut

MARKS = "FCKTMSg123456789"  # a letter per entry, in their order
PLOT_WIDTH, PLOT_HEIGHT = 68, 16
WIDE = 100  # columns from which intervals are shown


def sweep_report(
    model: Opened, data: "HeldOut", judge: "Evidence", found: "list[Point]", *, chunks: int, turns: int
) -> dict[str, Any]:
    """The --json object.  Loops are counted from 1, times are milliseconds per decoded token, intervals 95 %."""
    from looplm.pareto import budgets, by_entry, figure_five, front

    by_loops, by_time = (dict(zip(map(id, found), front(found, cost), strict=True)) for cost in ("loops", "ms"))
    budget, claims = figure_five(found, judge.loops)
    return {
        "model": str(model.folder),
        "task": model.task,
        "data": data.name,
        "loops": judge.loops,
        "tokens": int(judge.loss.shape[1]),
        "chunks": chunks,
        "turns": turns,
        "full": {"loss": _number(judge.loss[-1].mean(dtype=float)), "accuracy": _number(judge.right[-1].mean())},
        "entries": [
            {"entry": name, "points": [_point(p, by_loops[id(p)], by_time[id(p)], data) for p in own]}
            for name, own in by_entry(found).items()
        ],
        "budgets": [_budget(each) for each in budgets(found, judge.loops)],
        "figure5": {
            "mean_loops": budget,
            "claims": [
                {"says": c.says, "holds": c.holds, "lead": _number(c.lead), "interval": _number(c.interval)}
                for c in claims
            ],
        },
    }


def _number(value: float) -> float | None:
    return float(f"{float(value):.6g}") if math.isfinite(value) else None


def _point(p: "Point", on_loops: bool, on_time: bool, data: "HeldOut") -> dict[str, Any]:
    made: dict[str, Any] = {
        "exit": p.exit,
        "threshold": p.threshold,
        **{name: _number(getattr(p.whole, name)) for name in p.whole._fields},
        "intervals": {name: _number(p.interval(name)) for name in p.whole._fields},
        "exits": [_number(share) for share in p.exits],
        "loops_quantiles": list(p.quantiles),
        "ms_per_token": _number(p.ms),
        "ms_range": None if p.decoded is None else [_number(f(p.decoded.ms_per_token)) for f in (min, max)],
        "decode_loops": None if p.decoded is None else _number(_mean(p.decoded.loops_run)),
        "decode_loss": None if p.decoded is None or data.max_hops else _number(_mean(p.decoded.loss)),
        "best_by_loops": on_loops,
        "best_by_time": on_time,
    }
    if data.max_hops:
        made["hops"] = [
            {
                "hops": hops,
                "mean_loops": None if at is None else _number(at.mean_loops),
                "accuracy": None if at is None else _number(at.accuracy),
            }
            for hops, at in enumerate(p.groups, 1)
        ]
    return made


def _mean(values: list[float]) -> float:
    return sum(values) / max(1, len(values))


def _budget(found: "Budget") -> dict[str, Any]:
    advantage, interval = found.advantage
    return {
        "cost": found.cost,
        "amount": _number(found.amount),
        "winner": found.ranking[0].entry if found.ranking else None,
        "advantage": _number(advantage),
        "interval": _number(interval),
        "sure": math.isfinite(advantage) and advantage > interval,
        "ranking": [
            {"entry": s.entry, "loss": _number(s.loss), "accuracy": _number(s.accuracy)} for s in found.ranking
        ],
    }


# ---- the terminal


def print_sweep(report: dict[str, Any]) -> None:
    from looplm_cli.render import print_table, sparkline, stdout

    marks = {entry["entry"]: mark for entry, mark in zip(report["entries"], MARKS, strict=False)}
    stdout().print(
        f"{report['data']}: {report['tokens']:,} positions in {report['chunks']} chunks; loss after all "
        f"{report['loops']} loops {report['full']['loss']:.4f}",
        markup=False,
        soft_wrap=True,
    )
    wide = stdout().width >= WIDE
    rows = [
        [
            f"{marks[entry['entry']]} {entry['entry']}",
            f"{p['threshold']:.4g}",
            f"{p['mean_loops']:.2f}",
            sparkline([share or 0.0 for share in p["exits"]]),
            f"{p['loss']:.4f}" + (f" ±{_short(p['intervals']['loss'])}" if wide else ""),
            f"{100 * p['accuracy']:.1f} %",
            *([f"{100 * p['agreement']:.1f} %"] if wide else []),
            "-" if p["ms_per_token"] is None else f"{p['ms_per_token']:.2f}",
            ("L" if p["best_by_loops"] else " ") + ("T" if p["best_by_time"] else " "),
        ]
        for entry in report["entries"]
        for p in entry["points"]
    ]
    heads = ["rule", "at", "loops", "exits", "loss", "right", *(["as full"] if wide else []), "ms", "best"]
    print_table(heads, rows)
    key = "ms: per decoded token; best: nothing else with as few loops (L), or in as little time (T), loses less"
    stdout().print(("as full: same best token as after all loops; " if wide else "") + key, markup=False)
    _print_plot(report, marks)
    _print_budgets(report)
    if any("hops" in p for entry in report["entries"] for p in entry["points"]):
        _print_hops(report)
    _print_figure5(report)


def _short(value: float | None) -> str:
    return "?" if value is None else f"{value:.4f}"


def _print_plot(report: dict[str, Any], marks: dict[str, str]) -> None:
    """Loss over mean loops, a letter per entry; where two share a place the later one shows."""
    from looplm_cli.render import stdout

    shown = [(p["mean_loops"], p["loss"], marks[e["entry"]]) for e in report["entries"] for p in e["points"]]
    low, high = min(y for _, y, _ in shown), max(y for _, y, _ in shown)
    grid = [[" "] * PLOT_WIDTH for _ in range(PLOT_HEIGHT)]
    for x, y, mark in shown:
        column = round((x - 1.0) / (report["loops"] - 1.0) * (PLOT_WIDTH - 1))
        row = round((high - y) / ((high - low) or 1.0) * (PLOT_HEIGHT - 1))
        grid[row][column] = mark
    lines = [
        f"{high - (high - low) * r / (PLOT_HEIGHT - 1):8.3f} │{''.join(row).rstrip()}" for r, row in enumerate(grid)
    ]
    ends = f"{'':9}└{'─' * PLOT_WIDTH}\n{'':10}1{'mean loops':^{PLOT_WIDTH - 2}}{report['loops']}"
    key = "  ".join(f"{mark} {name}" for name, mark in marks.items())
    stdout().print("\n".join(["    loss", *lines, ends]), markup=False, soft_wrap=True)
    stdout().print(f"{key}\n", markup=False)


def _print_budgets(report: dict[str, Any]) -> None:
    from looplm_cli.render import print_table, stdout

    rows = []
    for budget in report["budgets"]:
        unit = "loops" if budget["cost"] == "loops" else "ms"
        first, second = ([*budget["ranking"], None, None])[:2]
        lead = "-" if budget["advantage"] is None else f"{budget['advantage']:.4f} ±{_short(budget['interval'])}"
        names = [f"{s['entry']} {s['loss']:.4f}" if s else "-" for s in (first, second)]
        rows.append([f"{budget['amount']:.2f} {unit}", *names, lead if stdout().width >= WIDE else lead.split(" ")[0]])
    print_table(["budget", "winner", "next", "ahead by"], rows)
    unsure = [f"{b['amount']:.2f} {b['cost']}" for b in report["budgets"] if not b["sure"]]
    if unsure:
        stdout().print(f"no more than chance (95 %) at: {', '.join(unsure)}", markup=False)


def _print_hops(report: dict[str, Any]) -> None:
    """At the middle budget: does a rule spend its loops on the questions that need them?"""
    from looplm_cli.render import print_table

    middle = 1.0 + (report["loops"] - 1.0) * 0.5
    nearest = [
        (entry["entry"], min(entry["points"], key=lambda p: abs(p["mean_loops"] - middle)))
        for entry in report["entries"]
    ]
    hops = range(len(nearest[0][1]["hops"]))
    rows = [
        [
            f"{name} {p['threshold']:.3g}",
            *(_cell(p["hops"][h]) for h in hops),
            f"{p['mean_loops']:.2f}  {p['accuracy']:.3f}",
        ]
        for name, p in nearest
    ]
    heads = [f"{h + 1} hop{'s' if h else ''}" for h in hops]
    print_table([f"near {middle:g} loops", *heads, "all"], rows)


def _cell(at: dict[str, Any]) -> str:
    return "-" if at["mean_loops"] is None else f"{at['mean_loops']:.2f}  {at['accuracy']:.3f}"


def _print_figure5(report: dict[str, Any]) -> None:
    from looplm_cli.render import stdout

    found = report["figure5"]
    lines = [
        f"  {'holds' if c['holds'] else 'does not hold'}: {c['says']} "
        f"({100 * (c['lead'] or 0.0):+.2f} ±{100 * (c['interval'] or 0.0):.2f} points)"
        for c in found["claims"]
    ]
    head = f"the paper's Figure 5 here, accuracy at {found['mean_loops']:g} mean loops:"
    stdout().print("\n".join([head, *lines]), markup=False, soft_wrap=True)
