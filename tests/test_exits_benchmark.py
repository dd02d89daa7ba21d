"""The benchmark of exits and drafts: what it computes from times, what it cannot measure, and that it runs."""

import argparse
import json
import pathlib
import sys
import types

import numpy as np
import pytest

from benchmarks import exits
from benchmarks.our_decode import model_config, random_weights
from benchmarks.side_by_side import BenchmarkError, report_errors
from tiny_models import text_run


class Told(exits.Bench):
    """A bench whose times are told: so much per token, so much per loop."""

    def __init__(self, fixed: float, per_loop: float, surcharge: float = 0.0, **given: object) -> None:
        args = argparse.Namespace(rounds=3, tokens=20, threads=1, **given)
        super().__init__(random_weights(model_config("test"), "float32"), [np.arange(1, 5)], args)
        self.fixed, self.per_loop, self.surcharge = fixed, per_loop, surcharge

    def traced(self, exits: list[int], policy: str = "last-exited") -> float:
        mixed = self.surcharge if len(set(exits)) > 1 else 0.0
        return (self.fixed + self.per_loop * float(np.mean(exits))) * (1.0 + mixed)


def test_the_time_model_is_linear_in_loops() -> None:
    found = exits.time_model_error(Told(2.0, 3.0))
    assert found["max"] == pytest.approx(0.0, abs=1e-12)
    assert (found["ms_per_loop"], found["fixed_ms"]) == (3000.0, 2000.0)
    assert exits.time_model_error(Told(2.0, 3.0, surcharge=0.25))["median"] == pytest.approx(0.2)


def test_speedups_are_of_two_loops_of_four() -> None:
    assert exits.speedup(Told(2.0, 3.0), "last-exited")["median"] == 14.0 / 8.0
    with pytest.raises(exits.NotMeasured, match="no cache policy 'none'"):
        exits.speedup(Told(2.0, 3.0), "none")


def test_exits_are_those_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[int]] = []
    bench = exits.Bench(
        random_weights(model_config("test"), "float32"),
        [np.arange(1, 5)],
        argparse.Namespace(tokens=6, threads=1, rounds=1),
    )
    real = bench.seconds

    def watched(tokens):  # type: ignore[no-untyped-def]
        kept = list(tokens)
        seen.append([token.loops_run for token in kept])
        return real(iter(kept))

    monkeypatch.setattr(bench, "seconds", watched)
    assert bench.traced([1, 2, 3, 2]) > 0
    assert seen == [[4, 4, 1, 2, 3, 2, 1, 2]]


def test_batches_are_measured_where_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Told(2.0, 3.0)
    monkeypatch.setitem(sys.modules, "benchmarks.batch_ratio", None)
    with pytest.raises(exits.NotMeasured, match="batch_ratio"):
        exits.batch16_ratio(bench)
    fake = types.ModuleType("benchmarks.batch_ratio")
    fake.measure = lambda weights, rounds, threads: {"ratio": {"median": 5.0}, "tokens_per_s": 1.0}  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "benchmarks.batch_ratio", fake)
    assert exits.batch16_ratio(bench) == {"median": 5.0, "tokens_per_s": 1.0}


def test_drafts_of_a_model(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = text_run(tmp_path / "run")
    given = ["--model", str(model), "--prompt", "It was", "--rounds", "2", "--tokens", "12", "--threads", "1", "--json"]
    assert (
        exits.main(
            [*given, "--draft-loops", "1", "--draft-loops", "9", "--draft-tokens", "2", "--draft-tokens", "flow"]
        )
        == 0
    )
    report = json.loads(capsys.readouterr().out)
    assert report["measure"] == "draft_speedup"
    assert [(one["draft_loops"], one["draft_tokens"]) for one in report["choices"]] == [(1, 2), (1, "flow")]
    assert report["median"] == max(one["median"] for one in report["choices"])
    assert all(0 < one["min"] <= one["median"] <= one["max"] for one in report["choices"])


def test_a_changed_text_ends_the_benchmark(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = iter([[1, 2], [1, 3]])
    monkeypatch.setattr(exits.Bench, "greedy", lambda *_: (1.0, next(texts)))
    with pytest.raises(BenchmarkError, match="changed the text"):
        exits.draft_speedup(Told(1.0, 1.0, draft_loops=[1], draft_tokens=[1]))


def test_it_runs_and_says_what_it_could_not_measure(capsys: pytest.CaptureFixture[str]) -> None:
    measures = [word for name in exits.MEASURES[:3] for word in ("--measure", name)]
    assert exits.main(["--config", "test", "--rounds", "1", "--tokens", "8", *measures]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("time_model_error, test in bfloat16, ")
    assert lines[1].startswith("speedup_last_exited, test in bfloat16, ")
    assert lines[2].startswith("speedup_exact, test in bfloat16, ")


def test_sixteen_texts_of_a_published_size_must_be_asked_for() -> None:
    assert "batch16_ratio" in exits.of_random_weights("small")
    assert exits.of_random_weights("ouro-1.4b") == ["time_model_error", "speedup_last_exited", "speedup_exact"]


def test_bad_input_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    for given in (["--rounds", "0"], ["--draft-tokens", "x"], ["--measure", "x"]):
        with pytest.raises(SystemExit):
            exits.main(given)
    assert report_errors(lambda: exits.main(["--model", "no-such-folder"])) == 1
    assert capsys.readouterr().err.splitlines()[-1].startswith("hint: ")
