"""Model folders, written: whole or not at all, the gate exchanged alone, and found by name."""

import dataclasses
import errno
import json
import os
import pathlib

import numpy as np
import pytest

from looplm.arrays import Floats
from looplm.checkpoint import load_model, read_tensors, resolve_model, swap_gate, undo_gate
from looplm.errors import CheckpointError
from looplm.safetensors_file import TensorFile, round_to_bfloat16, widen_bfloat16, write_tensors
from looplm.text import letter_tokenizer, tokenizer_config_json
from model_folders import (
    GATE_BIAS,
    GATE_WEIGHT,
    LETTERS,
    SHAPE,
    contents,
    edit,
    random_weights,
    save,
    shard,
)

# ---- writing


def test_foreign_keys_of_a_config_are_kept_and_ours_are_renewed(tmp_path: pathlib.Path) -> None:
    foreign = {"auto_map": {"AutoConfig": "x--y.Z"}, "quirk": [1], "max_window_layers": 28, "use_cache": False}
    edit(save(tmp_path), **foreign, torch_dtype="gone", dtype="bfloat16", eos_token_id=[0, 2], early_exit_threshold=0.5)
    loaded = load_model(tmp_path)
    assert loaded.config == dataclasses.replace(SHAPE, early_exit_threshold=0.5)
    save(tmp_path, random_weights(dataclasses.replace(SHAPE, total_ut_steps=5)))
    values = json.loads((tmp_path / "config.json").read_text())
    assert foreign.items() <= values.items()
    assert values["total_ut_steps"] == 5
    assert values["early_exit_threshold"] == 1.0
    assert values["eos_token_id"] == [0, 2]
    assert values["dtype"] == "float32"
    assert "torch_dtype" not in values
    save(tmp_path, random_weights(dataclasses.replace(SHAPE, num_hidden_layers=1, eos_token_id=4)))
    values = json.loads((tmp_path / "config.json").read_text())
    assert values["max_window_layers"] == len(values["layer_types"]) == 1
    assert values["eos_token_id"] == 4
    assert values["quirk"] == [1]


def test_a_folder_has_what_other_programs_look_for(tmp_path: pathlib.Path) -> None:
    tokenizer_config = tokenizer_config_json(LETTERS, 32)
    save(tmp_path, tokenizer_config_json=tokenizer_config)
    files = contents(tmp_path)
    assert files["tokenizer.json"].decode() == LETTERS.json
    assert files["tokenizer_config.json"].decode() == tokenizer_config
    assert json.loads(files["generation_config.json"]) == {"eos_token_id": 0}
    edit(tmp_path, "generation_config.json", do_sample=True)
    save(tmp_path, tokenizer_json=None)
    assert json.loads(contents(tmp_path)["generation_config.json"]) == {"eos_token_id": 0, "do_sample": True}
    assert contents(tmp_path)["tokenizer.json"] == files["tokenizer.json"]


def test_saving_again_touches_only_what_changes(tmp_path: pathlib.Path) -> None:
    save(tmp_path)
    before = {path.name: path.stat().st_ino for path in tmp_path.iterdir()}
    save(tmp_path, provenance={"steps": 8})
    after = {path.name: path.stat().st_ino for path in tmp_path.iterdir()}
    assert {name for name in after if after[name] != before[name]} == {"model.safetensors", "looplm.json"}


def test_a_full_disk_leaves_the_whole_folder_as_it_was(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path)
    before = contents(tmp_path)
    synced = []

    def full_at_the_weights(descriptor: int) -> None:
        synced.append(descriptor)
        if os.readlink(f"/proc/self/fd/{descriptor}").endswith("model.safetensors.unfinished"):
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_at_the_weights)
    other = random_weights(dataclasses.replace(SHAPE, total_ut_steps=1, vocab_size=99))
    with pytest.raises(CheckpointError, match=r"cannot write .*model\.safetensors: No space left on device"):
        save(tmp_path, other, tokenizer_json=letter_tokenizer("xyz").json)
    assert len(synced) > 1  # some files were complete by then, and were not put in place
    assert contents(tmp_path) == before
    with pytest.raises(CheckpointError, match="No space left"):
        save(tmp_path / "new")
    with pytest.raises(CheckpointError, match=r"new has no model yet|is neither a model"):
        resolve_model(tmp_path / "new")


def test_places_that_cannot_take_a_model_are_refused(tmp_path: pathlib.Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=r"cannot write .*file"):
        save(tmp_path / "file")
    save(tmp_path / "sharded")
    shard(tmp_path / "sharded", list(random_weights().tensors))
    with pytest.raises(CheckpointError, match="holds a model in several files"):
        save(tmp_path / "sharded")


# ---- the gate alone


NEW_GATE = (np.linspace(-1, 1, 6, dtype=np.float32)[None], np.array([0.3], np.float32))


def gate_of(folder: pathlib.Path) -> tuple[Floats, Floats]:
    tensors = read_tensors(folder)
    return tensors[GATE_WEIGHT], tensors[GATE_BIAS]


def other_bytes(folder: pathlib.Path) -> list[bytes]:
    """Every byte of the weight files outside the gate, headers included."""
    found = []
    for path in sorted(folder.glob("model*.safetensors")):
        content = bytearray(path.read_bytes())
        for name, entry in TensorFile(path).entries.items():
            if name in (GATE_WEIGHT, GATE_BIAS):
                content[entry.begin : entry.end] = bytes(entry.end - entry.begin)
        found.append(bytes(content))
    return found


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "shards"])
def test_exchanging_the_gate_changes_nothing_else_and_can_be_undone(kind: str, tmp_path: pathlib.Path) -> None:
    save(tmp_path, dtype="bfloat16" if kind == "bfloat16" else "float32")
    if kind == "shards":
        names = list(random_weights().tensors)
        border = names.index(GATE_BIAS)  # the gate's weight in one file, its bias in the other
        shard(tmp_path, names[:border], names[border:])
    before, others = contents(tmp_path), other_bytes(tmp_path)
    swap_gate(tmp_path, *NEW_GATE, {"gate": "second"})
    expected = [widen_bfloat16(round_to_bfloat16(v)) if kind == "bfloat16" else v for v in NEW_GATE]
    for found, wanted in zip(gate_of(tmp_path), expected, strict=True):
        np.testing.assert_array_equal(found, wanted)
    assert other_bytes(tmp_path) == others
    assert load_model(tmp_path).provenance.items() >= {"steps": 7, "gate": "second"}.items()
    second = contents(tmp_path)
    undo_gate(tmp_path)
    assert {
        name: content for name, content in contents(tmp_path).items() if name != "previous_gate.safetensors"
    } == before
    undo_gate(tmp_path)  # and back again
    second.pop("previous_gate.safetensors")
    assert second.items() <= contents(tmp_path).items()


def test_the_previous_gate_of_several_is_the_last(tmp_path: pathlib.Path) -> None:
    save(tmp_path)
    swap_gate(tmp_path, *NEW_GATE, {"gate": "second"})
    swap_gate(tmp_path, 2 * NEW_GATE[0], NEW_GATE[1], {"gate": "third"})
    undo_gate(tmp_path)
    np.testing.assert_array_equal(gate_of(tmp_path)[0], NEW_GATE[0])
    assert load_model(tmp_path).provenance["gate"] == "second"


def test_undoing_without_a_previous_gate_or_with_another_models_is_refused(tmp_path: pathlib.Path) -> None:
    save(tmp_path)
    with pytest.raises(CheckpointError, match="has no previous gate"):
        undo_gate(tmp_path)
    write_tensors(tmp_path / "previous_gate.safetensors", {GATE_WEIGHT: NEW_GATE[0][:, :5], GATE_BIAS: NEW_GATE[1]})
    with pytest.raises(CheckpointError, match="the gate of another model"):
        undo_gate(tmp_path)


def test_a_gate_that_cannot_be_written_leaves_the_old(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = contents(save(tmp_path))

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CheckpointError, match="No space left"):
        swap_gate(tmp_path, *NEW_GATE, {"gate": "second"})
    assert contents(tmp_path) == before


# ---- finding a model


def test_a_model_is_found_by_its_folder_its_run_or_as_the_latest(tmp_path: pathlib.Path) -> None:
    runs = tmp_path / "runs"
    older, newer = save(runs / "b" / "model"), save(runs / "a" / "model")
    for folder, seconds in ((older, 1_000), (newer, 2_000)):
        os.utime(folder / "model.safetensors", (seconds, seconds))
    (runs / "unfinished" / "data").mkdir(parents=True)
    assert resolve_model(older) == resolve_model(str(runs / "b")) == older
    assert resolve_model(None, runs) == newer
    os.utime(older / "model.safetensors", (3_000, 3_000))
    assert resolve_model(None, runs) == older


def test_what_is_no_model_is_refused_with_a_cure(tmp_path: pathlib.Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text("")
    (tmp_path / "other").mkdir()
    (tmp_path / "file").write_text("")
    for path, message, cure in (
        (None, "there is no model yet below .*runs/", "looplm train"),
        ("ByteDance/Ouro-1.4B", "does not exist", "nothing is downloaded"),
        (tmp_path / "file", "is a file", f"name the folder: {tmp_path}"),
        (tmp_path / "run", "has no model yet", f"looplm train --resume {tmp_path}"),
        (tmp_path / "other", "neither a model folder nor a run folder", "config.json"),
    ):
        with pytest.raises(CheckpointError, match=message) as caught:
            resolve_model(path, tmp_path / "runs")
        assert cure in caught.value.hint
