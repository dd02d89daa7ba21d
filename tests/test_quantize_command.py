"""`looplm quantize`: the folder it writes, the costs it reports, and what it and every reader refuse."""

import dataclasses
import json
import pathlib
import shutil
from typing import Any

import numpy as np
import pytest

import looplm_fixtures
import tiny_models
from in_process import looplm, report_of
from looplm import conversion
from looplm.atomic import replace_files
from looplm.checkpoint import load_model, read_tensors, save_model
from looplm.errors import CheckpointError, ConfigError
from looplm.model_files import EMBEDDING, HEAD, open_model
from looplm.quantization import FORMATS, Quantized, quantize_matrix
from looplm.safetensors_file import TensorFile, round_to_bfloat16, streamed_content, widen_bfloat16, write_tensors
from looplm_reference.model import LoopLM
from looplm_reference.model_folder import read_config
from looplm_reference.model_folder import read_tensors as read_by_the_judge
from model_folders import SHAPE, TIED, contents, edit, random_weights, save, shard

BOTH = pytest.mark.parametrize("fmt", FORMATS)
PROJECTION = "model.layers.1.mlp.down_proj.weight"


@pytest.fixture
def run(tmp_path: pathlib.Path) -> pathlib.Path:
    tiny_models.text_run(tmp_path / "run")
    return tmp_path / "run"


def quantized(source: pathlib.Path, out: pathlib.Path, fmt: str = "int4") -> pathlib.Path:
    return conversion.quantize_folder(open_model(source), out, fmt)


# ---- what is written


@BOTH
def test_the_report_is_what_eval_says_of_both_models(fmt: str, run: pathlib.Path, tmp_path: pathlib.Path) -> None:
    before = contents(run / "model")
    text = tmp_path / "held_out.txt"
    text.write_text(tiny_models.HELD_OUT, encoding="utf-8")
    report = report_of("quantize", text, "-m", run, "--to", fmt, "-o", tmp_path / "small", "--quiet")
    assert contents(run / "model") == before
    assert report["data"] == str(text)
    assert report["bytes_after"] == (tmp_path / "small" / "model.safetensors").stat().st_size
    for model, key in ((run, "loss_before"), (tmp_path / "small", "loss_after")):
        found = report_of("eval", text, "-m", model, "--seq-len", 16, "--quiet")
        depths = found["depths"]
        assert report["tokens"] == found["tokens"]
        assert [at[key] for at in report["by_loop"]] == pytest.approx([at["loss"] for at in depths], rel=1e-5)
    assert [at["loop"] for at in report["by_loop"]] == [1, 2, 3, 4]
    least, most = (1e-3, 0.05) if fmt == "int8" else (0.03, 0.9)
    assert least < report["by_loop"][0]["hidden_error"] < most


def test_what_it_prints_is_a_line_per_loop(run: pathlib.Path, tmp_path: pathlib.Path) -> None:
    out, err = looplm("quantize", "-m", run, "--to", "int8", "-o", tmp_path / "small")
    lines = out.splitlines()
    assert "in int8" in lines[0]
    assert lines[1].startswith("measured on held-out text of")
    rows = [line.split() for line in lines if line.startswith(" loop") or line.startswith("loop")]
    assert [row[1] for row in rows] == ["1", "2", "3", "4"]
    assert "…" not in out
    assert "written to" in err


@BOTH
def test_every_command_reads_a_quantized_model(fmt: str, run: pathlib.Path, tmp_path: pathlib.Path) -> None:
    looplm("quantize", "-m", run, "--to", fmt, "-o", tmp_path / "small", "--no-report", "--quiet")
    small = tmp_path / "small"
    assert report_of("generate", "-m", small, "-p", "It was", "-n", 4, "--q", 0.7)["tokens"] == 4
    assert len(report_of("inspect", "-m", small, "-p", "It was")["positions"]) == 6
    report = report_of("info", "-m", small)
    assert report["quantization"]["format"] == fmt
    assert f"weights in {fmt}" in looplm("info", "-m", small, width=120)[0]
    dtypes = {entry["name"]: entry["dtype"] for entry in report["tensors"]}
    assert dtypes[PROJECTION] == dtypes[HEAD] == "U8"
    assert dtypes[PROJECTION + "_scale"] == dtypes[EMBEDDING] == "BF16"
    assert dtypes["model.norm.weight"] == "F32"


@BOTH
@pytest.mark.parametrize("config", [SHAPE, TIED], ids=["untied", "tied"])
def test_a_folder_holds_each_matrix_as_quantized_alone(config: Any, fmt: str, tmp_path: pathlib.Path) -> None:
    weights = random_weights(config)
    files = open_model(quantized(save(tmp_path / "model", weights), tmp_path / "small", fmt))
    loaded = load_model(tmp_path / "small")
    for name, value in weights.tensors.items():
        kind = "int8" if name == HEAD else fmt if "_proj" in name else None
        if kind is None:
            kept = widen_bfloat16(round_to_bfloat16(value)) if name == EMBEDDING else value
            np.testing.assert_array_equal(loaded.weights.tensors[name], kept)
            continue
        stored, alone = files.stored_matrix(name), quantize_matrix(value, kind)
        assert isinstance(stored, Quantized)
        assert (stored.format, stored.shape) == (kind, value.shape)
        np.testing.assert_array_equal(stored.codes, alone.codes)
        np.testing.assert_array_equal(stored.scales, alone.scales)
        np.testing.assert_array_equal(loaded.weights.tensors[name], alone.dequantize())
    embedding = files.stored_matrix(EMBEDDING)
    assert isinstance(embedding, np.ndarray)
    np.testing.assert_array_equal(embedding, round_to_bfloat16(weights.embedding))
    assert np.shares_memory(embedding, files.stored_in[EMBEDDING].stored(EMBEDDING))  # the mapping itself
    head = json.loads((tmp_path / "small" / "config.json").read_text())["quantization_config"]["head_format"]
    assert (head, HEAD in files.stored_in) == (("bfloat16", False) if config is TIED else ("int8", True))


def test_texts_and_unknown_settings_are_taken_over_and_the_origin_is_told(tmp_path: pathlib.Path) -> None:
    source = save(tmp_path / "model")
    edit(source, torch_dtype="bfloat16", custom_key=3)
    (source / "chat_template.jinja").write_text("{{ messages }}")
    (source / "notes.bin").write_bytes(b"not ours")
    small = quantized(source, tmp_path / "small")
    names = {"config.json", "model.safetensors", "tokenizer.json", "generation_config.json", "looplm.json"}
    assert contents(small).keys() == names | {"chat_template.jinja"}
    for name in ("tokenizer.json", "generation_config.json", "chat_template.jinja"):
        assert (small / name).read_bytes() == (source / name).read_bytes()
    before, after = (json.loads((folder / "config.json").read_text()) for folder in (source, small))
    method = {"quant_method": "looplm", "format": "int4", "group_size": 32, "rows_together": 16}
    assert after == before | {"quantization_config": method | {"head_format": "int8"}}
    provenance = json.loads((small / "looplm.json").read_text())
    assert provenance["steps"] == 7
    assert provenance["quantized"]["format"] == "int4"
    assert provenance["quantized"]["source"] == str(source)


def test_rows_in_pieces_threads_shards_and_bfloat16_give_the_same_file(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = random_weights()
    for tensor in weights.tensors.values():
        tensor[...] = widen_bfloat16(round_to_bfloat16(tensor))
    whole = quantized(save(tmp_path / "model", weights), tmp_path / "whole") / "model.safetensors"
    short = quantized(save(tmp_path / "bf16", weights, dtype="bfloat16"), tmp_path / "short") / "model.safetensors"
    names = list(weights.tensors)
    shard(tmp_path / "model", names[:9], names[9:])
    monkeypatch.setattr(conversion, "CHUNK", 13)
    told: list[tuple[int, int]] = []
    files = open_model(tmp_path / "model")
    pieces = conversion.quantize_folder(
        files, tmp_path / "pieces", "int4", threads=3, progress=lambda done, total: told.append((done, total))
    )
    assert whole.read_bytes() == short.read_bytes() == (pieces / "model.safetensors").read_bytes()
    assert told[-1][0] == told[-1][1] == sum(value.size for value in weights.tensors.values())
    assert told == sorted(told)


def test_codes_start_on_a_cache_line_where_a_models_sizes_allow_it(tmp_path: pathlib.Path) -> None:
    config = dataclasses.replace(SHAPE, vocab_size=96, hidden_size=64, intermediate_size=160, head_dim=16)
    small = quantized(save(tmp_path / "model", random_weights(config)), tmp_path / "small", "int8")
    file = TensorFile(small / "model.safetensors")
    begins = {name: entry.begin for name, entry in file.entries.items()}
    assert [name for name, begin in begins.items() if file.entries[name].dtype == "U8" and begin % 64] == []
    assert max(begins, key=lambda name: begins[name]) == "model.early_exit_gate.bias"


def test_a_quantized_folder_can_be_calibrated_and_written_over_with_floats(
    run: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    small = quantized(run / "model", tmp_path / "small")
    text = tmp_path / "text.txt"
    text.write_text(tiny_models.HELD_OUT, encoding="utf-8")
    looplm("calibrate", text, "-m", small, "--steps", 3, "--accept", "always")
    assert open_model(small).quantization is not None
    weights = load_model(small).weights.copy()
    save_model(small, weights, None, None, {})
    again = load_model(small)
    assert again.quantization is None
    np.testing.assert_array_equal(again.weights.contiguous(), weights.contiguous())


@BOTH
def test_a_fixture_of_a_quantized_model_is_read_by_the_judge_itself(fmt: str, tmp_path: pathlib.Path) -> None:
    untied = next(folder for folder in looplm_fixtures.folders() if folder.name == "untied")
    model = quantized(untied / "model", tmp_path / "fixture" / "model", fmt)
    tensors, config = read_by_the_judge(model), read_config(model)
    ids = np.random.default_rng(0).integers(0, config["vocab_size"], (2, 5))
    answers = LoopLM(tensors, config).forward(ids)
    np.savez(tmp_path / "fixture" / "expected.npz", input_ids=ids, hidden=answers["hidden"], logits=answers["logits"])
    out, _ = looplm("verify", tmp_path / "fixture")
    assert "FAIL" not in out
    assert "within tolerance" in out


# ---- what is refused


def refused(*arguments: object, code: int = 1) -> tuple[str, str]:
    out, err = looplm("quantize", "--quiet", *arguments, width=300, code=code)
    message, hint = err.splitlines()
    assert out == ""
    return message.removeprefix("error: "), hint.removeprefix("hint: ")


def test_wrong_usage_is_answered_before_anything_is_written(run: pathlib.Path, tmp_path: pathlib.Path) -> None:
    new = tmp_path / "new"
    assert "--to 'int5' is not known" in refused("-m", run, "--to", "int5", "-o", new, code=2)[0]
    assert "format is missing" in refused("-m", run, "-o", new, code=2)[0]
    assert "where to write" in refused("-m", run, "--to", "int8", code=2)[0]
    assert "corpus" in refused("x.txt", "-m", run, "--to", "int8", "-o", new, "--no-report", code=2)[0]
    message, hint = refused("-m", run, "--to", "int8", "-o", run / "model", code=2)
    assert "exists already" in message
    assert "new folder" in hint
    lonely = shutil.copytree(run / "model", tmp_path / "lonely")
    message, hint = refused("-m", lonely, "--to", "int8", "-o", new, code=2)
    assert "no held-out text" in message
    assert "--no-report" in hint
    assert not new.exists()


def test_a_quantized_model_is_not_quantized_again(run: pathlib.Path, tmp_path: pathlib.Path) -> None:
    small = quantized(run / "model", tmp_path / "small", "int8")
    message, hint = refused("-m", small, "--to", "int4", "-o", tmp_path / "new", "--no-report", code=2)
    assert "quantized already (int8)" in message
    assert "floats" in hint


@pytest.mark.parametrize("name", [PROJECTION, EMBEDDING, "model.norm.weight", HEAD])
def test_weights_that_are_no_numbers_are_named_and_nothing_is_left(name: str, tmp_path: pathlib.Path) -> None:
    weights = random_weights()
    weights.tensors[name].flat[3] = np.nan
    save(tmp_path / "model", weights)
    message, _ = refused("-m", tmp_path / "model", "--to", "int4", "-o", tmp_path / "new", "--no-report")
    assert message.startswith(f"{name}: 1 weights")
    assert not (tmp_path / "new").exists()


def test_a_text_that_cannot_be_read_is_named(tmp_path: pathlib.Path) -> None:
    source = save(tmp_path / "model")
    (source / "merges.txt").mkdir()
    message, hint = refused("-m", source, "--to", "int4", "-o", tmp_path / "new", "--no-report")
    assert "merges.txt: Is a directory" in message
    assert hint
    assert not (tmp_path / "new").exists()


def test_what_a_killed_conversion_left_behind_is_taken_over(tmp_path: pathlib.Path) -> None:
    source, new = save(tmp_path / "model"), tmp_path / "new"
    new.mkdir()
    (new / "model.safetensors.unfinished").write_bytes(b"half")
    quantized(source, new)
    assert load_model(new).warnings == []
    assert not list(new.glob("*.unfinished"))


def config_of(folder: pathlib.Path, **changes: Any) -> None:
    values = json.loads((folder / "config.json").read_text())["quantization_config"]
    edit(folder, quantization_config=values | changes)


def without_scales(folder: pathlib.Path) -> None:
    rewritten(folder, lambda name: name != PROJECTION + "_scale")


def in_floats(folder: pathlib.Path) -> None:
    tensors = dict(load_model(folder).weights.tensors)
    write_tensors(folder / "model.safetensors", tensors)


def rewritten(folder: pathlib.Path, keep: Any) -> None:
    file = TensorFile(folder / "model.safetensors")
    entries = {name: entry for name, entry in file.entries.items() if keep(name)}
    layout = {name: (entry.dtype, entry.shape) for name, entry in entries.items()}
    read = {name: file.codes(name) if e.dtype == "U8" else file.stored(name) for name, e in entries.items()}
    replace_files({file.path: streamed_content(layout, lambda: iter(read.values()))})


DAMAGE: dict[str, tuple[Any, type[Exception], str]] = {
    "wrong group size": (
        lambda f: config_of(f, group_size=128),
        ConfigError,
        "group_size=128, but int4 is stored",
    ),
    "another order of rows": (
        lambda f: config_of(f, rows_together=None),  # of a version before: one row after the other
        ConfigError,
        "rows_together=None, but int4 is stored with rows_together=16",
    ),
    "unknown format": (lambda f: config_of(f, format="int3"), ConfigError, "format='int3' is not known"),
    "format that is no name": (lambda f: config_of(f, format=[4]), ConfigError, r"format=\[4\] is not known"),
    "no format": (lambda f: config_of(f, format=None), ConfigError, "format=None is not known"),
    "another head": (lambda f: config_of(f, head_format="int4"), ConfigError, "head_format='int4'"),
    "another method": (
        lambda f: config_of(f, quant_method="gptq"),
        ConfigError,
        "'gptq' is not supported",
    ),
    "no mapping": (lambda f: edit(f, quantization_config="int4"), ConfigError, "is not supported"),
    "config silent": (
        lambda f: edit(f, quantization_config="gone"),
        CheckpointError,
        "tensors that the model does not",
    ),
    "other format than the files": (
        lambda f: config_of(f, format="int8", group_size=64),
        CheckpointError,
        "has shape",
    ),
    "no scales": (without_scales, CheckpointError, f"lacks {PROJECTION}_scale"),
    "floats after all": (in_floats, CheckpointError, "lacks .*_scale"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_a_folder_that_contradicts_itself_is_refused_in_two_lines(case: str, tmp_path: pathlib.Path) -> None:
    damage, kind, said = DAMAGE[case]
    small = quantized(save(tmp_path / "model"), tmp_path / "small")
    damage(small)
    with pytest.raises(kind, match=said) as caught:
        open_model(small)
    assert caught.value.hint  # type: ignore[attr-defined]
    out, err = looplm("generate", "-m", small, "-p", "abc", width=300, code=1)
    assert out == ""
    assert [line.split(":")[0] for line in err.splitlines()] == ["error", "hint"]


def test_floats_of_a_quantized_tensor_are_refused_by_name(tmp_path: pathlib.Path) -> None:
    small = quantized(save(tmp_path / "model"), tmp_path / "small", "int8")
    with pytest.raises(CheckpointError, match="is stored as U8"):
        read_tensors(small)


def test_pieces_that_do_not_fill_the_layout_are_a_bug_that_shows(tmp_path: pathlib.Path) -> None:
    short = streamed_content({"x": ("F32", (3,))}, lambda: iter([np.zeros(2, np.float32)]))
    with pytest.raises(ValueError, match="8 bytes written, the header says 12"):
        replace_files({tmp_path / "x.safetensors": short})
    assert list(tmp_path.iterdir()) == []
