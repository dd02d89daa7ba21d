"""Corpora: what is read from files, folders, .jsonl, stdin and Python, and every way in which it can be wrong."""

import hashlib
import io
import json
import pathlib
import sys

import pytest

from looplm.corpus import BUILTINS, corpus_kind, read_corpus
from refusals import refused


def test_a_file_is_read_byte_for_byte(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes("\ufeffone\r\ntwo é\n".encode())
    corpus = read_corpus([str(path)])
    assert corpus.documents == ["one\r\ntwo é\n"]
    raw = path.read_bytes()
    assert corpus.origin == [{"source": str(path), "bytes": len(raw), "sha256": hashlib.sha256(raw).hexdigest()}]


def test_a_folder_is_read_in_order(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / ".hidden").mkdir()
    for name, content in {
        "z.txt": "last",
        "a.md": "first",
        "b/c.TXT": "second",
        "b/d.jsonl": '{"text": "third"}\n\n{"text": "fourth", "more": 1}\n',
        "empty.txt": "",
        "picture.png": "no",
        ".hidden/x.txt": "no",
    }.items():
        (tmp_path / name).write_text(content)
    corpus = read_corpus([str(tmp_path)])
    assert corpus.documents == ["first", "second", "third", "fourth", "last"]
    assert corpus.origin[0]["files"] == 5


def test_sources_are_joined(story, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("piped é".encode())))
    corpus = read_corpus(["-", story])
    assert corpus.documents == ["piped é", pathlib.Path(story).read_text()]
    assert [part["source"] for part in corpus.origin] == ["-", story]


def test_builtin_topics():
    corpus = read_corpus(["builtin:python-topics"])
    origin = corpus.origin[0]
    assert len(corpus.documents) > 50
    assert 300_000 < origin["bytes"] == sum(len(document.encode()) for document in corpus.documents)
    assert origin["sha256"] == hashlib.sha256("".join(corpus.documents).encode()).hexdigest()
    assert origin["python"] == ".".join(map(str, sys.version_info[:3]))
    assert read_corpus(["builtin:python-topics"]) == corpus


def test_builtin_topics_of_a_python_without_them(monkeypatch):
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    assert refused(read_corpus, ["builtin:python-topics"])[0] == "this Python comes without pydoc_data.topics"


def test_encodings(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes("café\n".encode("latin-1"))
    assert read_corpus([str(path)], "latin-1").documents == ["café\n"]
    assert read_corpus([str(path)], errors="replace").documents == ["caf\ufffd\n"]
    assert read_corpus([str(path)], errors="ignore").documents == ["caf\n"]
    path.write_bytes("café\n".encode("utf-16"))
    assert read_corpus([str(path)], "utf-16").documents == ["café\n"]


@pytest.mark.parametrize(
    ("content", "message", "hint"),
    [
        (b"", "is empty", "holds text"),
        (b" \n\t\n", "is empty", "holds text"),
        (b"abc\0def", "is binary: it holds NUL bytes", "--encoding utf-16"),
        (b"\x89PNG\r\n\x1a\n\0\0\0", "is binary: it holds NUL bytes", "give text"),
        ("abc".encode("utf-16"), "is binary: it holds NUL bytes", "--encoding utf-16"),
        (b"one\ntwo\ncaf\xe9\n", "is not utf-8: byte 0xe9 at offset 11 (line 3)", "--encoding latin-1"),
        (b"abc\xe6\xbc", "is not utf-8: byte 0xe6 at offset 3 (line 1)", "--errors replace"),
    ],
)
def test_files_that_are_no_text(tmp_path, content, message, hint):
    path = tmp_path / "a.txt"
    path.write_bytes(content)
    seen, cure = refused(read_corpus, [str(path)])
    assert seen == f"{path} {message}"
    assert hint in cure


@pytest.mark.parametrize("errors", ["replace", "ignore"])
def test_binary_is_refused_even_when_errors_are_not(tmp_path, errors):
    (tmp_path / "a.txt").write_bytes(b"\x89PNG\0\0\xff")
    assert "is binary" in refused(read_corpus, [str(tmp_path / "a.txt")], errors=errors)[0]


@pytest.mark.parametrize("encoding", ["utf-9", "hex", "undefined"])
def test_unknown_encoding(story, encoding):
    assert refused(read_corpus, [story], encoding)[0] == f"encoding {encoding!r} is not known"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("nonsense", "is not JSON: Expecting value at column 1"),
        ('{"text": "a"', "is not JSON: Expecting ',' delimiter at column 13"),
        ("[" * 100_000, "is not JSON: "),
        ("1" * 5000, "is not JSON: "),
        ("[1]", "is a JSON list, not an object"),
        ('{"question": "a", "answer": "b"}', 'has no "text" field, only question, answer'),
        ("{}", 'has no "text" field, only {}'),
        ('{"text": 3}', ': "text" is int, not a string'),
        ('{"text": null}', ': "text" is NoneType, not a string'),
        (r'{"text": "ab\ud800"}', ": U+D800 at character 2 is half a surrogate pair, no character"),
    ],
)
def test_jsonl_that_is_not(tmp_path, line, message):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "good"}\n\n' + line + "\n")
    seen, cure = refused(read_corpus, [str(path)])
    assert seen.startswith((f"{path} line 3 {message}", f"{path} line 3{message}"))
    assert '{"text": "..."}' in cure or "--errors replace" in cure


def test_jsonl_keeps_what_only_looks_like_a_line_end(tmp_path):
    path = tmp_path / "a.jsonl"
    documents = ["a\u2028b\x85c\x0bd", "e\nf", "\u0000"]
    path.write_text("\r\n".join(json.dumps({"text": d}, ensure_ascii=False) for d in documents), encoding="utf-8")
    assert read_corpus([str(path)]).documents == documents


def test_half_a_surrogate_pair_can_be_replaced(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(r'{"text": "ab\ud800c"}')
    assert read_corpus([str(path)], errors="replace").documents == ["ab?c"]
    (tmp_path / "b.txt").write_bytes(b"ab+2AA-c")
    assert "U+D800 at character 2" in refused(read_corpus, [str(tmp_path / "b.txt")], "utf-7")[0]


@pytest.mark.parametrize(
    ("source", "message", "hint"),
    [
        ("nope.txt", "nope.txt does not exist", "known: builtin:python-topics, builtin:hops"),
        ("hops", "hops does not exist", "did you mean builtin:hops?"),
        ("builtin:pyton-topics", "builtin:pyton-topics does not exist", "did you mean builtin:python-topics?"),
        ("builtin:x", "builtin:x does not exist", "known: builtin:python-topics, builtin:hops"),
        ("builtin:hops", "builtin:hops is a task, not a text", "builtin:python-topics"),
        ("x" * 5000, "File name too long", "check the name"),
    ],
)
def test_sources_that_are_not_there(source, message, hint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    seen, cure = refused(read_corpus, [source])
    assert message in seen
    assert hint in cure


def test_sources_that_cannot_be_read(tmp_path, monkeypatch):
    def denied(path):
        raise PermissionError(13, "Permission denied")

    (tmp_path / "a.txt").write_text("text")
    monkeypatch.setattr("pathlib.Path.read_bytes", denied)
    assert "a.txt: Permission denied" in refused(read_corpus, [str(tmp_path / "a.txt")])[0]


def test_empty_sources(tmp_path, monkeypatch):
    assert refused(read_corpus, [])[0] == "no corpus is given"
    assert refused(read_corpus, [str(tmp_path)])[0] == f"folder {tmp_path} holds no .txt, .md, .jsonl file"
    (tmp_path / "a.txt").write_text("\n")
    assert refused(read_corpus, [str(tmp_path)])[0] == f"{tmp_path} is empty"
    (tmp_path / "a.jsonl").write_text("\n")
    assert refused(read_corpus, [str(tmp_path / "a.jsonl")])[0] == f"{tmp_path / 'a.jsonl'} is empty"
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"")))
    assert refused(read_corpus, ["-"])[0] == "standard input is empty"


def test_kinds():
    assert corpus_kind(["a.txt", "builtin:python-topics"]) == "text"
    assert corpus_kind([]) == "text"
    assert corpus_kind(["builtin:hops"]) == "hops"
    assert "cannot be mixed" in refused(corpus_kind, ["builtin:hops", "a.txt"])[0]
    assert "does not exist" in refused(corpus_kind, ["a.txt", "builtin:hop"])[0]
    assert {builtin.kind for builtin in BUILTINS.values()} == {"text", "hops"}
