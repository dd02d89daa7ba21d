"""The documents do what they say: every command runs, every snippet runs, every quoted source is the source.

A comment line before a block tells the test what the reader need not see:
    <!-- test adds: --steps 20 -->       appended to each command of the block, for what takes minutes
    <!-- test shows: loop 4; loss -->    texts that the block shows and the real output must show too
    <!-- test exits: 1 -->               the exit code of the block's commands; 0 where it is not said
    <!-- test json of: looplm eval -->   the block is JSON with the same keys as the last line this command prints
    <!-- test: run by .ci/run -->        set-up of a fresh machine, which only .ci/run can do
"""

import dataclasses
import importlib.util
import json
import os
import pathlib
import random
import re
import shlex
import shutil
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]
DOCUMENTS = [path.relative_to(ROOT).as_posix() for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))]
LANGUAGES = {"console", "python", "sh", "json", ""}
BLOCK = re.compile(
    r"(?P<comments>(?:^<!-- (?:test|source).*? -->\n)*)^```(?P<language>\w*)\n(?P<body>.*?)^```$", re.S | re.M
)
COMMENT = re.compile(r"^<!-- (test adds|test shows|test exits|test json of|test|source): (.*?) -->$", re.M)


@dataclasses.dataclass(frozen=True)
class Block:
    language: str
    body: str
    notes: dict[str, str]

    @property
    def commands(self) -> list[str]:
        """What stands behind `$ ` at the start or after an empty line, continued where a line ends in a backslash.

        Elsewhere a `$ ` belongs to the output: `looplm quickstart` shows commands.
        """
        return re.findall(r"(?:\A|\n\n)\$ ((?:.*\\\n)*.*)", self.body)

    @property
    def texts(self) -> list[str]:
        return [text.strip() for text in self.notes.get("test shows", "").split(";") if text.strip()]


def blocks(document: str) -> list[Block]:
    text = (ROOT / document).read_text(encoding="utf-8")
    return [Block(m["language"], m["body"], dict(COMMENT.findall(m["comments"]))) for m in BLOCK.finditer(text)]


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A folder as a reader has it after `looplm quickstart`, in seconds: one small run under runs/, and a text."""
    folder = tmp_path_factory.mktemp("reader")
    (folder / "bin").mkdir()
    (folder / "bin" / "looplm").write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -m looplm_cli "$@"\n')
    (folder / "bin" / "looplm").chmod(0o755)
    words = [a + b for a in ("lo", "ga", "mi", "te", "ra", "so", "ne") for b in ("op", "te", "nd", "st", "r", "x")]
    draw = random.Random(0)
    lines = (" ".join(draw.choices(words, k=12)).capitalize() + ". The fox loops.\n" for _ in range(1500))
    (folder / "corpus.txt").write_text("".join(lines), encoding="utf-8")
    run(folder, "looplm train corpus.txt --preset nano --steps 20 --set train.eval_every=20 --out-dir runs/first")
    return folder


def run(folder: pathlib.Path, command: str, expected: int = 0, also: int = subprocess.STDOUT) -> str:
    """Standard output of a shell command, and standard error with it, after checking its exit code."""
    environment = os.environ | {
        "PATH": f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}",
        "NO_COLOR": "1",
        "COLUMNS": "120",
    }
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", command],
        cwd=folder,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=also,
        text=True,
        timeout=300,
    )
    assert done.returncode == expected, f"$ {command}\n{done.stdout}{done.stderr or ''}"
    return done.stdout


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_command_runs_and_shows_what_the_page_shows(
    document: str, trained: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    folder = tmp_path / "reader"
    shutil.copytree(trained, folder)
    for block in blocks(document):
        if block.language == "console":
            output = ""
            for command in block.commands:
                added = block.notes.get("test adds", "")
                output += run(folder, f"{command} {added}", int(block.notes.get("test exits", "0")))
            for text in block.texts:
                assert text in block.body, f"{document} does not show {text!r}"
                assert text in output, f"{document} shows {text!r}, its command no longer does:\n{output}"
        elif block.language == "python" and "source" not in block.notes:
            (folder / "snippet.py").write_text(block.body, encoding="utf-8")
            run(folder, f"{shlex.quote(sys.executable)} snippet.py")
        elif block.language == "json":
            printed = run(folder, block.notes["test json of"], also=subprocess.PIPE)
            line = printed if printed.startswith("{\n") else printed.splitlines()[-1]
            assert differences(json.loads(block.body), json.loads(line)) == [], block.notes["test json of"]


def differences(shown: object, real: object, where: str = "") -> list[str]:
    """Where two JSON values differ in kind: other keys, or another type.  null and an empty list fit everything."""
    if isinstance(shown, dict) and isinstance(real, dict):
        extra = [f"{where}.{key} is shown but not there" for key in shown.keys() - real.keys()]
        lacking = [f"{where}.{key} is not shown" for key in real.keys() - shown.keys()]
        both = shown.keys() & real.keys()
        inner = [line for key in both for line in differences(shown[key], real[key], f"{where}.{key}")]
        return sorted(extra + lacking + inner)
    if isinstance(shown, list) and isinstance(real, list):
        pairs = enumerate(zip(shown, real, strict=False))
        return [line for number, pair in pairs for line in differences(*pair, f"{where}[{number}]")]
    kinds = {
        float if isinstance(value, int) and not isinstance(value, bool) else type(value) for value in (shown, real)
    }
    return [] if len(kinds - {type(None)}) < 2 else [f"{where} is {type(real).__name__}"]


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_block_is_of_a_kind_that_is_checked(document: str) -> None:
    for block in blocks(document):
        assert block.language in LANGUAGES
        if block.language == "console":
            assert block.commands
            assert block.body.startswith("$ ")
        else:
            assert not block.notes.keys() & {"test adds", "test shows", "test exits"}
        if block.language == "sh":
            assert block.notes == {"test": "run by .ci/run"}
        if block.language == "json":
            assert "test json of" in block.notes


def test_no_comment_for_the_test_is_lost() -> None:
    """A comment that stands before no block, or is misspelt, would silently ask for nothing."""
    for document in DOCUMENTS:
        text = (ROOT / document).read_text(encoding="utf-8")
        used = sum(len(COMMENT.findall(m["comments"])) for m in BLOCK.finditer(text))
        assert used == len(re.findall(r"<!-- (?:test|source)", text)), document


def test_the_set_up_commands_are_those_that_ci_runs() -> None:
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    setup = [line for b in blocks("README.md") if b.language == "sh" for line in b.body.splitlines()]
    assert len(setup) == 2
    assert f"\n{setup[1]}\n" in script
    assert all(part in setup[0] for part in ("-m venv", "pip install .", "looplm quickstart"))
    assert all(part in script for part in ("-m venv", "pip install", "looplm quickstart"))


def sync() -> object:
    spec = importlib.util.spec_from_file_location("sync", ROOT / "docs" / "sync.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_quoted_sources_are_the_sources() -> None:
    tool = sync()
    stale = [path.name for path in tool.documents() if tool.synced(path.read_text("utf-8")) != path.read_text("utf-8")]
    assert stale == [], "run python docs/sync.py"


def test_a_quoted_source_that_went_stale_is_rewritten() -> None:
    tool = sync()
    quoted = "<!-- source: looplm.errors.DataError -->\n```python\n{}```\n"
    right = quoted.format('class DataError(LoopLMError):\n    """Text, token ids or a tokenizer do not fit."""\n')
    assert tool.synced(quoted.format("class DataError: ...\n")) == right
    with pytest.raises(LookupError, match="no Nothing there"):
        tool.source("looplm.errors.Nothing")


def test_a_wrong_object_is_objected_to() -> None:
    real = {"loss": [1.5], "at": [{"q": 1, "exits": []}], "name": "x", "nothing": None}
    assert differences({"loss": [2], "at": [{"q": 0.5, "exits": [0.1]}], "name": "y", "nothing": 3}, real) == []
    wrong = {"loss": [], "at": [{"q": "a", "mean": 1}], "name": "y", "nothing": 0, "more": 1}
    told = [".at[0].exits is not shown", ".at[0].mean is shown but not there", ".at[0].q is int"]
    assert differences(wrong, real) == [*told, ".more is shown but not there"]


def test_a_wrong_page_is_objected_to(trained: pathlib.Path) -> None:
    with pytest.raises(AssertionError, match="no-such-command"):
        run(trained, "looplm no-such-command")
    console = "$ looplm a \\\n    b\nout\n$ not this\n\n$ looplm c\n"
    page = f"<!-- test adds: --x -->\n<!-- test shows: a; b c -->\n```console\n{console}```\n"
    found = BLOCK.search(page)
    block = Block(found["language"], found["body"], dict(COMMENT.findall(found["comments"])))
    assert block.commands == ["looplm a \\\n    b", "looplm c"]
    assert block.texts == ["a", "b c"]
    assert block.notes["test adds"] == "--x"
