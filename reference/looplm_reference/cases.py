"""The cases of the contract: sizes, and how the inputs of every operation are drawn.

Shapes are not here: they are read from the shape lines of the reference's docstrings.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from .ops import Array

Dims = Mapping[str, int]
Draw = Callable[[np.random.Generator, Dims], Array]

TOLERANCE = 2e-6  # relative error of float32 arithmetic on sums of this length
LARGE = 2e-5  # a score of a hundred, or a logit of some thousands, takes its rounding into an exponent
# Sizes within a case differ, so that swapped axes show; but a case also has its 1s, its P = S (training) or its H = G.
DIMS: tuple[dict[str, int], ...] = (
    {"B": 2, "S": 7, "P": 9, "R": 4, "D": 12, "H": 6, "G": 3, "K": 8, "F": 20, "V": 37, "O": 1, "N": 50},
    {"B": 3, "S": 1, "P": 5, "R": 2, "D": 7, "H": 4, "G": 1, "K": 6, "F": 11, "V": 13, "O": 1, "N": 17},
    {"B": 5, "S": 6, "P": 6, "R": 1, "D": 9, "H": 3, "G": 3, "K": 4, "F": 2, "V": 11, "O": 1, "N": 8},
    {"B": 3, "S": 140, "P": 151, "R": 5, "D": 64, "H": 8, "G": 4, "K": 10, "F": 33, "V": 97, "O": 1, "N": 9001},
)


def _ids(rng: np.random.Generator, dims: Dims) -> Array:
    return rng.integers(0, dims["V"], (dims["B"], dims["S"]))


def _targets(rng: np.random.Generator, dims: Dims) -> Array:
    target = np.where(rng.random((dims["B"], dims["S"])) < 0.2, -1, _ids(rng, dims))
    target[0, 0], target[-1, -1] = -1, 0
    return target


def _positions(rng: np.random.Generator, dims: Dims) -> Array:
    return rng.integers(0, 50, (dims["B"], dims["S"]))


def _starts(rng: np.random.Generator, dims: Dims) -> Array:
    """Left padding: in the first row it covers the first query, if there are others; the last row has none."""
    start = rng.integers(0, dims["P"], dims["B"])
    start[0], start[-1] = min(dims["P"] - dims["S"] + 1, dims["P"] - 1), 0
    return start


def _losses(rng: np.random.Generator, dims: Dims) -> Array:
    return rng.exponential(1.0, (dims["R"], dims["B"], dims["S"]))


def _log_prior(rng: np.random.Generator, dims: Dims) -> Array:
    return np.log(rng.dirichlet(np.ones(dims["R"])))


def _exit_probs(rng: np.random.Generator, dims: Dims) -> Array:
    """Some sum to less than 1 (rounding can do that); one is all at the first loop; one meets 0.5 exactly."""
    rows = (dims["B"], dims["S"])
    prob = np.moveaxis(rng.dirichlet(np.ones(dims["R"]), rows), -1, 0) * rng.uniform(0.5, 1.0, rows)
    prob[:, 0, 0] = np.eye(dims["R"])[0]
    prob[:, -1, -1] = 0.5 ** np.arange(1, dims["R"] + 1)
    return prob


def _saturated(rng: np.random.Generator, dims: Dims) -> Array:
    """Many certain gates: probabilities of exactly 0 and 1, logarithms far from 0, no gradient."""
    return rng.choice([-1e4, -2.0, 2.0, 1e4], (dims["R"], dims["B"], dims["S"]))


def _counted(rng: np.random.Generator, dims: Dims) -> Array:
    return np.where(np.arange(dims["R"]) == rng.integers(0, max(2, dims["R"])), 0.0, 1.0)


def _large_logits(rng: np.random.Generator, dims: Dims) -> Array:
    return 1e3 * rng.standard_normal((dims["B"], dims["S"], dims["V"]))


def _large_queries(rng: np.random.Generator, dims: Dims) -> Array:
    return 30.0 * rng.standard_normal((dims["B"], dims["S"], dims["H"], dims["K"]))


# Inputs that are not drawn from N(0, 1), by name.
DRAWS: dict[str, Draw] = {
    "input_ids": _ids,
    "target": _targets,
    "position": _positions,
    "start": _starts,
    "loss": _losses,
    "log_prior": _log_prior,
    "exit_prob": _exit_probs,
    "continue_prob": lambda rng, dims: rng.random((dims["R"], dims["B"], dims["S"])),
    "counted": _counted,
    "best": lambda rng, dims: rng.integers(0, 2, (dims["R"], dims["B"], dims["S"])),
    "second_moment": lambda rng, dims: rng.random(dims["N"]),
}


@dataclasses.dataclass(frozen=True)
class Case:
    """Constants by parameter name, draws that replace those of DRAWS, and the relative error allowed."""

    values: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    tolerance: float = TOLERANCE


# Constants are large enough to matter: an eps of 1e-6 could be forgotten and nobody would notice.
_ADAMW = {"learning_rate": 0.1, "beta1": 0.9, "beta2": 0.95, "eps": 0.1, "weight_decay": 0.3}
_STAGE2 = {"improvement_slope": 3.0, "improvement_threshold": 0.2}
OPS: dict[str, tuple[Case, ...]] = {
    "embedding": (Case(),),
    "linear": (Case(),),
    "rmsnorm": (Case({"eps": 0.1}),),
    "rmsnorm_residual": (Case({"eps": 0.1}),),
    "rope": (Case({"theta": 100.0}),),
    "attention": (Case(), Case({"q": _large_queries}, LARGE)),
    "swiglu": (Case(),),
    "gate": (Case(),),
    "exit_distribution": (Case(), Case({"gate_logit": _saturated})),
    "exit_loop": tuple(Case({"exit_threshold": q}) for q in (0.0, 0.5, 0.7, 1.0)),
    "relative_change": (Case(),),
    "prediction_kl": (Case(), Case({"before": _large_logits, "logits": _large_logits}, LARGE)),
    "top_probability": (Case(), Case({"logits": _large_logits}, LARGE)),
    "top_margin": (Case(),),
    "stable_loops": (Case(),),
    "cross_entropy": (Case(), Case({"logits": _large_logits}, LARGE)),
    "stage1": (Case({"entropy_weight": 0.3}), Case({"entropy_weight": 0.3, "gate_logit": _saturated})),
    "continue_target": tuple(Case({"target": kind, **_STAGE2}) for kind in ("paper", "look-ahead", "best-later")),
    "stage2": (Case(),),
    "gradient_norm": (Case(),),
    "adamw_update": tuple(Case({"step": step, **_ADAMW}) for step in (1, 3)),
}
