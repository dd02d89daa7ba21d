"""The exit gate: one logit per position and loop."""

import numpy as np

from ..arrays import Floats


def gate_forward(hidden: Floats, weight: Floats, bias: Floats) -> tuple[Floats]:
    gate_logit = np.matmul(hidden, weight[0])
    np.add(gate_logit, bias[0], out=gate_logit)
    return (gate_logit,)


def gate_backward(dgate_logit: Floats, hidden: Floats, weight: Floats) -> tuple[Floats, Floats, Floats]:
    flat = dgate_logit.reshape(-1)
    dweight = np.matmul(flat, hidden.reshape(-1, hidden.shape[-1]))[None]
    return dgate_logit[..., None] * weight[0], dweight, flat.sum(keepdims=True)
