"""RMSNorm, alone and with a residual added: forward and backward.

What goes into products of bfloat16 numbers may be written as such: y, and a dx that nothing is added to, in uint16.
"""

import numpy as np

from ..arrays import Floats
from .intrinsics import put
from .jit import njit


@njit(inline="always")
def row_rrms(row, eps):
    total = np.float32(0.0)
    for i in range(row.size):
        total += row[i] * row[i]
    return np.float32(1.0 / np.sqrt(np.float64(total) / row.size + eps))


@njit
def forward_into(y, rrms, x, weight, eps):
    for row in range(x.shape[0]):
        scale, out = row_rrms(x[row], eps), y[row]
        rrms[row] = scale
        for i in range(x.shape[1]):
            put(out, i, x[row, i] * scale * weight[i])


@njit
def residual_forward_into(y, rrms, x, residual, weight, eps):
    for row in range(x.shape[0]):
        scale = rrms[row] = row_rrms(x[row], eps)
        for i in range(x.shape[1]):
            y[row, i] = residual[row, i] + x[row, i] * scale * weight[i]


@njit
def normed_into(y, x, weight, rrms):
    """The forward's output again, from its saved `rrms`."""
    for row in range(x.shape[0]):
        scale, out = rrms[row], y[row]
        for i in range(x.shape[1]):
            put(out, i, x[row, i] * scale * weight[i])


@njit
def backward_into(dx, dweight, dy, x, weight, rrms, add):
    """Adds to dweight, and to dx if `add` (a residual's gradient is there already), else overwrites dx."""
    width = x.shape[1]
    for row in range(x.shape[0]):
        scale, dot = rrms[row], np.float32(0.0)
        for i in range(width):
            dot += dy[row, i] * weight[i] * x[row, i]
        out = dx[row]
        shift = dot * scale * scale / np.float32(width)  # dx = scale * (dy * weight - xhat * mean(dy * weight * xhat))
        for i in range(width):
            dweight[i] += dy[row, i] * x[row, i] * scale
            branch = (dy[row, i] * weight[i] - x[row, i] * shift) * scale
            put(out, i, np.float32(out[i]) + branch if add else branch)


def _rows(x: Floats) -> Floats:
    return x.reshape(-1, x.shape[-1])


def rmsnorm_forward(x: Floats, weight: Floats, eps: float) -> tuple[Floats, Floats]:
    y, rrms = np.empty_like(x), np.empty(x.shape[:-1], x.dtype)
    forward_into(_rows(y), rrms.reshape(-1), _rows(x), weight, eps)
    return y, rrms


def rmsnorm_backward(dy: Floats, x: Floats, weight: Floats, rrms: Floats) -> tuple[Floats, Floats]:
    dx, dweight = np.empty_like(x), np.zeros_like(weight)
    backward_into(_rows(dx), dweight, _rows(dy), _rows(x), weight, rrms.reshape(-1), False)
    return dx, dweight


def rmsnorm_residual_forward(x: Floats, residual: Floats, weight: Floats, eps: float) -> tuple[Floats, Floats]:
    y, rrms = np.empty_like(x), np.empty(x.shape[:-1], x.dtype)
    residual_forward_into(_rows(y), rrms.reshape(-1), _rows(x), _rows(residual), weight, eps)
    return y, rrms


def rmsnorm_residual_backward(dy: Floats, x: Floats, weight: Floats, rrms: Floats) -> tuple[Floats, Floats, Floats]:
    dx, dweight = rmsnorm_backward(dy, x, weight, rrms)
    return dx, dy.copy(), dweight
