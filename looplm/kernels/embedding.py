"""Embedding: rows of a table, and the scatter-add back into it."""

import numpy as np

from ..arrays import Floats, Ints
from .jit import njit


@njit
def gather_into(y, input_ids, weight):
    for row in range(input_ids.size):
        for i in range(weight.shape[1]):  # assigning a slice compiles the words of a shape error: 3 s
            y[row, i] = weight[input_ids[row], i]


@njit
def scatter_add_into(dweight, dy, input_ids):
    for row in range(input_ids.size):
        into = dweight[input_ids[row]]
        for i in range(dy.shape[1]):
            into[i] += dy[row, i]


def embedding_forward(input_ids: Ints, weight: Floats) -> tuple[Floats]:
    width = weight.shape[1]
    y = np.empty((*input_ids.shape, width), weight.dtype)
    gather_into(y.reshape(-1, width), input_ids.reshape(-1), weight)
    return (y,)


def embedding_backward(dy: Floats, input_ids: Ints, weight: Floats) -> tuple[Floats]:
    dweight = np.zeros_like(weight)
    scatter_add_into(dweight, dy.reshape(-1, dy.shape[-1]), input_ids.reshape(-1))
    return (dweight,)
