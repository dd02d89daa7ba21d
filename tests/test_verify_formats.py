"""`looplm verify` on models of every storage format: what passes, and which mistake is named where."""

import dataclasses
import json
import pathlib
import shutil
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from in_process import looplm, report_of
from looplm.config import model_config_from_json
from looplm.conversion import quantize_folder
from looplm.model_files import ModelFiles, open_model
from looplm.quantization import FORMATS as INTEGERS
from looplm.quantization import Quantized
from looplm.safetensors_file import TensorFile
from looplm.stored import FORMATS, Format, StoredMatrix, StoredWeights, read_stored
from looplm.weights import Weights
from looplm_cli import stored_verification
from looplm_reference import fixture as fixtures
from looplm_reference.judge import random_tensors
from looplm_reference.quantized_judge import MODEL
from model_folders import save
from stored_models import wrong

CHANGED = "model.layers.1.mlp.down_proj.weight"
IDS = np.random.default_rng(1).integers(0, MODEL["vocab_size"], (2, 6))
every_format = pytest.mark.parametrize("name", FORMATS)


def model_in(name: Format, folder: pathlib.Path) -> pathlib.Path:
    """A model folder in a format; its rows are several groups long."""
    tensors = {key: np.asarray(value, np.float32) for key, value in random_tensors(MODEL).items()}
    weights = Weights.from_tensors(model_config_from_json(MODEL, "the judge's model"), tensors)
    if name in INTEGERS:
        return quantize_folder(open_model(save(folder.with_name("floats"), weights, tokenizer_json=None)), folder, name)
    return save(folder, weights, tokenizer_json=None, dtype=name)


def fixture_in(name: Format, folder: pathlib.Path, input_ids: np.ndarray = IDS) -> pathlib.Path:
    """A fixture of such a model, with what every layer computes in the first loop."""
    model_in(name, folder / "model")
    found = fixtures.of_model(folder / "model", input_ids)
    kept = {name: value for name, value in found.expected.items() if not name.startswith("tap/loop")}
    taps = {name: value for name, value in found.expected.items() if name.startswith("tap/loop1.")}
    np.savez(folder / "expected.npz", **kept, **taps)
    return folder


# ---- right


@every_format
def test_a_model_alone_is_judged_by_the_reference(name: Format, tmp_path: pathlib.Path) -> None:
    report = report_of("verify", model_in(name, tmp_path / "model"))["folders"][0]
    assert report["ok"] is True
    rows = {row["name"]: row for row in report["rows"]}
    loops = range(1, MODEL["total_ut_steps"] + 1)
    stored = [f"as stored ({name}).loop{r}.{what}" for r in loops for what in ("hidden", "logits")]
    assert [row for row in rows if row.startswith("as stored")] == stored
    assert {f"loop{r}.layer2.mlp_out" for r in loops} | {"loop3.logits", "exit_prob"} <= rows.keys()
    integers = name in INTEGERS
    for row in rows.values():
        decoded = row["name"] in stored
        assert row["tolerance"] == (1e-3 if integers and decoded else 1e-4)
        assert row["reference_error"] == 0.0
        assert row["engine_error"] < (5e-4 if integers and decoded else 1e-5)
    assert rows[stored[-1]]["engine_error"] > 1e-6 or not integers  # it is the reading that rounds


@every_format
def test_a_fixture_of_any_format_passes(name: Format, tmp_path: pathlib.Path) -> None:
    for length in (1, 6):
        out, _ = looplm("verify", fixture_in(name, tmp_path / str(length), IDS[:, :length]))
        assert "FAIL" not in out
        assert f"as stored ({name}).loop3.logits" in out


# ---- wrong


def other_scale(file: TensorFile, raw: bytearray) -> None:
    """The first scale doubled: its exponent one more."""
    begin = file.entries[CHANGED + "_scale"].begin
    bits = int.from_bytes(raw[begin : begin + 2], "little") + 0x80
    raw[begin : begin + 2] = bits.to_bytes(2, "little")


def other_nibble(file: TensorFile, raw: bytearray) -> None:
    """The sign of one weight."""
    raw[file.entries[CHANGED].begin + 5] ^= 0x08


@pytest.mark.parametrize(("name", "damage"), [("int8", other_scale), ("int4", other_scale), ("int4", other_nibble)])
def test_one_wrong_number_in_the_file_is_named_where_it_acts(
    name: Format, damage: Callable[[TensorFile, bytearray], None], tmp_path: pathlib.Path
) -> None:
    right = fixture_in(name, tmp_path / "right")
    copied = pathlib.Path(shutil.copytree(right, tmp_path / "copied"))
    path = copied / "model" / "model.safetensors"
    raw = bytearray(path.read_bytes())
    damage(TensorFile(path), raw)
    path.write_bytes(raw)
    out, err = looplm("verify", right, copied, "--json", width=300, code=1)
    report = json.loads(out.splitlines()[-1])
    assert [folder["first_divergence"] for folder in report["folders"]] == [None, "loop1.layer2.mlp_out"]
    assert report["folders"][1]["engine_leaves_reference"] is None
    assert err.splitlines()[1].startswith("hint: engine and reference agree with each other")


MISREADINGS = [
    ("int8", "scale of the neighbouring group"),
    ("int8", "unsigned read as signed"),
    ("int4", "scale of the neighbouring group"),
    ("int4", "swapped nibbles"),
    ("int4", "zero point of the other sign"),
]


@pytest.mark.parametrize(("name", "mistake"), MISREADINGS)
def test_an_engine_that_decodes_integers_wrongly_is_named(
    name: Format, mistake: str, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = model_in(name, tmp_path / "model")

    def misread(files: ModelFiles) -> StoredWeights:
        weights = read_stored(files)
        one = {CHANGED: wrong(weights.matrices[CHANGED], mistake)}
        return StoredWeights(weights.config, {**weights.matrices, **one}, weights.floats)

    monkeypatch.setattr(stored_verification, "read_stored", misread)
    out, err = looplm("verify", folder, width=300, code=1)
    assert [line for line in out.splitlines() if line.startswith("  FAIL") and "as stored" not in line] == []
    assert err.splitlines()[0].endswith(f"the first in forward order is as stored ({name}).loop1.hidden")
    assert "decoding is wrong" in err.splitlines()[1]


def test_bits_of_bfloat16_read_with_another_meaning_are_named(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def half(files: ModelFiles) -> StoredWeights:
        """As if they were the halves that have a longer mantissa."""
        weights = read_stored(files)
        values = weights.matrices[CHANGED].codes.view(np.float16).astype(np.float32)
        one = {CHANGED: StoredMatrix("float32", weights.matrices[CHANGED].shape, values)}
        return StoredWeights(weights.config, {**weights.matrices, **one}, weights.floats)

    monkeypatch.setattr(stored_verification, "format_of", lambda weights: "bfloat16")
    monkeypatch.setattr(stored_verification, "read_stored", half)
    _, err = looplm("verify", model_in("bfloat16", tmp_path / "model"), width=300, code=1)
    assert err.splitlines()[0].endswith("the first in forward order is as stored (bfloat16).loop1.hidden")


@pytest.mark.parametrize("name", INTEGERS)
def test_an_engine_that_widens_integers_wrongly_is_named(
    name: Format, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = Quantized.dequantize

    def neighbouring(self: Quantized, *arguments: Any, **named: Any) -> Any:
        return right(dataclasses.replace(self, scales=np.roll(self.scales, 1, axis=1)), *arguments, **named)

    folder = model_in(name, tmp_path / "model")
    monkeypatch.setattr(Quantized, "dequantize", neighbouring)
    out, err = looplm("verify", folder, width=300, code=1)
    assert "the engine leaves the reference at loop1.layer1.q" in out
    assert err.splitlines()[0].endswith("the first in forward order is loop1.layer1.q")


def test_a_model_too_large_for_the_reference_is_refused_before_it_is_read(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = model_in("bfloat16", tmp_path / "model")
    monkeypatch.setattr(stored_verification, "LARGEST", 1000)
    out, err = looplm("verify", folder, width=300, code=1)
    message, hint = err.splitlines()
    assert out == ""
    assert "parameters, and the reference, in float64, is for 1,000 at most" in message
    assert "looplm init" in hint
