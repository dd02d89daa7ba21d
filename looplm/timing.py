"""How long decoding takes under each exit rule, measured by turns: every rule once, then every rule again.

`decode` walks one text; cache policies are measured with it, too (policies.py).

A text is given (a Batch of one row: ids, and what they are held against), not written: a rule that writes nonsense must
not be timed on nonsense.  What is measured is one whole step, from token to logits, whatever the rule makes it compute
on the way.
"""

import dataclasses
import statistics
import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from .arrays import Floats, Ints
from .calibration import Gate
from .data import Batch
from .exits import ExitRule, bind
from .generation import Session
from .kernels import cross_entropy_forward
from .stored import StoredWeights
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


@dataclasses.dataclass(frozen=True)
class Walk:
    """One text decoded position by position: what that took and gave, at its N positions that have a target."""

    loss: Floats  # N, nats
    best: Ints  # N, the most likely token
    accuracy: float  # share of the N where that is the target
    tokens: int  # decoded, with a target or without
    seconds: float
    loops_run: float  # mean
    passes: float  # over the weights per position, those for deferred loops alone included
    cache_bytes: float  # of keys and values per position there is room for, as held in the end

    @property
    def ms(self) -> float:
        """Milliseconds per position: the mean, since a median would hide the deep ones."""
        return 1000.0 * self.seconds / self.tokens


def with_gate(weights: Weights, gate: Gate) -> Weights:
    """The same model with another gate; everything but the gate is shared or copied, nothing is changed."""
    other = weights.copy()
    other.gate_weight[...], other.gate_bias[...] = gate.weight, gate.bias
    return other


def decode_by_turns(
    competitors: Sequence[tuple[Weights, ExitRule]], texts: Sequence[Batch], prompt: int
) -> Iterator[list[Decoded]]:
    """One turn per text (the first `prompt` ids of which are fed at once): all competitors decode it.

    The order is turned round from turn to turn.  -> after each turn, everything so far, one Decoded per competitor.
    """
    found = [Decoded() for _ in competitors]
    bound = [(weights, bind(rule, weights)) for weights, rule in competitors]
    if texts:
        for weights, rule in bound:  # kernels are loaded, memory is touched: not measured
            decode(weights, rule, texts[0].positions(prompt + 1), prompt)
    for turn, text in enumerate(texts):
        order = range(len(bound)) if turn % 2 == 0 else range(len(bound) - 1, -1, -1)
        for index in order:
            walk = decode(*bound[index], text, prompt)
            found[index].ms_per_token.append(walk.ms)
            found[index].loops_run.append(walk.loops_run)
            found[index].loss.append(float(walk.loss.mean(dtype=np.float64)))
        yield found


def decode(weights: Weights | StoredWeights, rule: ExitRule, text: Batch, prompt: int, **session_options: Any) -> Walk:
    """Feed the first `prompt` ids of a text and decode the rest; the options are those of a Session."""
    ids, target = text.input_ids[0], np.ascontiguousarray(text.target[0, prompt:])
    loops = rule.deepest(weights.config.total_ut_steps)
    session = Session(weights, loops=loops, capacity=len(ids), **session_options)
    session.feed(ids[None, :prompt])
    tokens = len(ids) - prompt
    logits: Floats = np.empty((tokens, weights.config.vocab_size), np.float32)
    loops_run, seconds = 0, 0.0
    for s in range(tokens):
        token = np.ascontiguousarray(ids[prompt + s : prompt + s + 1], np.int64)
        began = time.perf_counter()
        exits = session.advance(token, rule)
        logits[s] = session.logits(exits, rule)[0]
        seconds += time.perf_counter() - began
        loops_run += session.loops_run
    counted, best = target >= 0, logits.argmax(axis=1)
    late, cache = session.deferral.passes if session.deferral else 0, session.cache
    return Walk(
        cross_entropy_forward(logits[None], target[None])[0][0, counted],
        best[counted],
        float((best == target)[counted].mean()),
        tokens,
        seconds,
        loops_run / tokens,
        (loops_run + late) / tokens,
        (cache.keys.nbytes + cache.values.nbytes) / cache.capacity,
    )
