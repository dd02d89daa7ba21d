"""Model folders, read: mapped without a copy, and refused where their files do not fit together."""

import json
import pathlib
import shutil
from typing import Any

import numpy as np
import pytest

from looplm.arrays import Floats
from looplm.checkpoint import load_model
from looplm.config import ModelConfig
from looplm.errors import CheckpointError, ConfigError
from looplm.model_files import EMBEDDING, HEAD, open_model
from looplm.safetensors_file import round_to_bfloat16, widen_bfloat16, write_tensors
from looplm.text import byte_tokenizer, letter_tokenizer
from looplm.weights import parameter_count
from model_folders import (
    GATE_BIAS,
    GATE_WEIGHT,
    SHAPE,
    TIED,
    contents,
    edit,
    random_weights,
    restore,
    same,
    save,
    shard,
)

# ---- reading


@pytest.mark.parametrize("config", [SHAPE, TIED], ids=["untied", "tied"])
def test_what_is_saved_is_loaded_as_one_mapped_buffer(config: ModelConfig, tmp_path: pathlib.Path) -> None:
    weights = random_weights(config)
    loaded = load_model(save(tmp_path, weights))
    same(loaded.weights, weights.tensors)
    assert loaded.config == config
    assert loaded.provenance == {"looplm": loaded.provenance["looplm"], "steps": 7}
    assert loaded.warnings == []
    assert loaded.tokenizer.vocab_size == 11
    assert loaded.trained_loops == 3
    flat = loaded.weights.flat
    assert flat is not None
    assert flat.size == parameter_count(config)
    assert np.shares_memory(flat, loaded.stored_in[EMBEDDING].floats(EMBEDDING))  # the mapping itself
    assert np.shares_memory(flat, loaded.weights.layers[1].qkv)
    assert (HEAD in loaded.stored_in) is not config.tie_word_embeddings


def test_writing_to_loaded_weights_does_not_reach_the_folder(tmp_path: pathlib.Path) -> None:
    before = contents(save(tmp_path))
    load_model(tmp_path).weights.contiguous()[:] = 0.0
    assert contents(tmp_path) == before


def test_tensors_in_another_order_are_mapped_one_by_one(tmp_path: pathlib.Path) -> None:
    weights = random_weights()
    save(tmp_path)
    restore(tmp_path, weights.tensors)
    loaded = load_model(tmp_path)
    same(loaded.weights, weights.tensors)
    assert loaded.weights.flat is None
    for name, file in loaded.stored_in.items():
        assert np.shares_memory(loaded.weights.tensors[name], file.floats(name)), name


def test_tensors_at_odd_addresses_are_copied_into_place(tmp_path: pathlib.Path) -> None:
    weights = random_weights()
    path = save(tmp_path, weights) / "model.safetensors"
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    path.write_bytes((length + 1).to_bytes(8, "little") + content[8 : 8 + length] + b" " + content[8 + length :])
    loaded = load_model(tmp_path)
    same(loaded.weights, weights.tensors)
    assert all(value.flags.aligned for value in loaded.weights.tensors.values())


def test_shards_are_read_through_their_index(tmp_path: pathlib.Path) -> None:
    weights = random_weights()
    names = list(weights.tensors)
    save(tmp_path)
    shard(tmp_path, names[3:9], names[:3] + names[9:])
    loaded = load_model(tmp_path)
    same(loaded.weights, weights.tensors)
    assert [file.path.name for file in loaded.weight_files] == [
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
    ]


def test_bfloat16_is_rounded_on_writing_and_widened_into_one_buffer(tmp_path: pathlib.Path) -> None:
    weights = random_weights()
    loaded = load_model(save(tmp_path, weights, dtype="bfloat16"))
    same(loaded.weights, {n: widen_bfloat16(round_to_bfloat16(v)) for n, v in weights.tensors.items()})
    assert loaded.weights.flat is not None
    assert {entry.dtype for entry in loaded.stored_in[EMBEDDING].entries.values()} == {"BF16"}
    assert json.loads((tmp_path / "config.json").read_text())["torch_dtype"] == "bfloat16"
    again = save(tmp_path / "again", loaded.weights, dtype="bfloat16")
    assert (again / "model.safetensors").read_bytes() == (tmp_path / "model.safetensors").read_bytes()


def test_mixed_and_half_precision_is_widened(tmp_path: pathlib.Path) -> None:
    tensors: dict[str, Any] = {name: value.astype(np.float16) for name, value in random_weights().tensors.items()}
    tensors["model.norm.weight"] = tensors["model.norm.weight"].astype(np.float32)
    save(tmp_path)
    restore(tmp_path, tensors)
    same(load_model(tmp_path).weights, {name: value.astype(np.float32) for name, value in tensors.items()})


def test_a_tied_model_may_repeat_its_embedding_but_not_contradict_it(tmp_path: pathlib.Path) -> None:
    tensors = dict(random_weights(TIED).tensors)
    save(tmp_path, random_weights(TIED))
    restore(tmp_path, {**tensors, HEAD: tensors[EMBEDDING]})
    same(load_model(tmp_path).weights, tensors)
    restore(tmp_path, {**tensors, HEAD: tensors[EMBEDDING] + np.float32(1e-3)})
    with pytest.raises(CheckpointError, match=r"lm_head\.weight differs from model\.embed_tokens\.weight"):
        load_model(tmp_path)


def test_weights_that_are_no_numbers_are_named_in_a_warning(tmp_path: pathlib.Path) -> None:
    weights = random_weights()
    weights.tensors["model.norm.weight"][2] = np.nan
    weights.tensors["model.layers.1.mlp.up_proj.weight"][0, :2] = np.inf
    weights.tensors[EMBEDDING][0, 0] = 3e38  # its square overflows, itself it is fine
    (warning,) = load_model(save(tmp_path, weights)).warnings
    assert warning == (
        "weights that are not finite numbers: model.layers.1.mlp.up_proj.weight (2 of 60), model.norm.weight (1 of 6)"
    )


def test_a_folder_without_tokenizer_loads_but_has_none(tmp_path: pathlib.Path) -> None:
    loaded = load_model(save(tmp_path, tokenizer_json=None))
    with pytest.raises(CheckpointError, match=r"has no tokenizer\.json"):
        _ = loaded.tokenizer


def test_a_damaged_origin_is_a_warning(tmp_path: pathlib.Path) -> None:
    (save(tmp_path) / "looplm.json").write_text("{")
    loaded = load_model(tmp_path)
    assert loaded.provenance == {}
    assert "origin is unknown" in loaded.warnings[0]


def test_a_tokenizer_with_fewer_tokens_is_a_warning_and_with_more_an_error(tmp_path: pathlib.Path) -> None:
    (warning,) = load_model(save(tmp_path, tokenizer_json=letter_tokenizer("abc").json)).warnings
    assert warning == "the model has 11 tokens, its tokenizer 3: the rest has no text"
    with pytest.raises(CheckpointError, match=r"tokenizer\.json has 257 tokens, the model only 11"):
        load_model(save(tmp_path, tokenizer_json=byte_tokenizer().json))


# ---- folders that do not fit together


def without(*names: str) -> dict[str, Floats]:
    return {name: value for name, value in random_weights().tensors.items() if name not in names}


NORM = "model.norm.weight"
WRONG_TENSORS: dict[str, tuple[dict[str, Any], str, str]] = {
    "a tensor is missing": (without(NORM), "lacks model.norm.weight", "different models"),
    "the gate is missing": (
        without(GATE_WEIGHT, GATE_BIAS),
        "lacks model.early_exit_gate.weight, ",
        "drop the exit gate",
    ),
    "the head is missing": (without(HEAD), "lacks lm_head.weight", "tie_word_embeddings"),
    "most are missing": (
        {NORM: np.ones(6, np.float32)},
        r"lacks model\.embed.*, .*, .* and 23 more",
        "different models",
    ),
    "one too many": ({**without(), "model.bias": np.ones(3, np.float32)}, "does not: model.bias", "different models"),
    "a layer too many": (
        {**without(), "model.layers.2.mlp.up_proj.weight": np.ones((10, 6), np.float32)},
        r"model\.layers\.2\.mlp\.up_proj\.weight \(config\.json says 2 layers\)",
        "different models",
    ),
    "wrong shape": (
        {**without(), HEAD: np.ones((6, 11), np.float32)},
        r"lm_head\.weight has shape \[6, 11\], config\.json asks for \[11, 6\]",
        "different models",
    ),
    "wrong type": ({**without(), NORM: np.ones(6, np.int32)}, "norm.weight is stored as I32", "F32"),
}


@pytest.mark.parametrize("case", WRONG_TENSORS)
def test_tensors_that_do_not_fit_the_config_are_refused(case: str, tmp_path: pathlib.Path) -> None:
    tensors, message, cure = WRONG_TENSORS[case]
    restore(save(tmp_path), tensors)
    with pytest.raises(CheckpointError, match=message) as caught:
        open_model(tmp_path)
    assert cure in caught.value.hint
    assert "\n" not in str(caught.value) + caught.value.hint


WRONG_CONFIGS: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "another architecture": (
        {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}, ConfigError, "'LlamaForCausalLM'"
    ),
    "a size is missing": ({"hidden_size": "gone"}, ConfigError, "lacks hidden_size"),
    "a size is text": ({"hidden_size": "six"}, ConfigError, "hidden_size='six' is str"),
    "heads do not divide": ({"num_key_value_heads": 3}, ConfigError, "not divisible by num_key_value_heads=3"),
    "another number of layers": ({"num_hidden_layers": 3}, CheckpointError, "lacks model.layers.2."),
    "another vocabulary": ({"vocab_size": 12}, CheckpointError, r"asks for \[12, 6\]"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG_CONFIGS)
def test_a_config_that_does_not_fit_is_refused(case: str, tmp_path: pathlib.Path) -> None:
    changes, kind, message = WRONG_CONFIGS[case]
    edit(save(tmp_path), **changes)
    with pytest.raises(kind, match=message) as caught:
        load_model(tmp_path)
    assert caught.value.hint


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "has no config.json"), ("{", "is not JSON"), ("[]", "holds list"), ("\xff", "is not JSON")],
)
def test_a_config_that_is_none_is_refused(content: str | None, message: str, tmp_path: pathlib.Path) -> None:
    path = save(tmp_path) / "config.json"
    path.unlink() if content is None else path.write_bytes(content.encode("latin-1"))
    with pytest.raises(CheckpointError, match=message):
        load_model(tmp_path)


def test_a_folder_without_weights_is_refused_and_says_what_is_there(tmp_path: pathlib.Path) -> None:
    (save(tmp_path) / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"has no model\.safetensors, only pytorch_model\.bin"):
        load_model(tmp_path)
    with pytest.raises(CheckpointError, match="is not a folder"):
        load_model(tmp_path / "none")


def test_an_index_that_lies_is_refused(tmp_path: pathlib.Path) -> None:
    names = list(random_weights().tensors)
    save(tmp_path)
    shard(tmp_path, names[:5], names[5:])
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    first, second = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
    for lie, message in (
        ({"weight_map": "gone"}, "has no weight_map"),
        ({"weight_map": index | {names[0]: 3}}, "has no weight_map"),
        ({"weight_map": index | {names[0]: "../x.safetensors"}}, "not a file beside it"),
        ({"weight_map": index | {names[0]: second}}, f"{second} lacks tensor {names[0]}"),
        ({"weight_map": index | {"other": first}}, f"{first} lacks tensor other"),
        ({"weight_map": index | {names[0]: "third.safetensors"}}, "cannot read .*third.safetensors"),
        ({"weight_map": {name: first for name in names[:5]}}, "lacks"),
    ):
        shutil.copytree(tmp_path, copy := tmp_path / "copy")
        edit(copy, "model.safetensors.index.json", **lie)
        with pytest.raises(CheckpointError, match=message):
            load_model(copy)
        shutil.rmtree(copy)
    write_tensors(tmp_path / second, {name: random_weights().tensors[name] for name in names[4:]})
    with pytest.raises(CheckpointError, match=rf"tensor {names[4]} is in .*{first} and in .*{second}"):
        load_model(tmp_path)
