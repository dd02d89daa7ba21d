"""Random models in every stored format, and mistakes in reading one."""

import dataclasses

import numpy as np

from looplm.stored import Format, StoredMatrix, StoredWeights, convert, is_matrix
from looplm.weights import Weights
from random_models import random_weights


def in_format(name: Format, weights: Weights | None = None) -> tuple[StoredWeights, Weights]:
    """A model in a format, and the same numbers as float32."""
    weights = random_weights() if weights is None else weights
    matrices, floats, widened = {}, {}, {}
    for tensor, values in weights.tensors.items():
        if not is_matrix(tensor):
            floats[tensor] = widened[tensor] = values
            continue
        own: Format = "bfloat16" if "embed" in tensor and name != "float32" else name
        matrices[tensor] = convert(values, "int8" if own == "int4" and "lm_head" in tensor else own)
        widened[tensor] = matrices[tensor].rows(np.arange(len(values)))
    return StoredWeights(weights.config, matrices, floats), Weights.from_tensors(weights.config, widened)


def wrong(matrix: StoredMatrix, mistake: str) -> StoredMatrix:
    """A matrix of integers as someone reads it who makes this mistake."""
    codes, scales = matrix.codes, matrix.scales
    if mistake == "scale of the neighbouring group":
        return dataclasses.replace(matrix, scales=np.roll(scales, 1, axis=1))
    if mistake == "swapped nibbles":
        return dataclasses.replace(matrix, codes=codes << np.uint8(4) | codes >> np.uint8(4))
    if mistake == "zero point of the other sign":
        return dataclasses.replace(matrix, codes=codes ^ np.uint8(0x88))
    assert mistake == "unsigned read as signed"
    return dataclasses.replace(matrix, codes=codes ^ np.uint8(0x80))
