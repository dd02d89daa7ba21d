"""Rotary positions, rotate-half: channel i turns with channel i + K/2."""

import functools

import numpy as np

from ..arrays import Floats, Ints
from .jit import njit
from .vectors import turn_eight, turn_one


@functools.lru_cache(maxsize=8)
def rope_tables(positions: int, head_dim: int, theta: float) -> tuple[Floats, Floats]:
    """Cosines and sines, `positions` x K/2, of position * theta**(-2i/K), computed in float64."""
    inverse_frequency = theta ** (-np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    angle = np.arange(positions, dtype=np.float64)[:, None] * inverse_frequency
    return np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)


@njit(forceinline=True)
def turn_head(x, at, half, cos, sin, angles, sign):
    """The 2 * half channels of x from `at` on, by the angles whose cosines and sines begin at `angles`."""
    for i in range(0, half - 7, 8):
        turn_eight(x, at + i, at + half + i, cos, sin, angles + i, sign)
    for i in range(half // 8 * 8, half):
        turn_one(x, at + i, at + half + i, cos, sin, angles + i, sign)


@njit
def rotate_in_place(x, heads, position, cos, sin, sign):
    """The first `heads` heads of x: NHK (contiguous), position: N.  sign = 1 turns forward, -1 back (the gradient)."""
    channels, half = x.shape[2], x.shape[2] // 2
    for row in range(x.shape[0]):
        angles = position[row] * half
        for head in range(heads):
            turn_head(x, (row * x.shape[1] + head) * channels, half, cos, sin, angles, sign)


def _rotated(x: Floats, position: Ints, theta: float, sign: float) -> tuple[Floats]:
    cos, sin = rope_tables(int(position.max()) + 1, x.shape[-1], float(theta))
    y = np.ascontiguousarray(x).copy()
    rotate_in_place(y.reshape(-1, *x.shape[2:]), x.shape[2], position.reshape(-1), cos, sin, np.float32(sign))
    return (y,)


def rope_forward(x: Floats, position: Ints, theta: float) -> tuple[Floats]:
    return _rotated(x, position, theta, 1.0)


def rope_backward(dy: Floats, position: Ints, theta: float) -> tuple[Floats]:
    return _rotated(dy, position, theta, -1.0)
