"""The fixture folder: a model, and what an independent implementation answered for it.

    FOLDER/model/           a model folder in the Hugging Face layout
    FOLDER/expected.npz     any of the arrays below; input_ids is required, other names are ignored and listed as such
    FOLDER/fixture.yaml     optional: origin, tolerance, entropy_weight, adamw; read by whoever calls `load`

    hidden RBSD · logits RBSV · gate_logit, exit_prob RBS · exit_logits@Q, expected_logits BSV · loss R B S-1
    stage1_loss, stage2_loss scalars · grad/NAME, stage2_grad/NAME as the tensor
    greedy@Q B S' with greedy_prompt, a scalar
    tap/loop1.layer1.NAME and so on: what a layer computes, under the names of LoopLM.forward's taps
    adamw_loss N with adamw_input_ids N B S: Stage I loss on each batch before the update it causes

Rows come in forward order, so that the first that fails names where a model goes wrong.
"""

import dataclasses
import functools
import math
import pathlib
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

import numpy as np

from . import ops
from .contract import Row, relative_error
from .judge import Candidate, ReferenceCandidate, Tensors, tensor_shapes
from .model import LoopLM, Taps
from .model_folder import read_config, read_tensors
from .ops import Array

TOLERANCE = 1e-4
ENTROPY_WEIGHT = 0.05
ADAMW = ("learning_rate", "beta1", "beta2", "eps", "weight_decay", "clip", "entropy_weight")
HELPERS = {"input_ids", "greedy_prompt", "adamw_input_ids"}  # what other arrays are computed from
PLAIN = {"exit_prob", "expected_logits", "stage1_loss", "stage2_loss", "adamw_loss"}
PER_LOOP = ("hidden", "gate_logit", "logits", "loss")
AT_THRESHOLD = re.compile(r"(exit_logits|greedy)@(\d+(?:\.\d*)?|\.\d+)")


class FixtureError(ValueError):
    """The folder is no fixture: says which file and what is wrong with it."""


@dataclasses.dataclass(frozen=True)
class Fixture:
    """A folder's content; `tensors` as the judge's own reader found them."""

    folder: pathlib.Path
    config: Mapping[str, Any]
    tensors: Tensors
    expected: Mapping[str, Array]
    tolerance: float
    entropy_weight: float
    adamw: Mapping[str, float]
    origin: str

    @functools.cached_property
    def next_token(self) -> Array:
        """BS: the target of each position; the last has none."""
        ids = self.expected["input_ids"]
        return np.concatenate([ids[:, 1:], np.full((len(ids), 1), -1)], axis=1)

    @property
    def ignored(self) -> list[str]:
        """Names in expected.npz that mean nothing here."""
        return sorted(name for name in self.expected if not _is_known(name))


def _is_known(name: str) -> bool:
    prefixed = name.startswith(("grad/", "stage2_grad/", "tap/"))
    return prefixed or name in HELPERS | PLAIN | set(PER_LOOP) or AT_THRESHOLD.fullmatch(name) is not None


class Trainable(Candidate, Protocol):
    """A candidate that can also be judged on Stage II, greedy decoding and AdamW."""

    def stage2(
        self, tensors: Tensors, config: Mapping[str, Any], input_ids: Array, target: Array
    ) -> Mapping[str, Any]:
        """objective, and grads of the gate's two tensors: the paper's target, k = 50, gamma = 0.005."""
        ...

    def greedy(
        self, tensors: Tensors, config: Mapping[str, Any], input_ids: Array, exit_threshold: float, new_tokens: int
    ) -> Array:
        """BS -> B(S + new): all loops always run, the exit chooses which one's state is read."""
        ...

    def adamw(
        self, tensors: Tensors, config: Mapping[str, Any], batches: Array, settings: Mapping[str, float]
    ) -> Array:
        """batches: NBS -> N losses."""
        ...


class ReferenceTrainable(ReferenceCandidate):
    """The reference in the candidate's seat: it is judged by the same arrays as the engine."""

    def stage2(
        self, tensors: Tensors, config: Mapping[str, Any], input_ids: Array, target: Array
    ) -> Mapping[str, Any]:
        return self.model(tensors, config).stage2(input_ids, target)

    def greedy(
        self, tensors: Tensors, config: Mapping[str, Any], input_ids: Array, exit_threshold: float, new_tokens: int
    ) -> Array:
        return self.model(tensors, config).greedy(input_ids, exit_threshold, new_tokens)

    def adamw(
        self, tensors: Tensors, config: Mapping[str, Any], batches: Array, settings: Mapping[str, float]
    ) -> Array:
        """Decay acts on every matrix but the gate's single row."""
        model, losses = self.model(tensors, config), []
        model.weight = {name: value.copy() for name, value in model.weight.items()}
        moments = {name: (np.zeros_like(value), np.zeros_like(value)) for name, value in model.weight.items()}
        betas = (settings["beta1"], settings["beta2"])
        for step, ids in enumerate(batches, 1):
            found = model.stage1(ids, _shifted(ids), settings["entropy_weight"])
            losses.append(found["objective"])
            (norm,) = ops.gradient_norm(np.concatenate([grad.ravel() for grad in found["grads"].values()]))
            for name, grad in found["grads"].items():
                value = model.weight[name]
                decay = settings["weight_decay"] if value.ndim == 2 and len(value) > 1 else 0.0
                clipped = grad * min(1.0, settings["clip"] / norm)
                rate, eps = settings["learning_rate"], settings["eps"]
                ops.adamw_update(value, clipped, *moments[name], step, rate, *betas, eps, decay)
        return np.array(losses)
