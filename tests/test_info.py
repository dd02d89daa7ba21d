"""`looplm info`: what a model folder holds, what the machine offers, and what a training would take."""

import json
import pathlib

import numpy as np
import pytest

from looplm.model_files import open_model
from looplm.safetensors_file import TensorFile
from looplm.settings import run_config
from looplm.weights import parameter_count
from model_folders import (
    random_weights,
    save,
)


def run_info(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    from looplm_cli.app import main

    with pytest.raises(SystemExit) as left:
        main(["info", *arguments])
    output = capsys.readouterr()
    return int(left.value.code or 0), output.out, output.err


def test_info_describes_a_model(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights = random_weights()
    save(tmp_path, weights, provenance={"trained_loops": 2, "corpus": [{"source": "a book.txt"}]}, dtype="bfloat16")
    code, output, _ = run_info(capsys, "--model", str(tmp_path), "--json")
    report = json.loads(output.splitlines()[-1])
    sizes = {name: value.size for name, value in weights.tensors.items()}
    stack = sum(size for name, size in sizes.items() if ".layers." in name)
    assert code == 0
    assert report["parameters"]["total"] == sum(sizes.values())
    assert report["parameters"]["stack"] == stack
    assert report["parameters"]["embedding"] == report["parameters"]["head"] == 66
    assert report["parameters"]["unrolled"] == sum(sizes.values()) + 2 * stack
    assert report["memory"]["key_value_per_token"] == 3 * 2 * (2 + 2) * 2 * 4  # loops, layers, k and v heads, channels
    assert 2 * report["memory"]["key_value_per_token_bfloat16"] == report["memory"]["key_value_per_token"]
    by_policy = report["key_value_per_token"]
    assert [by_policy[name] for name in ("full", "exact", "last-exited")] == 3 * [192]
    assert [by_policy[name] for name in ("shared-last", "average", "first")] == 3 * [64]
    assert report["memory"]["key_value_context"] == 32 * report["memory"]["key_value_per_token"]
    assert report["memory"]["weights"] == 4 * sum(sizes.values())
    assert report["trained_loops"] == 2
    assert {x["name"]: x["shape"] for x in report["tensors"]} == {n: list(v.shape) for n, v in weights.tensors.items()}
    assert {x["dtype"] for x in report["tensors"]} == {"BF16"}
    assert report["files"][0]["bytes"] == (tmp_path / "model.safetensors").stat().st_size
    code, output, _ = run_info(capsys, "-m", str(tmp_path))
    assert code == 0
    for shown in (
        "trained with 2",
        "a book.txt",
        "model.layers.*.self_attn.q_proj.weight",
        "8 x 6",
        "192 bytes",
        "shared-last, average, first",
    ):
        assert shown in output


def test_info_describes_the_machine(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from looplm import __version__
    from looplm.kernels.jit import cache_folder

    monkeypatch.chdir(tmp_path)
    code, output, _ = run_info(capsys, "--json")
    report = json.loads(output.splitlines()[-1])
    assert code == 0
    assert report["looplm"] == __version__
    assert report["threads"] >= 1
    assert report["processor"]["features"]
    assert report["packages"]["numpy"] == np.__version__
    assert report["kernel_cache"] == cache_folder()
    assert report["latest_model"] is None
    save(tmp_path / "runs" / "x" / "model")
    code, output, _ = run_info(capsys)
    assert code == 0
    assert "runs/x/model" in output
    assert np.__version__ in output


def test_info_predicts_the_memory_of_a_training(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from looplm import memory
    from looplm.kernels.product.select import PATHS

    settings = ("--set", "train.seq_len=32", "--set", "model.num_hidden_layers=3", "--threads", "2")
    code, output, _ = run_info(capsys, "--train", "--preset", "tiny", *settings, "--json")
    report = json.loads(output.splitlines()[-1])
    assert code == 0
    config = run_config("tiny", {"train": {"seq_len": 32}, "model": {"num_hidden_layers": 3}})
    model = config.model_config(vocab_size=report["vocab_size"])
    assert report["parameters"] == parameter_count(model)
    assert (report["batch_size"], report["seq_len"], report["threads"], report["loops"]) == (16, 32, 2, 4)
    for mode, parts in report["parts"].items():
        expected = memory.predicted_peak(model, 16, 32, 2, mode, PATHS[report["kernels"]])
        assert parts | {"process": 0} == expected | {"process": 0}  # which may have grown since
        assert report["peak"][mode] == sum(parts.values())
    assert list(report["peak"]) == ["none", "loop", "layer"]
    assert report["available"] > report["peak"]["none"]
    assert (report["recompute"], report["auto"]) == ("auto", "none")

    peak = report["peak"]["layer"]
    for available, shown in ((None, "unknown"), (10 * peak, "GiB, of which"), (peak, "too large; lower")):
        monkeypatch.setattr(memory, "available_memory", lambda available=available: available)
        code, output, _ = run_info(capsys, "--train", "--preset", "tiny", *settings)
        assert code == 0
        assert shown in output
        assert "batches of 16 x 32" in output


@pytest.mark.parametrize(
    ("settings", "vocab_size"),
    [
        ((), 512),
        (("data.tokenizer=bytes",), 257),
        (("data.vocab_size=4000",), 4000),
        (("data.corpus=builtin:hops",), 11),
        (("data.corpus=builtin:hops", "model.vocab_size=99"), 99),
    ],
)
def test_info_takes_the_vocabulary_that_training_would(
    settings: tuple[str, ...], vocab_size: int, capsys: pytest.CaptureFixture[str]
) -> None:
    _, output, _ = run_info(capsys, "--train", *(f"--set={setting}" for setting in settings), "--json")
    assert json.loads(output.splitlines()[-1])["vocab_size"] == vocab_size


@pytest.mark.parametrize("arguments", [("--train", "-m", "x"), ("--preset", "tiny"), ("--threads", "2")])
def test_info_is_about_one_thing(arguments: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    code, output, error = run_info(capsys, *arguments)
    assert (code, output) == (2, "")
    assert "--train" in error
    assert len(error.splitlines()) == 2


def test_info_says_in_two_lines_what_is_wrong(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    (save(tmp_path) / "model.safetensors").write_bytes(b"short")
    code, output, error = run_info(capsys, "-m", str(tmp_path))
    assert (code, output) == (1, "")
    lines = error.splitlines()
    assert [line.split(":")[0] for line in lines] == ["error", "hint"]
    assert "model.safetensors is 5 bytes long" in lines[0]


def test_opening_reads_no_weights(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`info` works on headers, so a model larger than memory can be described."""
    save(tmp_path)
    monkeypatch.setattr(TensorFile, "stored", lambda file, name: pytest.fail(f"{name} was read"))
    assert open_model(tmp_path).warnings == []
