"""Cross-entropy in nats; a target of -1 is not counted."""

import numpy as np

from ..arrays import Floats, Ints
from .intrinsics import exp32
from .jit import njit

_ZERO = np.float32(0.0)


@njit
def loss_into(loss, lse, logits, target):
    for row in range(logits.shape[0]):
        values = logits[row]
        highest = values[0]
        for i in range(values.size):
            highest = max(highest, values[i])
        total = _ZERO
        for i in range(values.size):
            total += exp32(values[i] - highest)
        lse[row] = highest + np.log(total)
        loss[row] = lse[row] - values[target[row]] if target[row] >= 0 else _ZERO


@njit
def gradient_into(dlogits, dloss, logits, target, lse):
    """dlogits may be logits itself."""
    for row in range(logits.shape[0]):
        if target[row] < 0:
            dlogits[row, :] = _ZERO
            continue
        scale, shift = dloss[row], lse[row]
        for i in range(logits.shape[1]):
            dlogits[row, i] = scale * exp32(logits[row, i] - shift)
        dlogits[row, target[row]] -= scale


def _rows(x: Floats) -> Floats:
    return x.reshape(-1, x.shape[-1])


def cross_entropy_forward(logits: Floats, target: Ints) -> tuple[Floats, Floats]:
    loss, lse = np.empty(target.shape, logits.dtype), np.empty(target.shape, logits.dtype)
    loss_into(loss.reshape(-1), lse.reshape(-1), _rows(logits), target.reshape(-1))
    return loss, lse


def cross_entropy_backward(dloss: Floats, logits: Floats, target: Ints, lse: Floats) -> tuple[Floats]:
    dlogits = np.empty_like(logits)
    gradient_into(_rows(dlogits), dloss.reshape(-1), _rows(logits), target.reshape(-1), lse.reshape(-1))
    return (dlogits,)
