"""How long decoding takes under each exit rule, measured by turns: every rule once, then every rule again.

Text is given, not written: a rule that writes nonsense must not be timed on nonsense.  What is measured is one whole
step, from token to next-token logits, whatever the rule makes it compute on the way.
"""

import dataclasses
import statistics
import time
from collections.abc import Iterator, Sequence

import numpy as np

from .arrays import Floats, Ints
from .calibration import Gate
from .exits import ExitRule, bind
from .generation import Session
from .kernels import cross_entropy_forward
from .weights import Weights


@dataclasses.dataclass
class Decoded:
    """What decoding under one rule took and gave, a number per turn."""

    ms_per_token: list[float] = dataclasses.field(default_factory=list)
    loops_run: list[float] = dataclasses.field(default_factory=list)  # means
    loss: list[float] = dataclasses.field(default_factory=list)  # nats, with the keys and values that were really left

    @property
    def ms(self) -> float:
        return statistics.median(self.ms_per_token)


def with_gate(weights: Weights, gate: Gate) -> Weights:
    """The same model with another gate; everything but the gate is shared or copied, nothing is changed."""
    other = weights.copy()
    other.gate_weight[...], other.gate_bias[...] = gate.weight, gate.bias
    return other


def decode_by_turns(
    competitors: Sequence[tuple[Weights, ExitRule]], texts: Sequence[Ints], prompt: int
) -> Iterator[list[Decoded]]:
    """One turn per text (each S ids, the first `prompt` of which are fed at once): all competitors decode it.

    The order is turned round from turn to turn.  -> after each turn, everything so far, one Decoded per competitor.
    """
    found = [Decoded() for _ in competitors]
    bound = [(weights, bind(rule, weights)) for weights, rule in competitors]
    if texts:
        for weights, rule in bound:  # kernels are loaded, memory is touched: not measured
            _decode(weights, rule, texts[0][: prompt + 2], prompt)
    for turn, text in enumerate(texts):
        order = range(len(bound)) if turn % 2 == 0 else range(len(bound) - 1, -1, -1)
        for index in order:
            ms, loops_run, loss = _decode(*bound[index], text, prompt)
            found[index].ms_per_token.append(ms)
            found[index].loops_run.append(loops_run)
            found[index].loss.append(loss)
        yield found


def _decode(weights: Weights, rule: ExitRule, text: Ints, prompt: int) -> tuple[float, float, float]:
    """text: S -> milliseconds per token (median over tokens would hide the deep ones: the mean), loops run, loss."""
    loops = rule.deepest(weights.config.total_ut_steps)
    session = Session(weights, loops=loops, capacity=len(text))
    session.feed(text[None, :prompt])
    tokens = len(text) - 1 - prompt
    logits: Floats = np.empty((tokens, len(weights.head)), np.float32)
    loops_run, seconds = 0, 0.0
    for s in range(tokens):
        token = np.ascontiguousarray(text[prompt + s : prompt + s + 1], np.int64)
        began = time.perf_counter()
        exits = session.advance(token, rule)
        logits[s] = session.logits(exits, rule)[0]
        seconds += time.perf_counter() - began
        loops_run += session.loops_run
    target = np.ascontiguousarray(text[prompt + 1 :], np.int64)
    loss = float(cross_entropy_forward(logits[None], target[None])[0].mean(dtype=np.float64))
    return 1000.0 * seconds / tokens, loops_run / tokens, loss
