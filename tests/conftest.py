"""What several test files share.  Commands that tests start as processes of their own run this tree, as pytest does."""

import io
import os
import pathlib
import sys
from collections.abc import Callable

import pytest

ROOT = pathlib.Path(__file__).parents[1]
os.environ["PYTHONPATH"] = os.pathsep.join(str(ROOT / room) for room in (".", "cli", "reference", "fixtures"))


@pytest.fixture
def story(tmp_path: pathlib.Path) -> str:
    """A text file, large enough to train a tokenizer on."""
    line = "Once upon a time, 12 loops met.\nThey went round and round, and stopped when they had enough.\n\n"
    path = tmp_path / "story.txt"
    path.write_text(line * 60, encoding="utf-8")
    return str(path)


@pytest.fixture
def lines(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Call it with the lines that a command is to find on its standard input."""

    def put(*texts: str) -> None:
        raw = "".join(f"{text}\n" for text in texts).encode()
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(raw), encoding="utf-8"))

    return put
