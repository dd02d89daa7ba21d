"""Keeps the code shown in the documents equal to the code that runs.

A block between a line `<!-- source: looplm_reference.ops.gate_forward -->` and the end of the fence that follows is the
text of that function, class or constant.  `python docs/sync.py` rewrites all of them; `--check` only tells.
"""

import ast
import pathlib
import re
import sys

ROOT = pathlib.Path(__file__).parents[1]
ROOMS = (".", "cli", "reference", "fixtures")
BLOCK = re.compile(r"(<!-- source: (?P<name>[\w.]+) -->\n```python\n)(?P<body>.*?)(^```$)", re.S | re.M)


def documents() -> list[pathlib.Path]:
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def source(name: str) -> str:
    """The text of `package.module.object[.member]`, found by parsing and without importing anything.

    Raises: LookupError if no module of that name defines such an object.
    """
    parts = name.split(".")
    for length in range(len(parts) - 1, 0, -1):
        for room in ROOMS:
            path = (ROOT / room).joinpath(*parts[:length]).with_suffix(".py")
            if path.is_file():
                return _text_of(path.read_text(encoding="utf-8"), parts[length:], name)
    raise LookupError(f"{name}: no such module")


def _text_of(text: str, members: list[str], name: str) -> str:
    body: list[ast.stmt] = ast.parse(text).body
    node: ast.stmt | None = None
    for member in members:
        node = next((item for item in body if member in _names(item)), None)
        if node is None:
            raise LookupError(f"{name}: no {member} there")
        body = getattr(node, "body", [])
    assert node is not None
    first = min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", []))])
    lines = text.splitlines()[first - 1 : node.end_lineno]
    return "\n".join(line[node.col_offset :] for line in lines) + "\n"


def _names(node: ast.stmt) -> list[str]:
    if isinstance(node, ast.Assign):
        return [target.id for target in node.targets if isinstance(target, ast.Name)]
    return [node.name] if isinstance(node, ast.FunctionDef | ast.ClassDef) else []


def synced(text: str) -> str:
    """A document with every source block as it should be."""
    return BLOCK.sub(lambda found: found[1] + source(found["name"]) + found[4], text)


def main(arguments: list[str]) -> int:
    stale = [
        path for path in documents() if synced(path.read_text(encoding="utf-8")) != path.read_text(encoding="utf-8")
    ]
    for path in stale:
        print(f"{path.relative_to(ROOT)} {'is stale' if '--check' in arguments else 'rewritten'}")
        if "--check" not in arguments:
            path.write_text(synced(path.read_text(encoding="utf-8")), encoding="utf-8")
    return int(bool(stale) and "--check" in arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
