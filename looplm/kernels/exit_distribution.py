"""The exit law over loops, and the rule that stops at a threshold.

Complements are sigmoid(-z) and logarithms come from log-sigmoids, in float64 within a position: a saturated gate
gives exact zeros and ones, and a finite logarithm.
"""

import numpy as np

from ..arrays import Array, Floats, Ints
from .jit import njit


@njit(inline="always")
def sigmoid(z):
    return 1.0 / (1.0 + np.exp(-z)) if z >= 0.0 else np.exp(z) / (1.0 + np.exp(z))


@njit(inline="always")
def log_sigmoid(z):
    return min(z, 0.0) - np.log1p(np.exp(-abs(z)))


@njit
def distribution_into(exit_prob, log_exit_prob, gate_logit):
    loops, rows = gate_logit.shape
    for row in range(rows):
        log_survival = 0.0
        for r in range(loops - 1):
            z = np.float64(gate_logit[r, row])
            log_exit_prob[r, row] = log_survival + log_sigmoid(z)
            exit_prob[r, row] = np.exp(log_survival + log_sigmoid(z))
            log_survival += log_sigmoid(-z)
        log_exit_prob[loops - 1, row] = log_survival
        exit_prob[loops - 1, row] = np.exp(log_survival)


@njit
def _backward_into(dgate_logit, dexit_prob, gate_logit):
    loops, rows = gate_logit.shape
    for row in range(rows):
        dgate_logit[loops - 1, row] = 0.0
        later = np.float64(dexit_prob[loops - 1, row])  # worth of surviving past loop r
        for r in range(loops - 2, -1, -1):
            z = np.float64(gate_logit[r, row])
            hazard, stay = sigmoid(z), sigmoid(-z)
            here = np.float64(dexit_prob[r, row])
            dgate_logit[r, row] = (here - later) * hazard * stay  # times survival, below
            later = hazard * here + stay * later
        survival = 1.0
        for r in range(loops - 1):
            dgate_logit[r, row] *= survival
            survival *= sigmoid(-np.float64(gate_logit[r, row]))


@njit
def _exit_loop_into(exit_index, exit_prob, exit_threshold):
    loops, rows = exit_prob.shape
    for row in range(rows):
        exit_index[row] = loops - 1
        cdf = 0.0
        for r in range(loops - 1):
            cdf += np.float64(exit_prob[r, row])
            if cdf >= exit_threshold:
                exit_index[row] = r
                break


@njit
def _has_exited_into(exited, gate_logit, exit_threshold):
    loops, rows = gate_logit.shape
    for row in range(rows):
        log_survival = cdf = 0.0
        for r in range(loops):
            z = np.float64(gate_logit[r, row])
            cdf += np.float64(np.float32(np.exp(log_survival + log_sigmoid(z))))
            log_survival += log_sigmoid(-z)
        exited[row] = cdf >= exit_threshold


def _flat(x: Floats) -> Floats:
    return np.ascontiguousarray(x).reshape(x.shape[0], -1)


def exit_distribution_forward(gate_logit: Floats) -> tuple[Floats, Floats]:
    exit_prob, log_exit_prob = np.empty(gate_logit.shape, np.float32), np.empty(gate_logit.shape, np.float32)
    distribution_into(_flat(exit_prob), _flat(log_exit_prob), _flat(gate_logit))
    return exit_prob, log_exit_prob


def exit_distribution_backward(dexit_prob: Floats, gate_logit: Floats) -> tuple[Floats]:
    dgate_logit = np.empty(gate_logit.shape, np.float32)
    _backward_into(_flat(dgate_logit), _flat(dexit_prob), _flat(gate_logit))
    return (dgate_logit,)


def exit_loop(exit_prob: Floats, exit_threshold: float) -> tuple[Ints]:
    exit_index = np.empty(exit_prob.shape[1:], np.int64)
    # A threshold of 1 means all loops, whatever rounding does to the sum.
    threshold = np.inf if exit_threshold >= 1.0 else float(exit_threshold)
    _exit_loop_into(exit_index.reshape(-1), _flat(exit_prob), threshold)
    return (exit_index,)


def has_exited(gate_logit: Floats, exit_threshold: float) -> Array:
    """Whether `exit_loop` finds an exit among these loops, none of which is the last.  gate_logit: RB -> exited: B"""
    exited = np.empty(gate_logit.shape[1], np.bool_)
    _has_exited_into(exited, _flat(gate_logit), float(exit_threshold))
    return exited
