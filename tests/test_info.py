"""`looplm info`: what a model folder holds, and what the machine offers."""

import json
import pathlib

import numpy as np
import pytest

from looplm.model_files import open_model
from looplm.safetensors_file import TensorFile
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
    assert report["memory"]["key_value_context"] == 32 * report["memory"]["key_value_per_token"]
    assert report["memory"]["weights"] == 4 * sum(sizes.values())
    assert report["trained_loops"] == 2
    assert {x["name"]: x["shape"] for x in report["tensors"]} == {n: list(v.shape) for n, v in weights.tensors.items()}
    assert {x["dtype"] for x in report["tensors"]} == {"BF16"}
    assert report["files"][0]["bytes"] == (tmp_path / "model.safetensors").stat().st_size
    code, output, _ = run_info(capsys, "-m", str(tmp_path))
    assert code == 0
    for shown in ("trained with 2", "a book.txt", "model.layers.*.self_attn.q_proj.weight", "8 x 6", "192 bytes"):
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
