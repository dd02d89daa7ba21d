"""The page of `looplm inspect --html`: one self-contained file made of a template, a style and a script."""

import html
import json
from importlib import resources
from typing import Any


def build(report: dict[str, Any]) -> str:
    """The HTML of an inspection report (the object that `looplm inspect --json` prints).

    The report is embedded as JSON with every `<` written as an escape, so no text of a prompt or token can end the
    script element it stands in; the page's script writes text nodes only.
    """
    parts = {
        "title": html.escape(f"{report['model']}: inside the loops"),
        "style": _read("inspect.css"),
        "script": _read("inspect.js"),
        "report": json.dumps(report, allow_nan=False).replace("<", "\\u003c"),
    }
    page = _read("inspect.html")
    before, *rest = page.split("{{")
    pieces = [before]
    for piece in rest:
        name, _, text = piece.partition("}}")
        pieces += [parts[name], text]
    return "".join(pieces)


def _read(name: str) -> str:
    return (resources.files(__package__) / name).read_text(encoding="utf-8").strip()
