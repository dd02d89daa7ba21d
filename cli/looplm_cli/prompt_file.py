"""A file of prompts: one per line, or JSON lines with settings of their own.  All of it is read and checked at once."""

import dataclasses
import json
import sys
from pathlib import Path

from looplm.corpus import json_line
from looplm.errors import DataError

FIELDS = ("prompt", "max_new_tokens", "seed", "id")
EXAMPLE = 'every line is an object such as {"prompt": "..."}; it may have max_new_tokens, seed and id'


@dataclasses.dataclass(frozen=True)
class Entry:
    """One prompt; None where its line says nothing."""

    where: str  # for errors: file and line
    prompt: str
    max_new_tokens: int | None = None
    seed: int | None = None
    id: str | int | None = None


def read_entries(source: str) -> list[Entry]:
    """The prompts of a text file, a .jsonl file, or standard input ("-", text).

    Raises: DataError that names the first line that is not a prompt.
    """
    name = "standard input" if source == "-" else source
    text = _decoded(_read(source), name)
    # Not splitlines(): a prompt may hold U+2028 and others that it would cut at.
    lines = [(f"{name} line {number}", line.removesuffix("\r")) for number, line in enumerate(text.split("\n"), 1)]
    if not lines[-1][1]:  # behind the last newline
        lines.pop()
    if not lines:
        raise DataError(f"{name} holds no prompts", "write one on each line")
    read = _entry if Path(source).suffix.lower() == ".jsonl" else _plain
    return [read(where, line) for where, line in lines]


def _read(source: str) -> bytes:
    if source == "-":
        return sys.stdin.buffer.read()
    try:
        return Path(source).read_bytes()
    except OSError as error:
        cure = "give a file with one prompt on each line, or - for standard input"
        raise DataError(f"cannot read {source}: {error.strerror or error}", cure) from error


def _decoded(raw: bytes, name: str) -> str:
    try:
        return raw.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        seen = f"{name} line {line} is not UTF-8: byte 0x{raw[error.start]:02x} at offset {error.start} of the file"
        raise DataError(seen, "convert it first, e.g. with iconv") from error


def _plain(where: str, line: str) -> Entry:
    if not line:
        raise DataError(f"{where} is empty", 'remove it; in a .jsonl file, {"prompt": ""} begins a new document')
    return Entry(where, line)


def _entry(where: str, line: str) -> Entry:
    value = json_line(line, where, EXAMPLE)
    if "prompt" not in value:
        raise DataError(f'{where} has no "prompt"', EXAMPLE)
    for key, found in value.items():
        _check(where, key, found)
    return Entry(where, **value)


def _check(where: str, key: str, value: object) -> None:
    if key not in FIELDS:
        raise DataError(f"{where}: {key!r} is not known", f"use {', '.join(FIELDS)}")
    number = isinstance(value, int) and not isinstance(value, bool)
    fits, wanted = {
        "prompt": (isinstance(value, str), "a text"),
        "max_new_tokens": (number and value >= 1, "a whole number, at least 1"),  # type: ignore[operator]
        "seed": (number and value >= 0, "a whole number, at least 0"),  # type: ignore[operator]
        "id": (number or isinstance(value, str), "a text or a whole number"),
    }[key]
    if not fits:
        raise DataError(f"{where}: {key} is {json.dumps(value)}", f"it has to be {wanted}")
    if isinstance(value, str) and not _whole(value):
        raise DataError(f"{where}: {key} holds half a surrogate pair, no character", "write the character itself")


def _whole(text: str) -> bool:
    """Escapes can spell half a surrogate pair, which no UTF-8 can hold."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
