# mypy: ignore-errors
"""What streams.py computes, in NumPy: for running uncompiled.  Arguments are as there; tables are by kind of weight."""

import numpy as np

from .addresses import floats_at, shorts_at, signed_bytes_at, words_at
from .vectors import WIDTH

INT4_BLOCK = 320  # bytes of x for 128 columns: upper bytes, lower bytes, what the sums begin with


def _widened(at, count):
    return (words_at(at, count).astype(np.uint32) << np.uint32(16)).view(np.float32)


def _dot_float32(w, x, scales, columns):
    return floats_at(w, columns) @ floats_at(x, columns)


def _dot_bfloat16(w, x, scales, columns):
    weight = _widened(w, columns)
    blocks = -(-columns // (2 * WIDTH))
    sorted_x = floats_at(x, 2 * WIDTH * blocks).reshape(blocks, 2, WIDTH)
    return weight @ sorted_x.transpose(0, 2, 1).reshape(-1)[:columns]


def _scales(at, scales, count):
    return floats_at(at, count) * _widened(scales, count)


def _dot_int8(w, x, scales, columns):
    products = signed_bytes_at(w, columns).astype(np.int32) * shorts_at(x, columns)
    sums = products.reshape(-1, 64).sum(axis=1).astype(np.float32)
    return sums @ _scales(x + 2 * columns, scales, columns // 64)


def _dot_int4(w, x, scales, columns):
    blocks = columns // 128
    stored = signed_bytes_at(w, 64 * blocks).view(np.uint8).reshape(blocks, 1, 4, 4, 4)
    codes = np.concatenate([stored & 15, stored >> 4], axis=1).astype(np.int32)  # block, half, place, group, column
    parts = signed_bytes_at(x, INT4_BLOCK * blocks).reshape(blocks, 5, 64)  # upper bytes twice, lower twice, starts
    numbers = (256 * parts[:, :2].astype(np.int32) + parts[:, 2:4]).reshape(codes.shape)
    starts = parts[:, 4].copy().view(np.int32)
    sums = (codes * numbers).sum(axis=(1, 2, 4)) + starts.reshape(blocks, 4, 4).sum(axis=1)
    return sums.reshape(-1).astype(np.float32) @ _scales(x + INT4_BLOCK * blocks, scales, 4 * blocks)


FLOATS = (floats_at, _widened)
DOTS = (_dot_float32, _dot_bfloat16, _dot_int8, _dot_int4)
