"""AdamW in one pass, and the gradient's norm."""

import numpy as np

from ..arrays import Array, Floats
from .jit import njit

NORM_BLOCK = 4096  # numbers that are summed in float32


@njit
def _update(weight, grad, first_moment, second_moment, beta1, beta2, rate, root_scale, eps, keep):
    one = np.float32(1.0)
    for i in range(weight.size):
        g = grad[i]
        m = beta1 * first_moment[i] + (one - beta1) * g
        v = beta2 * second_moment[i] + (one - beta2) * g * g
        first_moment[i], second_moment[i] = m, v
        weight[i] = keep * weight[i] - rate * m / (np.sqrt(v) * root_scale + eps)


@njit
def _sums_of_squares(sums, grad):
    for i in range(sums.size):
        block, part = grad[i * NORM_BLOCK : (i + 1) * NORM_BLOCK], np.float32(0.0)
        for j in range(block.size):
            part += block[j] * block[j]
        sums[i] = part


def adamw_update(
    weight: Floats,
    grad: Floats,
    first_moment: Floats,
    second_moment: Floats,
    step: int,
    learning_rate: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
) -> tuple[()]:
    rate = np.float32(learning_rate / (1.0 - beta1**step))
    root_scale = np.float32((1.0 - beta2**step) ** -0.5)
    _update(
        weight.reshape(-1),
        grad.reshape(-1),
        first_moment.reshape(-1),
        second_moment.reshape(-1),
        np.float32(beta1),
        np.float32(beta2),
        rate,
        root_scale,
        np.float32(eps),
        np.float32(1.0 - learning_rate * weight_decay),
    )
    return ()


def sums_of_squares(grad: Floats) -> Array:
    """Of runs of NORM_BLOCK numbers: each in float32, vectorised; they are to be added up in float64.  grad: N"""
    sums = np.empty(-(-grad.size // NORM_BLOCK))
    _sums_of_squares(sums, grad)
    return sums


def gradient_norm(grad: Floats) -> tuple[float]:
    return (float(np.sqrt(sums_of_squares(np.ascontiguousarray(grad).reshape(-1)).sum())),)
