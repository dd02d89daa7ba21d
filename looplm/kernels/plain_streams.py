# mypy: ignore-errors
"""What streams.py computes, in NumPy: for running uncompiled.  Arguments are as there; tables are by kind of weight."""

import numpy as np

from .addresses import floats_at, shorts_at, signed_bytes_at, words_at
from .vectors import WIDTH


def _widened(at, count):
    return (words_at(at, count).astype(np.uint32) << np.uint32(16)).view(np.float32)


def _dot_float32(w, x, scales, columns):
    return floats_at(w, columns) @ floats_at(x, columns)


def _dot_bfloat16(w, x, scales, columns):
    weight = _widened(w, columns)
    blocks = -(-columns // (2 * WIDTH))
    sorted_x = floats_at(x, 2 * WIDTH * blocks).reshape(blocks, 2, WIDTH)
    return weight @ sorted_x.transpose(0, 2, 1).reshape(-1)[:columns]


def _scales(x, scales, columns, group):
    count = columns // group
    return floats_at(x + 2 * columns, count) * _widened(scales, count)


def _dot_int8(w, x, scales, columns):
    products = signed_bytes_at(w, columns).astype(np.int32) * shorts_at(x, columns)
    return products.reshape(-1, 64).sum(axis=1).astype(np.float32) @ _scales(x, scales, columns, 64)


def _dot_int4(w, x, scales, columns):
    words = words_at(w, columns // 4).reshape(-1, 1, 16)
    codes = ((words >> np.arange(0, 16, 4, dtype=np.uint16)[:, None]) & np.uint16(15)).astype(np.int32) - 8
    sums = (codes.reshape(-1) * shorts_at(x, columns)).reshape(-1, 32).sum(axis=1)
    return sums.astype(np.float32) @ _scales(x, scales, columns, 32)


FLOATS = (floats_at, _widened)
DOTS = (_dot_float32, _dot_bfloat16, _dot_int8, _dot_int4)
