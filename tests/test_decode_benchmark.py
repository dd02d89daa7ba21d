"""The benchmark of decoding: rounds paired as they were run, a limit over the weights' bytes, our side for real."""

import json
import pathlib
import sys

import pytest

from benchmarks import decode, our_decode
from benchmarks.side_by_side import DECODE_CONFIGS, LOOPS, Side
from looplm.stored import FORMATS

# A side of any kind: its rates depend on what it is told to be.
FAKE = """
import json, os, sys
from benchmarks.side_by_side import BenchmarkError, serve
said = " ".join(sys.argv)
kind = next((k for k in ("--read-bytes", "fp32", "bf16", "q8_0", "--format") if k in said), "")
if kind == "q8_0" and "missing" in said:
    raise SystemExit("No module named 'llama_cpp'")
if kind == "q8_0" and "amx" in said and "--no-repack" not in said:
    os.abort()
known = {"--read-bytes": [10.0] * 3, "fp32": [2.0] * 3, "bf16": [4.0, 5.0, 10.0], "q8_0": [5.0] * 3}
rates = iter(known.get(kind, [20.0] * 99))
prefill = {"fp32": 9.0, "bf16": 11.0} if kind == "--format" else 7.0
ready = {"weight_bytes": 77, "bytes_per_token": 200, "kernel_path": "streams", "prefill_tokens_per_s_per_pass": prefill}
assert kind != "--read-bytes" or "--read-bytes 77" in said
def answer():
    rate = next(rates)
    return {"tokens_per_s": rate, "gb_per_s": rate if kind == "--read-bytes" else 8.0, "peak_mib": 3.0}
serve(lambda: (ready, answer))
"""


def report(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str], *given: str) -> dict:  # type: ignore[type-arg]
    fake = tmp_path / "fake.py"
    fake.write_text(FAKE, encoding="utf-8")
    sides = [word for side in ("our-side", "torch-peer", "llama-peer") for word in (f"--{side}", str(fake))]
    assert decode.main(["--config", "test", "--format", "int8", "--rounds", "3", "--json", *sides, *given]) == 0
    return json.loads(capsys.readouterr().out)  # type: ignore[no-any-return]


def test_ratios_are_of_neighbouring_rounds(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = report(tmp_path, capsys, "--llama-python", sys.executable)
    assert found["share_of_bandwidth"] == {"median": 0.8, "min": 0.8, "max": 0.8}
    assert found["best_torch"] == "PyTorch bf16"
    assert found["ratio_torch"] == {"median": 4.0, "min": 2.0, "max": 5.0}
    assert found["ratio_llama_cpp"]["median"] == 4.0
    assert found["format"] == "int8"
    prefill = found["prefill_tokens_per_s_per_pass"]
    assert (prefill["ours, fp32"], prefill["ours, bf16"], prefill["PyTorch bf16"]) == (9.0, 11.0, 7.0)
    assert {"processor", "kernel_path", "tokens_per_s"} < found.keys()


def test_it_does_without_llama_cpp(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert report(tmp_path, capsys)["ratio_llama_cpp"] is None
    found = report(tmp_path, capsys, "--llama-python", sys.executable, "--dir", "missing")
    assert found["ratio_llama_cpp"] is None
    assert found["ratio_torch"] is not None


def test_a_llama_cpp_that_ends_is_tried_with_plain_weights(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def ran(*given: str) -> list[str]:
        found = report(tmp_path, capsys, "--llama-python", sys.executable, *given)
        assert found["ratio_llama_cpp"]["median"] == 4.0
        return [name for name in found["rivals"] if name.startswith("llama")]

    assert ran() == ["llama.cpp q8_0"]
    assert ran("--dir", "amx") == ["llama.cpp q8_0 --no-repack"]


@pytest.mark.parametrize("name", FORMATS)
def test_our_side_decodes_in_every_format(name: str) -> None:
    config = our_decode.model_config("test")
    weights = our_decode.random_weights(config, name)
    assert weights.bytes_per_token > 0
    formats = {matrix.format for tensor, matrix in weights.matrices.items() if ".layers." in tensor}
    assert formats == {name}


def test_our_side_answers_rounds() -> None:
    command = [sys.executable, "benchmarks/our_decode.py", "--config", "test", "--format", "int4", "--prompt", "5"]
    with Side("ours", [*command, "--round-seconds", "0.05"]) as side:
        assert side.ready["bytes_per_token"] > DECODE_CONFIGS["test"]["d"] * LOOPS
        answer = side.round()
    assert answer["tokens_per_s"] > 0
    with Side("reading", [*command, "--round-seconds", "0.05", "--read-bytes", "100000"]) as side:
        assert side.round()["gb_per_s"] > 0


def test_bad_input_is_refused() -> None:
    with pytest.raises(SystemExit):
        decode.main(["--rounds", "0"])
