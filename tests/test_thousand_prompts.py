"""The comparison of a thousand texts: it compares what it says, and what differs is named."""

import json
import sys

import numpy as np
import pytest

from benchmarks import side_by_side, thousand_prompts
from looplm.arrays import aligned_empty
from looplm.cache import KeyValueCache
from looplm.deferral import Deferral


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    words = ["thousand_prompts.py", "--tokens", "9", "--longest", "12", *map(str, arguments)]
    monkeypatch.setattr(sys, "argv", words)
    return side_by_side.report_errors(thousand_prompts.main)


def found(capsys: pytest.CaptureFixture[str]) -> dict[str, list[int]]:
    """What was compared, and the prompts that differ."""
    return {each["what"]: each["different"] for each in json.loads(capsys.readouterr().out)["found"]}


def test_texts_are_the_same_and_each_way_has_its_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "--prompts", 20, "--rows", 3) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines] == [
        "exact = full",
        "batch of 3 rows = alone, last-exited",
        "batch of 3 rows = alone, full",
    ]
    for line in lines:
        assert ": 20 prompts, " in line
        assert "tokens read after loops [1, 2, 3, 4, 5], " in line  # else there was nothing to get wrong
        assert line.endswith(": all the same to the bit")
    saved = [int(line.split("], ")[1].split(" %")[0]) for line in lines]
    assert saved[0] > 10
    assert saved[1] > 10
    assert saved[2] == 0


def test_a_wrong_deferral_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    real = Deferral._late
    monkeypatch.setattr(
        Deferral, "_late", lambda d, r: [each._replace(state=np.roll(each.state, 1)) for each in real(d, r)]
    )
    assert run(monkeypatch, "--prompts", 8, "--json") == 1
    exact, *batches = found(capsys).values()
    assert exact
    assert not any(batches)


def zeros(shape: tuple[int, ...]) -> np.ndarray:
    made = aligned_empty(shape)
    made.fill(0.0)
    return made


def test_a_wrong_batch_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("looplm.cache.aligned_empty", zeros)  # what was never written is always the same
    monkeypatch.setattr(KeyValueCache, "leave", lambda *_: None)
    assert run(monkeypatch, "--prompts", 12, "--json") == 1
    assert [bool(numbers) for numbers in found(capsys).values()] == [False, True, False]


def test_prompts_are_of_many_lengths_up_to_the_longest() -> None:
    prompts = thousand_prompts.prompts_for(thousand_prompts.SMALL, 1000, 128, 0)
    lengths = [prompt.size for prompt in prompts]
    assert (min(lengths), max(lengths)) == (1, 128)
    assert len(set(lengths)) > 80
    assert all(prompt.max() < thousand_prompts.SMALL.vocab_size for prompt in prompts)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prompts", "0"], "nothing would be compared"),
        (["--rows", "25"], "25 prompts cannot be in flight at once"),
        (["--model", "nowhere"], "nowhere does not exist"),
    ],
)
def test_what_cannot_be_compared_is_two_lines(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert run(monkeypatch, *arguments) == 1
    error, hint = capsys.readouterr().err.splitlines()
    assert error == f"error: {message}" or message in error
    assert hint.startswith("hint: ")
