"""Where text comes from: files, folders, .jsonl, standard input and texts that need no download.

What can be wrong with a user's files is found here and said in two lines.  Bytes are kept as they are (no newline
translation), except that a byte order mark goes.  A corpus is read into memory whole.
"""

import dataclasses
import difflib
import hashlib
import json
import os
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

from .errors import DataError


@dataclasses.dataclass(frozen=True)
class Builtin:
    """Something to train on that needs no file."""

    kind: str  # "text", or the name of a task in looplm/tasks
    caption: str


BUILTINS = {
    "builtin:python-topics": Builtin("text", "the language reference in CPython's own pydoc_data.topics"),
    "builtin:hops": Builtin("hops", "p-hop induction, generated from the seed"),
}
SUFFIXES = (".txt", ".md", ".jsonl")
KNOWN = f"known: {', '.join(BUILTINS)}"


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Documents, and where they came from: one {source, bytes, sha256, ...} per source."""

    documents: list[str]
    origin: list[dict[str, Any]]


def corpus_kind(sources: Sequence[str]) -> str:
    """Say whether the sources are "text", or which task they name.

    Raises: DataError for an unknown builtin, or a task together with anything else.
    """
    kinds = [_builtin(source).kind for source in sources if source.startswith("builtin:")]
    task = next((kind for kind in kinds if kind != "text"), None)
    if task is not None and len(sources) > 1:
        raise DataError(
            f"builtin:{task} is a task and cannot be mixed with other sources", f"give builtin:{task} alone"
        )
    return task or "text"


def read_corpus(sources: Sequence[str], encoding: str = "utf-8", errors: str = "strict") -> Corpus:
    """Read files, folders (.txt, .md, .jsonl below them), .jsonl with a "text" field, "-" and builtin texts.

    A file is one document; so is each line of a .jsonl.

    Raises: DataError for a source that is missing, unreadable, empty, binary, not in the encoding, or not such JSON.
    """
    if not sources:
        raise DataError("no corpus is given", f"name a text file or a folder; {KNOWN}")
    if corpus_kind(sources) != "text":
        raise DataError(f"{sources[0]} is a task, not a text", "give a file, a folder, or builtin:python-topics")
    documents: list[str] = []
    origin = []
    for source in sources:
        found, contents, more = _read_source(source, encoding, errors)
        if not any(document.strip() for document in found):
            raise DataError(f"{_shown(source)} is empty", "give a source that holds text")
        documents += [document for document in found if document]
        digest = hashlib.sha256()
        for content in contents:
            digest.update(content)
        size = sum(map(len, contents))
        origin.append({"source": source, "bytes": size, "sha256": digest.hexdigest()} | more)
    return Corpus(documents, origin)


def split(corpus: Corpus, val_fraction: float) -> tuple[list[str], list[str]]:
    """Cut the documents, laid end to end, at a character: what is trained on, and the last part, which is held out.

    At least 64 characters are held out (of a smaller text a half), so that a tiny share of a tiny text is not nothing.
    """
    total = sum(map(len, corpus.documents))
    left = total - max(int(total * val_fraction), min(64, total // 2))
    train: list[str] = []
    val: list[str] = []
    for document in corpus.documents:
        head, tail = document[:left], document[left:]
        train += [head] if head else []
        val += [tail] if tail else []
        left -= len(head)
    return train, val


def _builtin(source: str) -> Builtin:
    if source not in BUILTINS:
        raise DataError(f"{source} does not exist", _similar(source) or KNOWN)
    return BUILTINS[source]


def _similar(source: str) -> str:
    """A question that names the builtin one may have meant, or nothing."""
    names = [name.removeprefix("builtin:") for name in BUILTINS]
    near = difflib.get_close_matches(source.removeprefix("builtin:"), names, 1)
    return f"did you mean builtin:{near[0]}? {KNOWN}" if near else ""


def _shown(source: str) -> str:
    return "standard input" if source == "-" else source


def _read_source(source: str, encoding: str, errors: str) -> tuple[list[str], list[bytes], dict[str, Any]]:
    """Documents, the bytes they were read from, and what else to record of the origin."""
    if source.startswith("builtin:"):
        documents = _python_topics()
        return documents, [document.encode() for document in documents], {"python": sys.version.split()[0]}
    if source == "-":
        raw = sys.stdin.buffer.read()
        return [_decode(raw, _shown(source), encoding, errors)], [raw], {}
    path = pathlib.Path(source)
    if not os.path.isdir(path):  # unlike Path.is_dir, says False to a name too long to be one
        raw = _read_file(path)
        return _documents(raw, path, encoding, errors), [raw], {}
    files = sorted(
        file
        for file in path.rglob("*")
        if file.suffix.lower() in SUFFIXES
        and file.is_file()
        and not any(part.startswith(".") for part in file.relative_to(path).parts)
    )
    if not files:
        raise DataError(f"folder {source} holds no {', '.join(SUFFIXES)} file", "name the files one by one")
    contents = [_read_file(file) for file in files]
    pairs = zip(files, contents, strict=True)
    documents = [document for file, raw in pairs for document in _documents(raw, file, encoding, errors)]
    return documents, contents, {"files": len(files)}


def _python_topics() -> list[str]:
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise DataError("this Python comes without pydoc_data.topics", "name a text file or a folder") from error
    return [topics[name] for name in sorted(topics)]


def _read_file(path: pathlib.Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError as error:
        hint = _similar(str(path)) or f"give a text file, a folder, or - for standard input; {KNOWN}"
        raise DataError(f"{path} does not exist", hint) from error
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}", "check the name and its permissions") from error


def _documents(raw: bytes, path: pathlib.Path, encoding: str, errors: str) -> list[str]:
    text = _decode(raw, str(path), encoding, errors)
    if path.suffix.lower() != ".jsonl":
        return [text]
    # Not splitlines(): a JSON string may hold U+2028 and others that it would cut at.
    lines = enumerate(text.split("\n"), 1)
    return [_text_field(line, f"{path} line {number}", errors) for number, line in lines if line.strip()]


def json_line(line: str, where: str, cure: str) -> dict[str, Any]:
    """The object on a line of a .jsonl file.  Raises: DataError, with `cure` as its hint, if there is none."""
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        seen = f"{error.msg} at column {error.colno}" if isinstance(error, json.JSONDecodeError) else str(error)
        raise DataError(f"{where} is not JSON: {seen}", cure) from error
    if not isinstance(value, dict):
        raise DataError(f"{where} is a JSON {type(value).__name__}, not an object", cure)
    return value


def _text_field(line: str, where: str, errors: str) -> str:
    cure = 'every line is an object such as {"text": "..."}'
    value = json_line(line, where, cure)
    if "text" not in value:
        raise DataError(f'{where} has no "text" field, only {", ".join(value) or "{}"}', cure)
    if not isinstance(value["text"], str):
        raise DataError(f'{where}: "text" is {type(value["text"]).__name__}, not a string', cure)
    return _whole_characters(value["text"], where, errors)


def _decode(raw: bytes, where: str, encoding: str, errors: str) -> str:
    binary = DataError(f"{where} is binary: it holds NUL bytes", "give text; UTF-16 needs --encoding utf-16")
    try:
        text = raw.decode(encoding, errors)
    except UnicodeDecodeError as error:
        if b"\0" in raw:
            raise binary from error
        line = raw.count(b"\n", 0, error.start) + 1
        raise DataError(
            f"{where} is not {encoding}: byte 0x{raw[error.start]:02x} at offset {error.start} (line {line})",
            "name its encoding, e.g. --encoding latin-1, or use --errors replace",
        ) from error
    except (LookupError, UnicodeError) as error:
        raise DataError(f"encoding {encoding!r} is not known", "use e.g. utf-8, utf-16, latin-1, cp1252") from error
    if "\0" in text:
        raise binary
    return _whole_characters(text.removeprefix("\ufeff"), where, errors)


def _whole_characters(text: str, where: str, errors: str) -> str:
    """Escapes (JSON's, UTF-7's) can spell half a surrogate pair, which no UTF-8 can hold."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        if errors == "strict":
            seen = f"U+{ord(text[error.start]):04X} at character {error.start}"
            raise DataError(
                f"{where}: {seen} is half a surrogate pair, no character", "use --errors replace"
            ) from error
        return text.encode(errors=errors).decode()
    return text
