"""Random models in every stored format, with a plain quantizer of the layout that docs/formats.md defines."""

import numpy as np

from looplm.safetensors_file import round_to_bfloat16, widen_bfloat16
from looplm.stored import Format, StoredMatrix, StoredWeights, convert, is_matrix
from looplm.weights import Weights
from random_models import random_weights


def quantized(values: np.ndarray, name: Format) -> StoredMatrix:
    """Nearest codes under a scale of max / 127 or max / 7 per group."""
    rows, columns = values.shape
    group, most = (64, 127) if name == "int8" else (32, 7)
    padded = np.zeros((rows, -(-columns // 64) * 64), np.float32)
    padded[:, :columns] = values
    grouped = padded.reshape(rows, -1, group)
    scales = round_to_bfloat16(np.abs(grouped).max(axis=2) / most)
    steps = widen_bfloat16(scales)[..., None]
    integers = np.rint(grouped / np.where(steps > 0.0, steps, 1.0)).clip(-most, most).reshape(rows, -1)
    if name == "int8":
        return StoredMatrix(name, (rows, columns), integers.astype(np.int8), scales)
    planes = (integers + 8).astype(np.uint16).reshape(rows, -1, 4, 16)
    words = sum(planes[:, :, i] << np.uint16(4 * i) for i in range(4))
    return StoredMatrix(name, (rows, columns), words.astype("<u2").view(np.uint8).reshape(rows, -1), scales)


def stored(values: np.ndarray, name: Format) -> StoredMatrix:
    return quantized(values, name) if name in ("int8", "int4") else convert(values, name)


def in_format(name: Format, weights: Weights | None = None) -> tuple[StoredWeights, Weights]:
    """A model in a format, and the same numbers as float32."""
    weights = random_weights() if weights is None else weights
    matrices, floats, widened = {}, {}, {}
    for tensor, values in weights.tensors.items():
        if not is_matrix(tensor):
            floats[tensor] = widened[tensor] = values
            continue
        own: Format = "bfloat16" if "embed" in tensor and name != "float32" else name
        matrices[tensor] = stored(values, "int8" if own == "int4" and "lm_head" in tensor else own)
        widened[tensor] = matrices[tensor].rows(np.arange(len(values)))
    return StoredWeights(weights.config, matrices, floats), Weights.from_tensors(weights.config, widened)
