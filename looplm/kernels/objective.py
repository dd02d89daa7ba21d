"""The objectives of both training stages, per position.

Stage I: the expected loss over loops plus entropy_weight times KL(exit distribution || prior).
Stage II: binary cross-entropy that teaches the gate when another loop helps.
"""

import numpy as np

from ..arrays import Floats
from .exit_distribution import distribution_into, log_sigmoid, sigmoid
from .jit import njit


@njit
def _stage1_into(objective, exit_prob, log_exit_prob, loss, log_prior, entropy_weight):
    for row in range(loss.shape[1]):
        total = 0.0
        for r in range(loss.shape[0]):
            p = np.float64(exit_prob[r, row])
            if p > 0.0:
                total += p * (loss[r, row] + entropy_weight * (np.float64(log_exit_prob[r, row]) - log_prior[r]))
        objective[row] = total


@njit
def _stage1_backward_into(
    dloss, dgate_logit, dobjective, loss, exit_prob, log_exit_prob, gate_logit, log_prior, entropy_weight
):
    loops = loss.shape[0]
    for row in range(loss.shape[1]):
        scale = np.float64(dobjective[row])
        later = 0.0  # sum over j > r of p_j g_j, with g_j the objective's derivative by p_j
        for r in range(loops - 1, -1, -1):
            p = np.float64(exit_prob[r, row])
            dloss[r, row] = scale * p
            worth = 0.0
            if p > 0.0:
                g = loss[r, row] + entropy_weight * (np.float64(log_exit_prob[r, row]) - log_prior[r] + 1.0)
                worth = p * g
            z = np.float64(gate_logit[r, row])
            dgate_logit[r, row] = scale * (sigmoid(-z) * worth - sigmoid(z) * later) if r < loops - 1 else 0.0
            later += worth


@njit
def _stage2_into(objective, gate_logit, continue_prob, counted):
    loops = gate_logit.shape[0]
    for row in range(gate_logit.shape[1]):
        total = 0.0
        for r in range(loops):
            if counted[r] > 0.0:
                z, w = np.float64(gate_logit[r, row]), np.float64(continue_prob[r, row])
                total -= counted[r] * (w * log_sigmoid(-z) + (1.0 - w) * log_sigmoid(z))
        objective[row] = total / loops


@njit
def _stage2_backward_into(dgate_logit, dobjective, gate_logit, continue_prob, counted):
    loops = gate_logit.shape[0]
    for row in range(gate_logit.shape[1]):
        for r in range(loops):
            z, w = np.float64(gate_logit[r, row]), np.float64(continue_prob[r, row])
            dgate_logit[r, row] = dobjective[row] * counted[r] * (sigmoid(z) - (1.0 - w)) / loops


def _flat(x: Floats) -> Floats:
    return np.ascontiguousarray(x).reshape(x.shape[0], -1)


def stage1_forward(loss: Floats, gate_logit: Floats, log_prior: Floats, entropy_weight: float) -> tuple[Floats, Floats]:
    objective = np.empty(loss.shape[1:], np.float32)
    exit_prob, log_exit_prob = np.empty(loss.shape, np.float32), np.empty(loss.shape, np.float32)
    distribution_into(_flat(exit_prob), _flat(log_exit_prob), _flat(gate_logit))
    _stage1_into(
        objective.reshape(-1), _flat(exit_prob), _flat(log_exit_prob), _flat(loss), log_prior, float(entropy_weight)
    )
    return objective, exit_prob


def stage1_backward(
    dobjective: Floats, loss: Floats, gate_logit: Floats, log_prior: Floats, entropy_weight: float
) -> tuple[Floats, Floats]:
    dloss, dgate_logit = np.empty(loss.shape, np.float32), np.empty(loss.shape, np.float32)
    exit_prob, log_exit_prob = np.empty(loss.shape, np.float32), np.empty(loss.shape, np.float32)
    distribution_into(_flat(exit_prob), _flat(log_exit_prob), _flat(gate_logit))
    _stage1_backward_into(
        _flat(dloss),
        _flat(dgate_logit),
        dobjective.reshape(-1),
        _flat(loss),
        _flat(exit_prob),
        _flat(log_exit_prob),
        _flat(gate_logit),
        log_prior,
        float(entropy_weight),
    )
    return dloss, dgate_logit


def stage2_forward(gate_logit: Floats, continue_prob: Floats, counted: Floats) -> tuple[Floats]:
    objective = np.empty(gate_logit.shape[1:], np.float32)
    _stage2_into(objective.reshape(-1), _flat(gate_logit), _flat(continue_prob), counted)
    return (objective,)


def stage2_backward(dobjective: Floats, gate_logit: Floats, continue_prob: Floats, counted: Floats) -> tuple[Floats]:
    dgate_logit = np.empty(gate_logit.shape, np.float32)
    _stage2_backward_into(_flat(dgate_logit), dobjective.reshape(-1), _flat(gate_logit), _flat(continue_prob), counted)
    return (dgate_logit,)


def continue_target(
    loss: Floats, improvement_slope: float, improvement_threshold: float, target: str
) -> tuple[Floats, Floats]:
    later = np.minimum.accumulate(loss[:0:-1])[::-1] if target == "best-later" else loss[1:]
    gain = np.maximum(loss[:-1] - later, 0.0)
    with np.errstate(over="ignore"):
        wanted = 1.0 / (1.0 + np.exp(-improvement_slope * (gain - improvement_threshold)))
    continue_prob, counted = np.zeros(loss.shape, loss.dtype), np.zeros(loss.shape[0], loss.dtype)
    gates = slice(1, None) if target == "paper" else slice(None, -1)
    continue_prob[gates], counted[gates] = wanted, 1.0
    return continue_prob, counted
