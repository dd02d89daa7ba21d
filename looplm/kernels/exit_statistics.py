"""What exit rules look at besides the gate: how much a loop changed the state or the prediction, how sure it is.

One number per position, summed in float64 row by row, so that a position gets the same number alone and in any batch.
"""

import numpy as np

from ..arrays import Floats, Ints
from .jit import njit


@njit
def _relative_change_into(change, before, hidden):
    for row in range(hidden.shape[0]):
        moved, size = 0.0, 0.0
        for d in range(hidden.shape[1]):
            x = np.float64(hidden[row, d])
            moved += (x - before[row, d]) ** 2
            size += x * x
        change[row] = np.sqrt(moved / size)


@njit(forceinline=True)
def _log_sum_exp(logits):
    top = np.float64(logits.max())
    total = 0.0
    for v in range(logits.shape[0]):
        total += np.exp(logits[v] - top)
    return top + np.log(total)


@njit
def _prediction_kl_into(kl, before, logits):
    for row in range(logits.shape[0]):
        old, new = _log_sum_exp(before[row]), _log_sum_exp(logits[row])
        total = 0.0
        for v in range(logits.shape[1]):
            log_prob = before[row, v] - old
            total += np.exp(log_prob) * (log_prob - (logits[row, v] - new))
        kl[row] = max(total, 0.0)  # rounding can leave a negative trace of nothing


@njit
def _top_probability_into(top_prob, logits):
    for row in range(logits.shape[0]):
        top_prob[row] = np.exp(np.float64(logits[row].max()) - _log_sum_exp(logits[row]))


@njit
def _top_margin_into(margin, logits):
    for row in range(logits.shape[0]):
        first, second = -np.inf, -np.inf
        for v in range(logits.shape[1]):
            x = np.float64(logits[row, v])
            if x > first:
                first, second = x, first
            elif x > second:
                second = x
        margin[row] = first - second


@njit
def _stable_loops_into(stable, best):
    loops = best.shape[0]
    for row in range(best.shape[1]):
        r = loops - 1
        while r > 0 and best[r - 1, row] == best[loops - 1, row]:
            r -= 1
        stable[row] = loops - r


def _flat(x: Floats) -> Floats:
    return np.ascontiguousarray(x).reshape(-1, x.shape[-1])


def relative_change(before: Floats, hidden: Floats) -> tuple[Floats]:
    change = np.empty(hidden.shape[:-1], np.float32)
    _relative_change_into(change.reshape(-1), _flat(before), _flat(hidden))
    return (change,)


def prediction_kl(before: Floats, logits: Floats) -> tuple[Floats]:
    kl = np.empty(logits.shape[:-1], np.float32)
    _prediction_kl_into(kl.reshape(-1), _flat(before), _flat(logits))
    return (kl,)


def top_probability(logits: Floats) -> tuple[Floats]:
    top_prob = np.empty(logits.shape[:-1], np.float32)
    _top_probability_into(top_prob.reshape(-1), _flat(logits))
    return (top_prob,)


def top_margin(logits: Floats) -> tuple[Floats]:
    margin = np.empty(logits.shape[:-1], np.float32)
    _top_margin_into(margin.reshape(-1), _flat(logits))
    return (margin,)


def stable_loops(best: Ints) -> tuple[Ints]:
    stable = np.empty(best.shape[1:], np.int64)
    _stable_loops_into(stable.reshape(-1), np.ascontiguousarray(best).reshape(best.shape[0], -1))
    return (stable,)
