"""Small wrong versions of the whole model, each the reference with one method changed, and of every operation.

A judge that lets one of them pass is too lenient.  `first` is where a model's mutant goes wrong first: the judge must
not only object but point there.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from . import ops
from .contract import Row, first_failure
from .judge import ReferenceCandidate, compare
from .model import LoopLM, Place
from .op_mutants import OP_MUTANTS, OpMutant, interleaved, other_groups
from .ops import Array

__all__ = ["MODEL_MUTANTS", "OP_MUTANTS", "ModelMutant", "OpMutant"]


class _NoNormBetweenLoops(LoopLM):
    def next_input(self, embedded: Array, before_norm: Array, hidden: Array) -> Array:
        return before_norm


class _InputInjectedAgain(LoopLM):
    def next_input(self, embedded: Array, before_norm: Array, hidden: Array) -> Array:
        return hidden + embedded


class _GateBeforeNorm(LoopLM):
    def gate_input(self, before_norm: Array, hidden: Array) -> Array:
        return before_norm


class _NormsSwapped(LoopLM):
    """The names tempt to it: `post_attention_layernorm` stands before the MLP."""

    def norm_names(self, layer: int) -> tuple[str, str, str, str]:
        first, second, third, fourth = super().norm_names(layer)
        return first, third, second, fourth


class _NormAfterTheSum(LoopLM):
    def add_normed(self, x: Array, residual: Array, name: str) -> tuple[Array, Array]:
        return self.norm(x + residual, name)


class _Interleaved(LoopLM):
    def turn(self, x: Array, position: Array) -> Array:
        return interleaved(lambda ordered: LoopLM.turn(self, ordered, position), x)


class _EpsForgotten(LoopLM):
    def __init__(self, tensors: Mapping[str, Array], config: Mapping[str, Any]) -> None:
        super().__init__(tensors, {**config, "rms_norm_eps": 0.0})


class _WrongGroup(LoopLM):
    def attend(self, q: Array, k: Array, v: Array, start: Array) -> tuple[Array, Array]:
        order = other_groups(self.heads, self.groups)
        y, lse = super().attend(q[:, :, order], k, v, start)
        return y[:, :, np.argsort(order)], lse[:, :, np.argsort(order)]


class _PaddingSeen(LoopLM):
    def attend(self, q: Array, k: Array, v: Array, start: Array) -> tuple[Array, Array]:
        return super().attend(q, k, v, np.zeros_like(start))


class _PositionsOffByOne(LoopLM):
    """The first two real tokens of a padded row share position 0."""

    def place(self, input_ids: Array, start: Array | None, past: int = 0) -> Place:
        place = super().place(input_ids, start, past)
        padded = (place.start > 0)[:, None]
        return Place(np.maximum(place.position - padded, 0), place.start)


class _OneSlotForAllLoops(LoopLM):
    def slot(self, r: int, layer: int) -> int:
        return layer


class _ExitLate(LoopLM):
    @staticmethod
    def exit_loop(exit_prob: Array, exit_threshold: float) -> Array:
        return np.minimum(LoopLM.exit_loop(exit_prob, exit_threshold) + 1, len(exit_prob) - 1)


class _RuleLate(LoopLM):
    def rule_exit(self, rule: str, threshold: float, hidden: Array) -> Array:
        return np.minimum(super().rule_exit(rule, threshold, hidden) + 1, len(hidden) - 1)


class _ChangeUnscaled(LoopLM):
    def exit_statistic(self, rule: str, hidden: Array) -> Array:
        size = np.linalg.norm(hidden, axis=-1) if rule == "change" else 1.0
        return super().exit_statistic(rule, hidden) * size


class _KLReversed(LoopLM):
    def exit_statistic(self, rule: str, hidden: Array) -> Array:
        value, logits = super().exit_statistic(rule, hidden), self.logits(hidden)
        for r in range(1, len(hidden) if rule == "kl" else 1):
            (value[r],) = ops.prediction_kl(logits[r], logits[r - 1])
        return value


class _TopLogit(LoopLM):
    def exit_statistic(self, rule: str, hidden: Array) -> Array:
        return self.logits(hidden).max(-1) if rule == "top" else super().exit_statistic(rule, hidden)


class _MarginOfProbabilities(LoopLM):
    def exit_statistic(self, rule: str, hidden: Array) -> Array:
        if rule != "margin":
            return super().exit_statistic(rule, hidden)
        logits = self.logits(hidden)
        prob = np.sort(np.exp(logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True)), axis=-1)
        return prob[..., -1] - prob[..., -2]


class _StableOneLong(LoopLM):
    """Counts the changes that did not happen instead of the loops that agree."""

    def exit_statistic(self, rule: str, hidden: Array) -> Array:
        return super().exit_statistic(rule, hidden) - (rule == "stable")


class _NoRemainder(LoopLM):
    def exit_distribution(self, gate_logit: Array) -> Array:
        exit_prob = super().exit_distribution(gate_logit)
        exit_prob[-1] *= ops.sigmoid(gate_logit[-1])
        return exit_prob


class _GradientStopsBetweenLoops(LoopLM):
    def dnext_input(self, dx: Array) -> Array:
        return np.zeros_like(dx)


class _GateDetached(LoopLM):
    def dgate_input(self, dhidden: Array) -> Array:
        return np.zeros_like(dhidden)


class _EntropyForgotten(LoopLM):
    def stage1(
        self,
        input_ids: Array,
        target: Array,
        entropy_weight: float,
        log_prior: Array | None = None,
        start: Array | None = None,
    ) -> dict[str, Any]:
        return super().stage1(input_ids, target, 0.0, log_prior, start)


@dataclasses.dataclass(frozen=True)
class ModelMutant:
    """One mistake in the whole model, and the row at which the judge should first object."""

    name: str
    model: type[LoopLM]
    first: str

    def first_failure(self) -> Row | None:
        """The first row that catches it, if any does."""
        with np.errstate(all="ignore"):
            return first_failure(compare(ReferenceCandidate(self.model, self.name)))


MODEL_MUTANTS = (
    ModelMutant("no norm between loops", _NoNormBetweenLoops, "grouped: loop2.layer1.x"),
    ModelMutant("input injected again in every loop", _InputInjectedAgain, "grouped: loop2.layer1.x"),
    ModelMutant("gate reads the state before the norm", _GateBeforeNorm, "grouped: loop1.gate_logit"),
    ModelMutant("norms of a layer swapped", _NormsSwapped, "grouped: loop1.layer1.mid"),
    ModelMutant("norm after the sum instead of before", _NormAfterTheSum, "grouped: loop1.layer1.mid"),
    ModelMutant("RoPE interleaved instead of half-split", _Interleaved, "grouped: loop1.layer1.q"),
    ModelMutant("eps forgotten", _EpsForgotten, "grouped: loop1.layer1.q"),
    ModelMutant("query heads read the wrong group", _WrongGroup, "grouped: loop1.layer1.attention"),
    ModelMutant("last loop does not take the remainder", _NoRemainder, "grouped: exit_prob"),
    ModelMutant("exit off by one", _ExitLate, "grouped: exit_loop@0"),
    ModelMutant("exit rule a loop late", _RuleLate, "grouped: exit_rule.change@0.794"),
    ModelMutant("change of the state not relative", _ChangeUnscaled, "grouped: exit_rule.change@0.794"),
    ModelMutant("KL the other way round", _KLReversed, "grouped: exit_rule.kl@0.255"),
    ModelMutant("logit taken for its probability", _TopLogit, "grouped: exit_rule.top@0.175"),
    ModelMutant("margin of probabilities", _MarginOfProbabilities, "grouped: exit_rule.margin@0.567"),
    ModelMutant("stable one loop late", _StableOneLong, "grouped: exit_rule.stable@1"),
    ModelMutant("key/value slot of the wrong loop", _OneSlotForAllLoops, "grouped: cached.prefix2.loop1.hidden"),
    ModelMutant("padding is seen", _PaddingSeen, "grouped: left padding.loop1.layer1.attention"),
    ModelMutant("positions off by one under padding", _PositionsOffByOne, "grouped: left padding.loop1.layer1.q"),
    ModelMutant("entropy forgotten", _EntropyForgotten, "grouped: stage1.objective"),
    ModelMutant(
        "gradient stops between loops", _GradientStopsBetweenLoops, "grouped: stage1.grad/model.embed_tokens.weight"
    ),
    ModelMutant("gate detached from the trunk", _GateDetached, "grouped: stage1.grad/model.embed_tokens.weight"),
)
