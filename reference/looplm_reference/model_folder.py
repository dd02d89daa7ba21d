"""A model folder in the Hugging Face layout, read with the standard library and NumPy.

The judge has a reader of its own: if it used the engine's, a tensor read wrongly would be wrong on both sides.  It
trusts the files to be whole; who wants damage explained opens the folder with the engine.
"""

import json
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from .judge import tensor_shapes
from .ops import Array
from .quantize import Stored, dequantize, format_of

DTYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2", "I8": "i1", "U8": "u1"}


def read_config(folder: pathlib.Path) -> dict[str, Any]:
    """config.json with the keys that may be left out or null filled in: head_dim, key/value heads, tying."""
    config: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    heads = config["num_attention_heads"]
    config["num_key_value_heads"] = config.get("num_key_value_heads") or heads
    config["head_dim"] = config.get("head_dim") or config["hidden_size"] // heads
    config["tie_word_embeddings"] = bool(config.get("tie_word_embeddings"))
    return config


def read_tensors(folder: pathlib.Path) -> dict[str, Array]:
    """All tensors of model.safetensors, or of the files its index names; bfloat16 and quantized weights exactly."""
    index = folder / "model.safetensors.index.json"
    files = {"model.safetensors"}
    if index.exists():
        files = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    stored = {name: value for file in sorted(files) for name, value in _read_file(folder / file).items()}
    return _dequantized(stored, read_config(folder)) if any(name.endswith("_scale") for name in stored) else stored


def _dequantized(stored: Mapping[str, Array], config: Mapping[str, Any]) -> dict[str, Array]:
    """Codes and their scales become the matrix they stand for."""
    fmt, shapes = config["quantization_config"]["format"], tensor_shapes(config)
    tensors: dict[str, Array] = {}
    for name, value in stored.items():
        kind = format_of(name, fmt) if f"{name}_scale" in stored else None
        if kind is not None:
            rows, columns = shapes[name]
            tensors[name] = dequantize(Stored(kind, (rows, columns), value, stored[f"{name}_scale"]))
        elif not name.endswith("_scale"):
            tensors[name] = value
    return tensors


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
