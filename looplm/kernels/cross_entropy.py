"""Cross-entropy in nats; a target of -1 is not counted."""

import numpy as np

from ..arrays import Floats, Ints
from .intrinsics import exp32, larger32
from .jit import njit

_ZERO = np.float32(0.0)


@njit
def loss_into(loss, lse, logits, target):
    for row in range(logits.shape[0]):
        values = logits[row]
        highest = values[0]
        for i in range(values.size):
            highest = larger32(highest, values[i])
        total = _ZERO
        for i in range(values.size):
            total += exp32(values[i] - highest)
        lse[row] = highest + np.log(total)
        loss[row] = lse[row] - values[target[row]] if target[row] >= 0 else _ZERO


@njit
def loss_and_gradient_in_place(loss, logits, dloss, target):
    """Logits become their gradient: one exponential an element serves both passes.

    In place on purpose: of two arrays that turn out to be the same, the loop would run one element at a time.
    """
    for row in range(logits.shape[0]):
        values = logits[row]
        if target[row] < 0:
            loss[row] = _ZERO
            values[:] = _ZERO
            continue
        highest, wanted = values[0], values[target[row]]
        for i in range(values.size):
            highest = larger32(highest, values[i])
        total = _ZERO
        for i in range(values.size):
            weight = exp32(values[i] - highest)
            values[i] = weight
            total += weight
        loss[row] = highest + np.log(total) - wanted
        scale = dloss[row] / total
        for i in range(values.size):
            values[i] *= scale
        values[target[row]] -= dloss[row]


def _rows(x: Floats) -> Floats:
    return x.reshape(-1, x.shape[-1])


def cross_entropy_forward(logits: Floats, target: Ints) -> tuple[Floats, Floats]:
    loss, lse = np.empty(target.shape, logits.dtype), np.empty(target.shape, logits.dtype)
    loss_into(loss.reshape(-1), lse.reshape(-1), _rows(logits), target.reshape(-1))
    return loss, lse


def cross_entropy_backward(dloss: Floats, logits: Floats, target: Ints, lse: Floats) -> tuple[Floats]:
    dlogits, loss = logits.copy(), np.empty(target.size, logits.dtype)
    loss_and_gradient_in_place(loss, _rows(dlogits), dloss.reshape(-1), target.reshape(-1))
    return (dlogits,)
