# mypy: ignore-errors
"""What streams.py computes, in NumPy: for running uncompiled.  Arguments are as there; tables are by kind of weight."""

import numpy as np

from .addresses import floats_at, words_at
from .vectors import WIDTH


def widened(at, count):
    """bfloat16 numbers as floats."""
    return (words_at(at, count).astype(np.uint32) << np.uint32(16)).view(np.float32)


def _dot_float32(w, x, columns):
    return floats_at(w, columns) @ floats_at(x, columns)


def _dot_bfloat16(w, x, columns):
    weight = widened(w, columns)
    blocks = -(-columns // (2 * WIDTH))
    sorted_x = floats_at(x, 2 * WIDTH * blocks).reshape(blocks, 2, WIDTH)
    return weight @ sorted_x.transpose(0, 2, 1).reshape(-1)[:columns]


def widen_in_order_plain(w, columns, into):
    """What streams.widen_in_order does."""
    blocks = -(-columns // (2 * WIDTH))
    row = np.zeros(2 * WIDTH * blocks, np.float32)
    row[:columns] = widened(w, columns)
    floats_at(into, row.size)[:] = row.reshape(blocks, WIDTH, 2).transpose(0, 2, 1).reshape(-1)


FLOATS = (floats_at, widened)
DOTS = (_dot_float32, _dot_bfloat16)
