"""A model folder in the Hugging Face layout, read with the standard library and NumPy.

The judge has a reader of its own: if it used the engine's, a tensor read wrongly would be wrong on both sides.  It
trusts the files to be whole; who wants damage explained opens the folder with the engine.
"""

import json
import pathlib
from typing import Any

import numpy as np

from .ops import Array

DTYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2"}


def read_config(folder: pathlib.Path) -> dict[str, Any]:
    """config.json with the keys that may be left out or null filled in: head_dim, key/value heads, tying."""
    config: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    heads = config["num_attention_heads"]
    config["num_key_value_heads"] = config.get("num_key_value_heads") or heads
    config["head_dim"] = config.get("head_dim") or config["hidden_size"] // heads
    config["tie_word_embeddings"] = bool(config.get("tie_word_embeddings"))
    return config


def read_tensors(folder: pathlib.Path) -> dict[str, Array]:
    """All tensors of model.safetensors, or of the files its index names, as float32 or float64; bfloat16 exactly."""
    index = folder / "model.safetensors.index.json"
    files = {"model.safetensors"}
    if index.exists():
        files = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    return {name: value for file in sorted(files) for name, value in _read_file(folder / file).items()}


def _read_file(path: pathlib.Path) -> dict[str, Array]:
    """Eight bytes of length, a JSON header of that length, then the data its offsets point into."""
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header: dict[str, Any] = json.loads(raw[8 : 8 + length])
    header.pop("__metadata__", None)
    tensors: dict[str, Array] = {}
    for name, entry in header.items():
        begin, end = (8 + length + offset for offset in entry["data_offsets"])
        value = np.frombuffer(raw[begin:end], DTYPES[entry["dtype"]]).reshape(entry["shape"])
        if entry["dtype"] == "BF16":  # the upper half of a float32
            value = (value.astype(np.uint32) << 16).view(np.float32)
        tensors[name] = value
    return tensors
