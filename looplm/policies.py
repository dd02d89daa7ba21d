"""What each cache policy costs and gives: the same texts decoded under all of them by turns.

Texts are given, so every policy predicts the same targets after the same past; `full` is what the others are held
against.
"""

import dataclasses
import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from .cache import POLICIES, Policy
from .data import Batch
from .exits import ExitRule
from .pareto import half_width
from .stored import StoredWeights
from .timing import Walk, decode
from .weights import Weights

Walks = Mapping[Policy, list[Walk]]  # a walk per text


@dataclasses.dataclass(frozen=True)
class PolicyFigures:
    """One policy over all texts.  Changes and ratios are against `full`, text by text."""

    policy: Policy
    bytes_per_token: float
    loss: float  # nats
    loss_change: float
    loss_interval: float  # half the 95 % interval of the change; infinite for a single text
    accuracy: float
    agreement: float  # share of positions whose best token is the same
    mean_loops: float  # before a token is predicted
    passes: float  # over the weights, per token
    tokens_per_s: float  # median over texts
    speed: float  # median ratio to `full`


def walk_all(
    weights: Weights | StoredWeights, rule: ExitRule, texts: Sequence[Batch], prompt: int, **session_options: Any
) -> Iterator[Walks]:
    """Every text (its first `prompt` ids fed at once) under every policy -> after each, everything so far.

    The order is turned round from text to text.  The options are those of a Session.
    """
    found: dict[Policy, list[Walk]] = {policy: [] for policy in POLICIES}
    for policy in POLICIES if texts else ():  # kernels are loaded, memory is touched: not measured
        decode(weights, rule, texts[0].positions(prompt + 1), prompt, policy=policy, **session_options)
    for turn, text in enumerate(texts):
        for policy in POLICIES if turn % 2 == 0 else reversed(POLICIES):
            found[policy].append(decode(weights, rule, text, prompt, policy=policy, **session_options))
        yield found


def figures(walks: Walks) -> list[PolicyFigures]:
    """Every policy against `full`."""
    return [_figures(policy, own, walks["full"]) for policy, own in walks.items()]


def _figures(policy: Policy, own: list[Walk], full: list[Walk]) -> PolicyFigures:
    pairs = list(zip(own, full, strict=True))
    loss = [walk.loss.mean(dtype=np.float64) for walk in own]
    change = [a.loss.mean(dtype=np.float64) - b.loss.mean(dtype=np.float64) for a, b in pairs]
    return PolicyFigures(
        policy,
        statistics.fmean(walk.cache_bytes for walk in own),
        statistics.fmean(loss),
        statistics.fmean(change),
        half_width(change),
        statistics.fmean(walk.accuracy for walk in own),
        statistics.fmean(float((a.best == b.best).mean()) for a, b in pairs),
        statistics.fmean(walk.loops_run for walk in own),
        statistics.fmean(walk.passes for walk in own),
        statistics.median(1000.0 / walk.ms for walk in own),
        statistics.median(b.ms / a.ms for a, b in pairs),
    )
