"""Small random model folders with uneven sizes, and the ways other programs or accidents change them."""

import dataclasses
import json
import pathlib
from typing import Any

import numpy as np
import safetensors.numpy

from looplm.arrays import Floats
from looplm.checkpoint import read_tensors, save_model
from looplm.config import ModelConfig
from looplm.safetensors_file import write_tensors
from looplm.settings import InitConfig
from looplm.text import letter_tokenizer
from looplm.weights import Weights, initialise

SHAPE = ModelConfig(
    vocab_size=11,
    hidden_size=6,
    intermediate_size=10,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=2,
    total_ut_steps=3,
    max_position_embeddings=32,
    eos_token_id=0,
)
TIED = dataclasses.replace(SHAPE, tie_word_embeddings=True)
GATE_WEIGHT, GATE_BIAS = "model.early_exit_gate.weight", "model.early_exit_gate.bias"
LETTERS = letter_tokenizer("abcdefghijk")


def random_weights(config: ModelConfig = SHAPE) -> Weights:
    weights = initialise(config, InitConfig(weight_std=0.5), seed=3)
    weights.gate_bias[:] = -0.37
    return weights


def save(folder: pathlib.Path, weights: Weights | None = None, **changes: Any) -> pathlib.Path:
    arguments = {"tokenizer_json": LETTERS.json, "tokenizer_config_json": None, "provenance": {"steps": 7}, **changes}
    save_model(folder, weights or random_weights(), **arguments)
    return folder


def edit(folder: pathlib.Path, name: str = "config.json", **changes: Any) -> None:
    values = json.loads((folder / name).read_text())
    (folder / name).write_text(json.dumps({key: v for key, v in (values | changes).items() if v != "gone"}))


def restore(folder: pathlib.Path, tensors: dict[str, Floats]) -> None:
    """Write the weights as another program would: any tensors, names in its own order."""
    safetensors.numpy.save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def shard(folder: pathlib.Path, *groups: list[str]) -> None:
    """Spread the single file over several, with an index."""
    tensors = read_tensors(folder)
    where = {}
    for number, names in enumerate(groups, 1):
        file = f"model-{number:05}-of-{len(groups):05}.safetensors"
        write_tensors(folder / file, {name: tensors[name] for name in names})
        where |= dict.fromkeys(names, file)
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))


def same(weights: Weights, expected: dict[str, Floats]) -> None:
    assert weights.tensors.keys() == expected.keys()
    for name, values in expected.items():
        np.testing.assert_array_equal(weights.tensors[name], values, err_msg=name)


def contents(folder: pathlib.Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}
