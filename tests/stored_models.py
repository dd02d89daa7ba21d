"""Random models in every stored format."""

import numpy as np

from looplm.stored import Format, StoredWeights, convert, is_matrix
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
