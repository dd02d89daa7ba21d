"""Everything a terminal shows: tables, heat maps, histograms, progress, errors; the only place that knows colours.

Results go to stdout, everything else to stderr.  Colour is never the only carrier: a heat-map cell holds its number.
NO_COLOR, COLUMNS and TERM are obeyed (by rich).  rich is imported when something is shown, not before.
"""

import functools
import json
import math
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress as Bar
    from rich.style import Style
    from rich.table import Table
    from rich.text import Text

BLOCKS = "▁▂▃▄▅▆▇█"

# Dark to light and evenly so, also to eyes that do not tell red from green (five stops of the viridis map).
HEAT = ((68, 1, 84), (59, 82, 139), (33, 145, 140), (94, 201, 98), (253, 231, 37))


@functools.cache
def stdout() -> "Console":
    from rich.console import Console

    return Console(highlight=False)


@functools.cache
def stderr() -> "Console":
    from rich.console import Console

    return Console(stderr=True, highlight=False)


def say(text: str) -> None:
    """A remark beside the results (stderr)."""
    from rich.text import Text

    stderr().print(Text(text), soft_wrap=True)


def print_error(message: str, hint: str = "") -> None:
    """Two lines on stderr: what was seen, and the cure.  Written as one: a process of several may be ended between."""
    from rich.text import Text

    lines = [_labelled("error", "bold red", message)]
    if hint:
        lines.append(_labelled("hint", "bold", hint))
    stderr().print(Text("\n").join(lines), soft_wrap=True)


def print_help(usage: str, text: str, listed: Mapping[str, Sequence[tuple[str, str]]]) -> None:
    """Usage, explanation (with markup), and a frame of names and their meaning per title, on stdout."""
    from rich.padding import Padding
    from rich.panel import Panel
    from rich.table import Table

    width = min(stdout().width, 100)
    stdout().print(Padding(f"{usage}\n\n{text}", 1), width=width)
    for title, entries in listed.items():
        table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
        table.add_column(style="bold cyan", no_wrap=True)
        table.add_column()
        for name, meaning in entries:
            table.add_row(name, meaning)
        stdout().print(Panel(table, title=title, title_align="left", border_style="dim"), width=width)


def print_warning(message: str) -> None:
    """One line on stderr."""
    stderr().print(_labelled("warning", "bold yellow", message), soft_wrap=True)


def _labelled(label: str, style: str, message: str) -> "Text":
    from rich.text import Text

    line = " ".join(message.split())
    return Text.assemble((f"{label}:", style), f" {line}")


def print_json(value: object) -> None:
    """One line of JSON on stdout; a command with --json prints it last."""
    sys.stdout.write(json.dumps(value, allow_nan=False) + "\n")


def finite(number: float | None) -> float | None:
    """A float32 or float as JSON has it: shortest digits that give the value back, null for NaN and infinity."""
    if number is None or not math.isfinite(number):
        return None
    return float(str(number))


def print_table(columns: Sequence[str], rows: Iterable[Sequence[object]], title: str = "") -> None:
    """A table on stdout: the first column is text, all others are numbers and align right."""
    stdout().print(table(columns, rows, title))


def table(columns: Sequence[str], rows: Iterable[Sequence[object]], title: str = "") -> "Table":
    from rich import box
    from rich.table import Table
    from rich.text import Text

    made = Table(title=Text(title) if title else None, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for index, column in enumerate(columns):
        made.add_column(Text(column), justify="right" if index else "left", no_wrap=True)
    for row in rows:
        made.add_row(*(cell if isinstance(cell, Text) else Text(str(cell)) for cell in row))
    return made


def sparkline(shares: Sequence[float]) -> str:
    """One block per value, the largest full: the shape of a distribution in one word."""
    top = max((share for share in shares if math.isfinite(share)), default=0.0)
    if top <= 0.0:
        return BLOCKS[0] * len(shares)
    return "".join(BLOCKS[min(7, int(8 * share / top))] if math.isfinite(share) else "?" for share in shares)


def exit_histogram(shares: Sequence[float]) -> str:
    """Share of tokens per exit loop: shape and numbers, e.g. `▁█▂▁  1: 3 %  2: 61 %  3: 24 %  4: 12 %`."""
    numbers = "  ".join(f"{loop}: {share:.0%}".replace("%", " %") for loop, share in enumerate(shares, 1))
    return f"{sparkline(shares)}  {numbers}"


def print_loops(tokens: Iterable[tuple[str, int]], depth: int) -> None:
    """Tokens on lines as wide as the terminal, under each the loop it was read from, of `depth` (stdout)."""
    from rich.cells import cell_len
    from rich.text import Text

    above, below = Text(), Text()
    for token, loop in tokens:
        size = max(cell_len(token), len(str(loop))) + 1
        if above and cell_len(above.plain) + size > stdout().width:
            stdout().print(above, below, sep="\n", soft_wrap=True)
            above, below = Text(), Text()
        above.append(token + " " * (size - cell_len(token)))
        below.append(str(loop), style=heat(loop / depth)).append(" " * (size - len(str(loop))))
    stdout().print(above, below, sep="\n", soft_wrap=True)


def heat(share: float) -> "Style":
    """Background for a probability from 0 to 1, with the text colour that reads best on it."""
    from rich.color import Color
    from rich.style import Style

    place = min(max(share, 0.0), 1.0) * (len(HEAT) - 1)
    below = min(int(place), len(HEAT) - 2)
    red, green, blue = (
        round(low + (high - low) * (place - below)) for low, high in zip(HEAT[below], HEAT[below + 1], strict=True)
    )
    bright = 0.299 * red + 0.587 * green + 0.114 * blue > 110
    return Style(color=Color.parse("#000000" if bright else "#ffffff"), bgcolor=Color.from_rgb(red, green, blue))


class Progress:
    """What a long job says while it runs: one live line on a terminal, a plain line now and then on a pipe (stderr).

    `with Progress(total=1200, unit="step") as progress: progress.update(done, "loss 2.91")`.  With quiet=True it says
    nothing but notes.
    """

    def __init__(self, total: float, unit: str = "", quiet: bool = False, every: float = 5.0) -> None:
        self.total = total
        self.unit = unit
        self.every = every  # seconds between two plain lines
        self.live = stderr().is_terminal and not quiet
        self.plain = not self.live and not quiet
        self._said = -math.inf
        self._bar: Bar | None = None

    def __enter__(self) -> "Progress":
        if self.live:
            from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
            from rich.progress import Progress as Bar

            columns = (
                TextColumn(f"{self.unit} {{task.completed:.0f}}/{{task.total:.0f}}"),
                BarColumn(20),
                TimeRemainingColumn(),
                TextColumn("{task.description}", markup=False),
            )
            self._bar = Bar(*columns, console=stderr(), transient=True)
            self._bar.add_task("", total=self.total)
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar:
            self._bar.stop()

    def update(self, done: float, text: str = "") -> None:
        """Say how far the job is; on a pipe at most every few seconds, and at the end."""
        if self._bar:
            self._bar.update(self._bar.task_ids[0], completed=done, description=text)
        elif self.plain and (time.monotonic() - self._said >= self.every or done >= self.total):
            self._said = time.monotonic()
            say(f"{self.unit} {done:.0f}/{self.total:.0f}  {text}".strip())

    def note(self, text: str) -> None:
        """A line that stays, above the live one."""
        if self._bar:
            from rich.text import Text

            self._bar.console.print(Text(text), soft_wrap=True)
        else:
            say(text)
