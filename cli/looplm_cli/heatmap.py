"""The table of `looplm inspect`: tokens down, loops across, each cell a prediction on a heat-map background.

It draws the report of report.py.  A cell reads `prediction 41◆`: the best guess, the probability of the true next token
in percent, and the mark of the loop where the threshold stops.  Wide terminals get the gate's lambda and the exit CDF
too; loops that do not fit side by side come in further tables.
"""

import math
from typing import Any

from rich.cells import cell_len, set_cell_size
from rich.text import Text

from looplm_cli.render import exit_histogram, heat, stdout, table

MARK = "◆"
NARROWEST = 12  # columns of a cell below which it is not readable
WIDE = 24  # from where it tells more
WIDEST = 32
TOKEN = 9  # columns of the token, and of the true next one


def print_inspection(report: dict[str, Any]) -> None:
    """The whole terminal output: the grid, the means by loop, and what the threshold gives."""
    console = stdout()
    target = "target" if report["task"] == "hops" else "true next"
    places = len(str(len(report["positions"])))
    side = places + 2 * (TOKEN + 1)
    at_once = max(1, min(report["loops"], (console.width - side) // (NARROWEST + 1)))
    blocks = math.ceil(report["loops"] / at_once)
    at_once = math.ceil(report["loops"] / blocks)
    width = min(WIDEST, (console.width - side) // at_once - 1)
    for first in range(0, report["loops"], at_once):
        loops = range(first, min(first + at_once, report["loops"]))
        console.print(_head(places, target, loops, width), soft_wrap=True)
        for position in report["positions"]:
            console.print(_line(places, position, loops, width), soft_wrap=True)
        console.print()
    key = f"number: probability of the {target} in percent, also the colour; bold: prediction right; "
    console.print(Text(key + f"{MARK}: stops here {_rule(report)}", style="dim"))
    console.print(_means(report))
    shares = [loop["exits"] for loop in report["by_loop"]]
    console.print(Text(f"{_rule(report)}: {report['mean_loops']:.2f} of {report['loops']} loops on average"))
    console.print(Text(f"exits by loop: {exit_histogram(shares)}"))


def _rule(report: dict[str, Any]) -> str:
    return f"by {report['exit']}" if report["q"] is None else f"at q = {report['q']:g}"


def _head(places: int, target: str, loops: range, width: int) -> Text:
    names = [_fit("", places), _fit("token", TOKEN), _fit(target, TOKEN)]
    return Text(" ".join([*names, *(_fit(f"loop {r + 1}", width) for r in loops)]).rstrip(), style="bold")


def _line(places: int, position: dict[str, Any], loops: range, width: int) -> Text:
    line = Text.assemble((f"{position['position']:>{places}} ", "dim"))
    line.append(f"{_fit(position['token'], TOKEN)} {_fit(position['target'] or '-', TOKEN)}")
    for r in loops:
        line.append(" ")
        line.append_text(_cell(position, position["loops"][r], width))
    return line


def _cell(position: dict[str, Any], loop: dict[str, Any], width: int) -> Text:
    share = loop["target_prob"]
    number = "  -" if share is None else f"{100 * share:3.0f}"
    mark = MARK if position["exit_loop"] == loop["loop"] else " "
    more = ""
    if width >= WIDE:
        more = f" λ{_two_digits(loop['hazard'])} Σ{_two_digits(loop['exit_cdf'])}"
    room = width - len(f" {number}{more}{mark}")
    right = loop["rank"] == 1 and loop["top"][0]["id"] == position["target_id"]
    guess = _fit(loop["top"][0]["token"], room)
    text = Text(f"{guess} {number}{more}{mark}", style="" if share is None else heat(math.sqrt(share)))
    if right:
        text.stylize("bold underline", 0, len(guess.rstrip()))
    return text


def _two_digits(share: float | None) -> str:
    """A probability in three columns: .07, 1.0"""
    if share is None:
        return "  -"
    return "1.0" if share >= 0.995 else f"{share:.2f}"[1:]


def _fit(text: str, width: int) -> str:
    """Cut or padded to so many terminal columns; what is cut ends in an ellipsis."""
    if cell_len(text) > width:
        return set_cell_size(text, width - 1) + "…"
    return set_cell_size(text, width)


def _means(report: dict[str, Any]) -> Any:
    columns = ["means", "loss", "right", "gate λ", "exit prob", "state change", "KL to last"]
    rows = [
        [
            f"loop {loop['loop']}",
            _number(loop["loss"]),
            _percent(loop["accuracy"]),
            _number(loop["hazard"]),
            _number(loop["exit_prob"]),
            _percent(loop["change"]),
            _number(loop["kl_to_last"]),
        ]
        for loop in report["by_loop"]
    ]
    return table(columns, rows)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.0f} %"
