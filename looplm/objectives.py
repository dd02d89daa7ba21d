"""The two training objectives, as the training loops use them.

Stage I: expected loss over loops minus entropy_weight times the exit distribution's entropy (Section 3.3), or with any
other prior than the uniform one, plus entropy_weight * KL(exit distribution || prior).
Stage II: the gate alone learns when another loop really helped (Section 3.4).
"""

import dataclasses
import math

import numpy as np

from .arrays import Floats
from .errors import ConfigError
from .kernels import (
    continue_target,
    exit_distribution_forward,
    stage1_backward,
    stage1_forward,
    stage2_backward,
    stage2_forward,
)

STAGE2_TARGETS = ("paper", "look-ahead", "best-later")


def log_prior(prior: str, loops: int) -> Floats:
    """Logarithms of a prior over R loops from its name; the uniform one is all zeros, so that KL becomes -entropy.

    "uniform" · "geometric:P", P * (1 - P)**r truncated to R loops and scaled to sum 1 · "0.1,0.2,..." R weights.

    Raises: ConfigError if the text is none of these.
    """
    kind, _, value = prior.partition(":")
    hint = "use uniform, geometric:0.3, or one weight per loop such as 0.1,0.2,0.3,0.4"
    if kind == "uniform" and not value:
        return np.zeros(loops, np.float32)
    try:
        if kind == "geometric":
            stop = float(value)
            weights = np.array([stop * (1.0 - stop) ** r for r in range(loops)])
        else:
            weights = np.array([float(part) for part in prior.split(",")])
    except ValueError as error:
        raise ConfigError(f"train.prior={prior!r} is not a prior over loops", hint) from error
    if weights.size != loops or not (np.isfinite(weights).all() and (weights > 0).all()):
        raise ConfigError(f"train.prior={prior!r} does not give {loops} positive weights", hint)
    return np.log(weights / weights.sum()).astype(np.float32)


@dataclasses.dataclass(frozen=True)
class StageOne:
    """Source: Section 3.3, per token; entropy_weight is the paper's beta."""

    entropy_weight: float
    log_prior: Floats  # R

    def loss_weight(self, gate_logit: Floats) -> Floats:
        """Derivative of the objective by each loop's loss: the exit distribution.  RN -> RN."""
        return exit_distribution_forward(gate_logit)[0]

    def value_and_dgate(self, loss: Floats, gate_logit: Floats) -> tuple[Floats, Floats]:
        """loss, gate_logit: RN -> objective: N (nats), and its derivative by the gate logits: RN."""
        value, _ = stage1_forward(loss, gate_logit, self.log_prior, self.entropy_weight)
        ones = np.ones(loss.shape[1:], np.float32)
        return value, stage1_backward(ones, loss, gate_logit, self.log_prior, self.entropy_weight)[1]


@dataclasses.dataclass(frozen=True)
class StageTwo:
    """Source: Section 3.4.

    With target "paper" the label of gate r looks back (did loop r help?) and the first gate has none; "look-ahead"
    asks of gate r whether loop r + 1 will help, and the last gate, unused at inference, has none; "best-later" asks
    whether any loop after r will help.
    """

    target: str = "look-ahead"
    improvement_slope: float = 50.0  # k
    improvement_threshold: float = 0.005  # gamma, nats

    def __post_init__(self) -> None:
        if self.target not in STAGE2_TARGETS:
            raise ConfigError(
                f"target {self.target!r} is not known", f"use {', '.join(STAGE2_TARGETS[:-1])} or {STAGE2_TARGETS[-1]}"
            )

    def value_and_dgate(self, loss: Floats, gate_logit: Floats) -> tuple[Floats, Floats]:
        """loss (a constant here), gate_logit: RN -> objective: N, and its derivative by the gate logits: RN."""
        continue_prob, counted = continue_target(loss, self.improvement_slope, self.improvement_threshold, self.target)
        (value,) = stage2_forward(gate_logit, continue_prob, counted)
        ones = np.ones(value.shape, np.float32)
        return value, stage2_backward(ones, gate_logit, continue_prob, counted)[0]


def entropy(exit_prob: Floats) -> float:
    """Entropy in nats of one distribution over loops.  R -> scalar."""
    return float(-sum(p * math.log(p) for p in exit_prob if p > 0.0))
