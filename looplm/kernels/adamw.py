"""AdamW in one pass, and the gradient's norm."""

import numpy as np

from ..arrays import Floats
from .jit import njit


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
def _sum_of_squares(grad):
    """Blocks of 4096 in float32, blocks in float64: as exact as float64 throughout, and vectorised."""
    total = 0.0
    for begin in range(0, grad.size, 4096):
        block, part = grad[begin : begin + 4096], np.float32(0.0)
        for i in range(block.size):
            part += block[i] * block[i]
        total += np.float64(part)
    return total


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


def gradient_norm(grad: Floats) -> tuple[float]:
    return (float(np.sqrt(_sum_of_squares(np.ascontiguousarray(grad).reshape(-1)))),)
