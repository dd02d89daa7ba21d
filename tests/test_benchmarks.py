"""The benchmarks of training: rounds paired as they were run, and nothing timed that is not proved right.

PyTorch is not needed: scripts that speak the sides' protocol stand in for it.
"""

import json
import pathlib
import sys
from typing import Any

import pytest

import tiny_training
from benchmarks import our_side, product_limit, same_losses, scaling, train
from benchmarks.side_by_side import (
    CONFIGS,
    BenchmarkError,
    Side,
    gemm_flops_per_token,
    paired,
    processor_name,
    report_errors,
)
from looplm.kernels.jit import cache_folder
from looplm.kernels.product.panels import PanelProducts
from looplm.kernels.product.select import PATHS

# A side whose rounds' rates are given by the text after --variants, or else after --precision.
FAKE_SIDE = """
import argparse, json, sys
from benchmarks.side_by_side import serve
parser = argparse.ArgumentParser()
parser.add_argument("--variants")
parser.add_argument("--precision")
args, _ = parser.parse_known_args()
found = json.loads({found!r})[args.variants or args.precision]
rates = iter(found.pop("rates"))
def answer():
    print("a line that is no answer", flush=True)
    return {{"tokens_per_s": next(rates), "peak_mib": found["peak_mib"]}}
serve(lambda: (found, answer))
"""


def fake(path: pathlib.Path, **sides: Any) -> pathlib.Path:
    """A script that is one of several sides: what it says when ready, and its rates round by round."""
    path.write_text(FAKE_SIDE.format(found=json.dumps(sides)), encoding="utf-8")
    return path


def ours(rates: list[float], precision: str = "fp32", compiled: bool = False) -> dict[str, Any]:
    return {
        "rates": rates,
        "peak_mib": 30.0,
        "kernel_path": "blas",
        "precision": precision,
        "compiled": compiled,
    }


def theirs(rates: list[float], peak_mib: float = 60.0) -> dict[str, Any]:
    return {"rates": rates, "peak_mib": peak_mib, "torch": "0"}


@pytest.fixture
def report(monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> Any:
    """Run benchmarks/train.py between fakes; gives the object it prints."""

    def run(our_sides: dict[str, Any], peers: dict[str, Any], rounds: int) -> dict[str, Any]:
        monkeypatch.setattr(train, "OUR_SIDE", fake(tmp_path / "ours.py", **our_sides))
        monkeypatch.setattr(train, "candidates", lambda: ["blas"])
        peer = fake(tmp_path / "peer.py", **peers)
        given = ["--config", "test", "--json", "--rounds", str(rounds), "--variants", ",".join(peers)]
        assert train.main([*given, "--peer", str(peer)]) == 0
        return json.loads(capsys.readouterr().out)

    return run


# ---- sides


def test_a_side_that_ends_is_told_by_its_last_words(tmp_path: pathlib.Path) -> None:
    script = tmp_path / "side.py"
    script.write_text("import sys\nsys.exit('out of luck')\n", encoding="utf-8")
    with pytest.raises(BenchmarkError, match="rival ended: out of luck"):
        Side("rival", [sys.executable, str(script)])


def test_a_side_that_ends_between_rounds_is_told_too(tmp_path: pathlib.Path) -> None:
    side = Side("rival", [sys.executable, str(fake(tmp_path / "side.py", x=theirs([5.0]))), "--variants", "x"])
    with side:
        assert side.round()["tokens_per_s"] == 5.0
        with pytest.raises(BenchmarkError, match="rival ended: StopIteration"):
            side.round()


def test_missing_pytorch_is_said_in_two_lines(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    script = tmp_path / "side.py"
    script.write_text("raise ModuleNotFoundError(\"No module named 'torch'\")\n", encoding="utf-8")
    assert report_errors(lambda: bool(Side("PyTorch eager", [sys.executable, str(script)]))) == 1
    error, hint = capsys.readouterr().err.splitlines()
    assert error == "error: PyTorch eager ended: ModuleNotFoundError: No module named 'torch'"
    assert "pip install torch==2.13.0" in hint
    with pytest.raises(BenchmarkError, match="cannot be run") as caught:
        Side("PyTorch eager", [str(tmp_path / "python-that-is-not-there")])
    assert "pip install torch==2.13.0" in caught.value.hint


def test_flops_per_token_by_hand() -> None:
    # a layer: 2 (4 d d + 3 d ff) and 4 d keys for S/2 keys; the head 2 d vocab; three passes, R loops
    layer = 2 * (4 * 9 + 3 * 3 * 5) + 4 * 3 * 4
    assert gemm_flops_per_token(d=3, L=2, heads=1, ff=5, vocab=7, S=8, B=9, R=2) == 3 * 2 * (2 * layer + 2 * 3 * 7)


def test_the_processor_has_a_name() -> None:
    assert processor_name()


# ---- benchmarks/train.py


def test_ratios_are_those_of_rounds_that_followed_each_other(report: Any) -> None:
    found = report({"auto": ours([100.0, 10.0, 30.0])}, {"eager": theirs([50.0, 4.0, 24.0])}, rounds=3)
    # medians of each side by itself would give 30 / 24 = 1.25
    assert found["ratio_best"] == {"median": 2.0, "min": 1.25, "max": 2.5}
    assert found["ratio_fp32"] == found["variants"]["eager"]["ratio"] == found["ratio_best"]
    assert found["tokens_per_s"] == {"median": 30.0, "min": 10.0, "max": 100.0}
    assert found["peak_mib_ratio"] == {"median": 0.5, "min": 0.5, "max": 0.5}


def test_each_variant_is_compared_with_our_round_before_it(report: Any) -> None:
    peers = {"eager": theirs([10.0, 10.0]), "eager+bf16": theirs([10.0, 40.0], peak_mib=1.0)}
    found = report({"auto": ours([10.0, 20.0, 30.0, 40.0])}, peers, rounds=2)
    assert found["variants"]["eager"]["ratio"] == {"median": 2.0, "min": 1.0, "max": 3.0}
    assert found["variants"]["eager+bf16"]["ratio"] == {"median": 1.5, "min": 1.0, "max": 2.0}
    assert (found["best_variant"], found["best_fp32_variant"]) == ("eager+bf16", "eager")
    assert found["ratio_best"]["median"] == 1.5
    assert found["ratio_fp32"]["median"] == 2.0
    assert found["peak_mib_ratio"]["median"] == 0.5  # to eager, not to the best


def test_in_float32_our_float32_is_compared(report: Any) -> None:
    sides = {"auto": ours([80.0, 80.0], precision="bf16"), "fp32": ours([20.0])}
    found = report(sides, {"eager": theirs([10.0]), "eager+bf16": theirs([40.0])}, rounds=1)
    assert found["precision"] == "bf16"
    assert found["ratio_best"]["median"] == 2.0
    assert found["ratio_fp32"]["median"] == 2.0
    assert found["variants"]["eager"]["ratio"]["median"] == 8.0


def test_the_report_has_its_fields(report: Any) -> None:
    found = report({"auto": ours([2.0])}, {"eager+bf16": theirs([1.0])}, rounds=1)
    spreads = {"tokens_per_s", "ratio_best", "share_of_limit", "limit_gflops"}
    assert spreads | {"config", "processor", "kernel_path", "ratio_fp32", "peak_mib_ratio"} <= found.keys()
    assert all(found[name].keys() == {"median", "min", "max"} for name in spreads)
    assert (found["config"], found["kernel_path"], found["processor"]) == ("test", "blas", processor_name())
    # neither float32 nor eager was run
    assert found["ratio_fp32"] is found["share_of_limit_fp32"] is found["peak_mib_ratio"] is None


def test_a_share_is_that_of_the_limit_in_the_same_round() -> None:
    rounds = train.Rounds(
        limit=[10.0, 100.0, 40.0],
        ours={"eager": [4.0, 70.0], "eager+bf16": [6.0, 90.0, 20.0]},
        ours_fp32={"eager": [2.0, 30.0]},
        theirs={"eager": [1.0, 1.0], "eager+bf16": [1.0, 1.0, 1.0]},
        peak_mib={"ours": [1.0, 2.0, 2.0], "eager": [4.0, 4.0, 4.0]},
    )
    found = train.conclusions(rounds, flops=1e9)
    assert found["share_of_limit"] == {"median": 0.5, "min": 0.5, "max": 0.8}
    assert found["share_of_limit_fp32"] == {"median": 0.25, "min": 0.2, "max": 0.3}
    assert found["peak_mib_ratio"]["median"] == 0.5  # the most that either had in the end


def test_a_hopeless_variant_has_one_round(report: Any) -> None:
    peers = {"eager": theirs([10.0, 10.0]), "eager+bf16": theirs([1.9])}
    found = report({"auto": ours([20.0, 19.0, 30.0])}, peers, rounds=2)
    assert (found["variants"]["eager"]["rounds"], found["variants"]["eager+bf16"]["rounds"]) == (2, 1)
    assert found["variants"]["eager+bf16"]["ratio"]["median"] == 10.0
    assert found["ratio_best"] == {"median": 2.5, "min": 2.0, "max": 3.0}


def test_a_table_shows_the_same(report: Any, capsys: pytest.CaptureFixture[str]) -> None:
    found = report({"auto": ours([30.0])}, {"eager": theirs([20.0])}, rounds=1)
    train.show(found)
    lines = capsys.readouterr().out.splitlines()
    assert any(line.split()[:4] == ["ours", "/", "eager", "1.50"] for line in lines)


def test_a_side_that_had_to_compile_is_started_again(monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> None:
    mark, path = tmp_path / "compiled", fake(tmp_path / "ours.py", auto=ours([1.0]))
    path.write_text(
        path.read_text(encoding="utf-8").replace(
            "rates = iter",
            f"import pathlib; mark = pathlib.Path({str(mark)!r})\n"
            "found['compiled'] = not mark.exists(); mark.touch()\nrates = iter",
        ),
        encoding="utf-8",
    )
    monkeypatch.setattr(train, "OUR_SIDE", path)
    with train.our_side("test", train.arguments([]), "auto") as side:
        assert mark.exists()
        assert side.ready["compiled"] is False


BROKEN = """
from looplm import kernels
right = kernels.embedding_forward
def embedding_forward(input_ids, weight):
    (y,) = right(input_ids, weight)
    return (y * 1.001,)
kernels.embedding_forward = embedding_forward
from benchmarks import our_side
our_side.main()
"""


def test_a_broken_kernel_stops_the_benchmark(monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> None:
    path = tmp_path / "broken.py"
    path.write_text(BROKEN, encoding="utf-8")
    monkeypatch.setattr(train, "OUR_SIDE", path)
    peer = fake(tmp_path / "peer.py", eager=theirs([1.0]))
    with pytest.raises(BenchmarkError, match=r"nothing is timed: embedding_forward.*\.y is off by 0\.001"):
        train.main(["--config", "test", "--variants", "eager", "--peer", str(peer)])


def test_our_side_proves_itself_and_answers() -> None:
    command = [sys.executable, our_side.__file__, "--config", "test", "--round-seconds", "0.01", "--time-attention"]
    with Side("ours", command) as side:
        assert side.ready.keys() == {"kernel_path", "precision", "compiled"}
        answer = side.round()
    assert answer["tokens_per_s"] > 0.0
    assert answer["peak_mib"] > 10.0
    assert 0.0 < answer["attention_s_per_token"] < 1.0


def test_products_are_proved_at_the_sizes_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    config = our_side.model_config(CONFIGS["test"])
    for path in PATHS.values():
        our_side.require_products(path, config)

    def careless(self: Any, dx: Any, dy: Any, weight: Any) -> None:
        right(self, dx, dy, weight)
        dx[-1, -1] = 0.0

    right = PanelProducts.dx_into
    monkeypatch.setattr(PanelProducts, "dx_into", careless)
    with pytest.raises(BenchmarkError, match="nothing is timed: dx_into of panels is off by"):
        our_side.require_products(PATHS["panels"], config)


def test_precision_and_kernels_are_passed_on(tmp_path: pathlib.Path) -> None:
    chosen = our_side.train_config(1, "fp32", "panels")
    assert (chosen.precision, chosen.kernels) == ("fp32", "panels")
    args = train.arguments(["--precision", "fp32", "--kernels", "panels"])
    told = tmp_path / "told"
    script = tmp_path / "ours.py"
    script.write_text(
        "import pathlib, sys\nfrom benchmarks.side_by_side import serve\n"
        f"pathlib.Path({str(told)!r}).write_text(' '.join(sys.argv[1:]))\n"
        "serve(lambda: ({'compiled': False}, dict))\n",
        encoding="utf-8",
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "OUR_SIDE", script)
        train.our_side("tiny", args, args.precision).close()
    assert told.read_text(encoding="utf-8") == (
        "--config tiny --threads 2 --round-seconds 2.0 --precision fp32 --kernels panels"
    )


def test_settings_that_cannot_be_are_said() -> None:
    command = [sys.executable, our_side.__file__, "--config", "test", "--precision", "fp8"]
    with pytest.raises(BenchmarkError, match=r"ours: train\.precision='fp8' is not known"):
        Side("ours", command)


@pytest.mark.parametrize("name", product_limit.candidates())
def test_every_way_to_multiply_can_be_timed(name: str) -> None:
    assert product_limit.best_rate(name, 32, threads=2) > 0.0


# ---- benchmarks/same_losses.py

SAME_START = """
import json, sys
import numpy as np
from benchmarks.our_side import RandomBatches, model_config, train_config
from benchmarks.side_by_side import serve
from looplm.training import Trainer
from looplm.weights import Weights
start = dict(np.load(sys.argv[1]))
sizes, batches = json.loads(str(start.pop("sizes"))), start.pop("batches")
weights = Weights.from_tensors(model_config(sizes), start).copy()
trainer = Trainer(weights, RandomBatches(batches), train_config(1, "fp32", ""))
losses = [trainer.step().objective for _ in range(int(sys.argv[3]))]
losses[2] *= 1.0 + {off}
serve(lambda: ({{}}, lambda: {{"losses": losses}}))
"""


@pytest.mark.parametrize(("off", "code"), [(0.9e-4, 0), (1.1e-4, 1)])
def test_losses_are_the_same_within_a_ten_thousandth(
    off: float, code: int, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    peer = tmp_path / "peer.py"
    peer.write_text(SAME_START.format(off=off), encoding="utf-8")
    given = ["--config", "test", "--steps", "4", "--threads", "1", "--json", "--peer", str(peer)]
    assert same_losses.main(given) == code
    found = json.loads(capsys.readouterr().out)
    assert found["pass"] is (code == 0)
    assert found["step"] == 3
    assert found["max_relative_difference"] == pytest.approx(off, rel=1e-2)


def test_a_loss_that_is_no_number_differs() -> None:
    assert same_losses.relative_difference([1.0, float("nan")], [1.0, 1.0]) == [0.0, float("inf")]


# ---- benchmarks/scaling.py


def test_threads_are_compared_by_turns(monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> None:
    script = fake(tmp_path / "side.py", **{"1 threads": ours([10.0, 1.0, 4.0]), "2 threads": ours([20.0, 1.5, 4.0])})

    def our_fake(name: str, config: str, *more: str) -> Side:
        assert more[:2] == ("--threads", name[0])
        return Side(name, [sys.executable, str(script), "--variants", name])

    monkeypatch.setattr(scaling, "our_side", our_fake)
    found = scaling.threads("test", scaling.arguments(["--rounds", "3"]))
    assert found["two_to_one"] == {"median": 1.5, "min": 1.0, "max": 2.0}


def test_attention_is_taken_out_of_the_cost_of_length() -> None:
    short = [{"tokens_per_s": 1e6, "attention_s_per_token": 0.2e-6}]
    long = [{"tokens_per_s": 0.5e6, "attention_s_per_token": 1.2e-6}]
    found = scaling.length_ratios(short, long)
    assert found["with_attention"]["long_to_short"]["median"] == pytest.approx(2.0)
    assert found["without_attention"]["long_to_short"]["median"] == pytest.approx(1.0)
    assert [name for name, _ in scaling.flat(found)][2] == "with attention: long to short"


def test_lengths_keep_the_tokens_of_a_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, list[str]] = {}

    def by_turns(commands: dict[str, list[str]], config: str, rounds: int) -> dict[str, Any]:
        asked.update(commands)
        return {name: [{"tokens_per_s": 1.0, "attention_s_per_token": 0.0}] for name in commands}

    monkeypatch.setattr(scaling, "by_turns", by_turns)
    scaling.length("test", scaling.arguments([]))
    shapes = [(int(each[each.index("--S") + 1]), int(each[each.index("--B") + 1])) for each in asked.values()]
    assert shapes == [(128, 16), (1024, 2)]


def test_the_first_step_is_awaited(story: str, tmp_path: pathlib.Path) -> None:
    cache = pathlib.Path(cache_folder() or tmp_path).parents[1]  # what this process compiled
    assert 0.0 < scaling.first_step(tmp_path / "run", cache, [story, *tiny_training.ARGUMENTS]) < 600.0
    assert scaling.has_step(tmp_path / "run" / "log.jsonl")
    with pytest.raises(BenchmarkError, match="took no step") as caught:
        scaling.first_step(tmp_path / "other", cache, [str(tmp_path / "nothing.txt")])
    assert "nothing.txt" in caught.value.hint


def test_a_step_counts_once_it_is_written_whole(tmp_path: pathlib.Path) -> None:
    log = tmp_path / "log.jsonl"
    assert not scaling.has_step(log)
    log.write_text('{"kind": "eval"}\n{"kind": "step", "step": 1}', encoding="utf-8")
    assert not scaling.has_step(log)
    log.write_text('{"kind": "eval"}\n{"kind": "step", "step": 1}\n', encoding="utf-8")
    assert scaling.has_step(log)


def test_pairs_must_be_complete() -> None:
    with pytest.raises(ValueError, match="zip"):
        paired([1.0, 2.0], [1.0])
