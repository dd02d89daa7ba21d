"""The benchmark of batches: rounds paired as they were run, prompts not timed, both sides for real."""

import json
import sys
import time
from collections.abc import Iterator

import pytest

from benchmarks import batch_ratio, our_decode
from looplm.generation import Generated


def test_both_sides_run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(
        sys, "argv", ["batch_ratio.py", "--config", "test", "--rows", "3", "--rounds", "2", "--tokens", "4"]
    )
    assert batch_ratio.main() == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["rows"], found["format"]) == (3, "float32")
    for key in ("ratio", "tokens_per_s", "tokens_per_s_of_one"):
        assert 0 < found[key]["min"] <= found[key]["median"] <= found[key]["max"]


def test_ratios_are_of_neighbouring_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    rates = iter([1.0, 1.0, 10.0, 30.0, 5.0, 25.0, 20.0, 20.0])  # the first round is not counted
    monkeypatch.setattr(batch_ratio, "rate", lambda tokens, untimed: next(rates))
    monkeypatch.setattr(batch_ratio, "model_config", lambda name: our_decode.model_config("test"))
    assert batch_ratio.batch16_ratio(rounds=3) == {"median": 3.0, "min": 1.0, "max": 5.0}


def test_prompts_are_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])

    def tokens() -> Iterator[Generated]:
        for seconds in (100.0, 100.0, 2.0, 2.0):
            now[0] += seconds
            yield Generated(0, 0, 1, -1.0)

    assert batch_ratio.rate(tokens(), 2) == 0.5
