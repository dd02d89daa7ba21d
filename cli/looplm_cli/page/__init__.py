"""The pages of `inspect --html` and `sweep --html`: one self-contained file of a template, styles, script and data."""

import html
import json
from importlib import resources
from typing import Any


def build(report: dict[str, Any]) -> str:
    """The HTML of an inspection report (the object that `looplm inspect --json` prints)."""
    return _page("inspect", f"{report['model']}: inside the loops", report)


def build_sweep(report: dict[str, Any]) -> str:
    """The HTML of a contest of exit rules (the object that `looplm sweep --json` prints)."""
    return _page("sweep", f"{report['model']}: which exit rule", report)


def _page(name: str, title: str, report: dict[str, Any]) -> str:
    """Template, the style all pages share and its own, script and data in one text.

    The report is embedded as JSON with every `<` written as an escape, so no text of a prompt or token can end the
    script element it stands in; the page's script writes text nodes only.
    """
    parts = {
        "title": html.escape(title),
        "style": f"{_read('page.css')}\n{_read(f'{name}.css')}",
        "script": _read(f"{name}.js"),
        "report": json.dumps(report, allow_nan=False).replace("<", "\\u003c"),
    }
    page = _read(f"{name}.html")
    before, *rest = page.split("{{")
    pieces = [before]
    for piece in rest:
        name, _, text = piece.partition("}}")
        pieces += [parts[name], text]
    return "".join(pieces)


def _read(name: str) -> str:
    return (resources.files(__package__) / name).read_text(encoding="utf-8").strip()
