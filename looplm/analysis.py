"""What `inspect` and `eval` compute from a forward pass: predictions, losses and the exit law, per loop.

Logits are computed in chunks of positions; those of all loops and positions are alive only in `fixture_arrays`, whose
purpose they are.
"""

import dataclasses
import math
from collections.abc import Iterable, Sequence

import numpy as np

from .arrays import Array, Floats, Ints
from .data import Batch
from .exits import ExitRule, LearnedGate, exit_index, exit_indices
from .generation import Session
from .kernels import exit_distribution_forward
from .model import LOGIT_CHUNK, Readable, Trace, forward
from .stored import StoredWeights
from .threads import run_all, shards
from .weights import Weights

ALL_LOOPS = LearnedGate(1.0)


@dataclasses.dataclass(frozen=True)
class Inspection:
    """Everything about every position and loop, loop axis first; k is the number of best predictions kept.

    Where a position has no target (-1), its loss is NaN and its rank 0.
    """

    trace: Trace
    input_ids: Ints  # BS
    target: Ints  # BS
    rule: ExitRule
    top_ids: Ints  # RBSk, best first
    top_prob: Floats  # RBSk
    loss: Floats  # RBS, nats
    rank: Ints  # RBS, 1 = the target is the best prediction
    kl_to_last: Floats  # RBS, nats: KL(prediction of loop r || prediction of the last loop)
    change: Floats  # RBS, |state after loop r - state before it| / |state after it|
    hazard: Floats  # RBS
    exit_prob: Floats  # RBS
    exit_cdf: Floats  # RBS
    exit_index: Ints  # BS, counted from 0

    @property
    def right(self) -> Array:
        """RBS: whether the best prediction is the target."""
        return self.top_ids[..., 0] == self.target

    @property
    def exit_threshold(self) -> float | None:
        """q, where the gate alone decides."""
        return self.rule.exit_threshold if isinstance(self.rule, LearnedGate) else None

    @property
    def mean_loops(self) -> float:
        """Mean exit loop under the rule, counted from 1."""
        return float(self.exit_index.mean()) + 1.0


def next_token_target(input_ids: Ints) -> Ints:
    """The token after each position, -1 after the last.  input_ids: BS -> target: BS"""
    target = np.full_like(input_ids, -1)
    target[:, :-1] = input_ids[:, 1:]
    return target


def inspect(
    weights: Weights | StoredWeights,
    input_ids: Ints,
    target: Ints | None = None,
    *,
    rule: ExitRule = ALL_LOOPS,
    top_k: int = 5,
    loops: int | None = None,
    threads: int = 1,
) -> Inspection:
    """Run all loops over sequences and look at each.  input_ids, target: BS

    `target` defaults to the next token; a rule that reads predictions must be bound.  Ids must be below vocab_size.
    """
    if isinstance(weights, StoredWeights):
        session = Session(weights, batch=len(input_ids), loops=loops, capacity=input_ids.shape[1], threads=threads)
        trace = session.feed(input_ids)
    else:
        trace = forward(weights, input_ids, loops=loops, threads=threads)
    if target is None:
        target = next_token_target(input_ids)
    shape = trace.hidden.shape[:3]
    kept = min(top_k, weights.config.vocab_size)
    top_ids, top_prob = np.empty((*shape, kept), np.int64), np.empty((*shape, kept), np.float32)
    loss, kl_to_last = np.empty(shape, np.float32), np.empty(shape, np.float32)
    rank = np.empty(shape, np.int64)
    views = [_by_position(array) for array in (top_ids, top_prob, loss, rank, kl_to_last)]
    states, targets = _by_position(trace.hidden), target.reshape(-1)
    chunk = max(1, LOGIT_CHUNK // weights.config.vocab_size)
    for begin in range(0, targets.size, chunk):
        part = slice(begin, begin + chunk)
        last = _log_softmax(states[-1, part], weights)
        for r in range(shape[0]):
            found = _predictions(_log_softmax(states[r, part], weights), last, targets[part], kept)
            for view, values in zip(views, found, strict=True):
                view[r, part] = values
    return Inspection(
        trace=trace,
        input_ids=input_ids,
        target=target,
        rule=rule,
        top_ids=top_ids,
        top_prob=top_prob,
        loss=loss,
        rank=rank,
        kl_to_last=kl_to_last,
        change=_relative_change(trace.hidden, weights.embedded(input_ids)),
        hazard=trace.hazard,
        exit_prob=trace.exit_prob,
        exit_cdf=trace.exit_cdf,
        exit_index=exit_index(rule, states, _by_position(trace.gate_logit)).reshape(shape[1:]),
    )


def _by_position(array: Array) -> Array:
    """RBS... -> RN..., a view."""
    return array.reshape(array.shape[0], -1, *array.shape[3:])


def _log_softmax(states: Floats, weights: Readable) -> Array:
    """ND -> NV, float64: a KL divergence of nearly equal predictions is a small difference."""
    logits = weights.logits(states).astype(np.float64)
    logits -= logits.max(axis=1, keepdims=True)
    logits -= np.log(np.exp(logits).sum(axis=1, keepdims=True))
    return logits


def _predictions(log_prob: Array, last: Array, target: Ints, kept: int) -> tuple[Array, Array, Array, Array, Array]:
    """log_prob, last: NV, target: N -> best ids: Nk, their probabilities: Nk, loss: N, rank: N, KL to last: N"""
    rows = np.arange(target.size)[:, None]
    best = np.argpartition(-log_prob, kept - 1, axis=1)[:, :kept]
    best = best[rows, np.argsort(-log_prob[rows, best], axis=1, kind="stable")]
    prob = np.exp(log_prob)
    of_target = log_prob[rows, np.maximum(target, 0)[:, None]]
    counted = target >= 0
    loss = np.where(counted, -of_target[:, 0], np.nan)
    rank = np.where(counted, 1 + (log_prob > of_target).sum(axis=1), 0)
    return best, prob[rows, best], loss, rank, (prob * (log_prob - last)).sum(axis=1)


def _relative_change(hidden: Floats, embedded: Floats) -> Floats:
    """How much of each state is new: measured against the state after the loop, which the final norm keeps at one size.

    hidden: RBSD, embedded: BSD (what loop 1 starts from) -> RBS
    """
    before = np.concatenate([embedded[None], hidden[:-1]])
    return np.linalg.norm(hidden - before, axis=-1) / np.maximum(np.linalg.norm(hidden, axis=-1), np.float32(1e-12))


def fixture_arrays(inspection: Inspection) -> dict[str, Array]:
    """The raw arrays under the names and shapes of the fixture format, so that `looplm verify` can judge them.

    `loss` is that of the next token, whatever the inspection's targets were.
    """
    trace, ids = inspection.trace, inspection.input_ids
    loops = trace.hidden.shape[0]
    logits = np.stack([trace.logits(r) for r in range(loops)])
    exit_prob = inspection.exit_prob
    at_exit = np.take_along_axis(logits, inspection.exit_index[None, ..., None], axis=0)[0]
    arrays: dict[str, Array] = {
        "input_ids": ids,
        "hidden": trace.hidden,
        "logits": logits,
        "gate_logit": trace.gate_logit,
        "exit_prob": exit_prob,
        f"exit_logits@{_threshold_name(inspection)}": at_exit,
        "expected_logits": np.einsum("rbs,rbsv->bsv", exit_prob, logits),
    }
    if ids.shape[1] > 1:
        arrays["loss"] = trace.token_loss(next_token_target(ids))[:, :, :-1]
    return arrays


def _threshold_name(inspection: Inspection) -> str:
    """The fixture format's name of a threshold of the gate; another rule's name is one that `verify` will ignore."""
    q = inspection.exit_threshold
    return str(inspection.rule) if q is None else f"{q:.12g}"


@dataclasses.dataclass(frozen=True)
class AtRule:
    """What one exit rule costs and gives, over counted positions."""

    rule: ExitRule
    mean_loops: float
    loss: float  # nats per token
    accuracy: float
    exits: Array  # R, share of tokens that stop after each loop


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """Means over all counted positions of some batches.

    `loss` and `accuracy` have one entry per loop that was run, perhaps more than the model was trained with;
    `exit_prob` and `hazard` one per loop of the model's own.
    """

    tokens: int
    loss: Array
    accuracy: Array
    exit_prob: Array
    hazard: Array
    at: tuple[AtRule, ...]
    bytes_per_token: float | None = None  # None where bits per byte mean nothing

    def bits_per_byte(self, loss: float) -> float | None:
        """A loss in nats per token as bits per byte of text."""
        return None if not self.bytes_per_token else float(loss) / math.log(2.0) / self.bytes_per_token


def evaluate(
    weights: Weights,
    batches: Iterable[Batch],
    *,
    max_loops: int | None = None,
    rules: Sequence[ExitRule] = (),
    bytes_per_token: float | None = None,
    threads: int = 1,
) -> Evaluation:
    """Loss and accuracy at every depth up to `max_loops`, and under exit rules with the loops they cost.

    Rules speak of the model's own loops: the last of them takes all that is left, so depths beyond them are never an
    exit.  Rules that read predictions must be bound, to one readout if they are to share it.
    """
    depth = weights.config.total_ut_steps if max_loops is None else max_loops
    own = min(depth, weights.config.total_ut_steps)
    sums = _Sums.zeros(depth, own, len(rules))
    for batch in batches:

        def work(rows: slice, batch: Batch = batch) -> _Sums:
            return _measure(weights, batch, rows, depth, own, rules)

        for part in run_all(work, shards(len(batch.input_ids), threads)):
            sums = sums.plus(part)
    count = max(1, sums.tokens)
    at = tuple(
        AtRule(
            rule=rule,
            mean_loops=float(sums.exits[i] @ np.arange(1, own + 1)) / count,
            loss=float(sums.exit_loss[i]) / count,
            accuracy=float(sums.exit_right[i]) / count,
            exits=sums.exits[i] / count,
        )
        for i, rule in enumerate(rules)
    )
    means = (sums.loss / count, sums.right / count, sums.exit_prob / count, sums.hazard / count)
    return Evaluation(sums.tokens, *means, at, bytes_per_token)


@dataclasses.dataclass(frozen=True)
class _Sums:
    """Over counted positions; float64, Q for the rules."""

    tokens: int
    loss: Array  # R
    right: Array  # R
    exit_prob: Array  # R
    hazard: Array  # R
    exits: Array  # QR
    exit_loss: Array  # Q
    exit_right: Array  # Q

    @classmethod
    def zeros(cls, depth: int, own: int, rules: int) -> "_Sums":
        shapes = ((depth,), (depth,), (own,), (own,), (rules, own), (rules,), (rules,))
        return cls(0, *map(np.zeros, shapes))

    def plus(self, other: "_Sums") -> "_Sums":
        names = [field.name for field in dataclasses.fields(self)]
        return _Sums(*(getattr(self, name) + getattr(other, name) for name in names))


def _measure(weights: Weights, batch: Batch, rows: slice, depth: int, own: int, rules: Sequence[ExitRule]) -> _Sums:
    """Run some rows of a batch and add up what is asked for."""
    start = None if batch.start is None else batch.start[rows]
    trace = forward(weights, batch.input_ids[rows], loops=depth, start=start)
    target = np.ascontiguousarray(batch.target[rows])
    counted = target >= 0
    right = np.zeros((depth, target.size), bool)

    def compare(r: int, part: slice, logits: Floats) -> None:
        right[r, part] = logits.argmax(axis=1) == target.reshape(-1)[part]

    loss = trace.token_loss(target, compare)[:, counted]
    right = right.reshape(depth, *target.shape)[:, counted]
    (exit_prob, _) = exit_distribution_forward(np.ascontiguousarray(trace.gate_logit[:own]))
    exits, exit_loss, exit_right = [], [], []
    for index in exit_indices(
        rules, trace.hidden[:own, counted], np.ascontiguousarray(trace.gate_logit[:own, counted])
    ):
        exits.append(np.bincount(index, minlength=own).astype(np.float64))
        exit_loss.append(np.take_along_axis(loss, index[None], axis=0).sum(dtype=np.float64))
        exit_right.append(np.take_along_axis(right, index[None], axis=0).sum(dtype=np.float64))
    return _Sums(
        tokens=int(counted.sum()),
        loss=loss.sum(axis=1, dtype=np.float64),
        right=right.sum(axis=1, dtype=np.float64),
        exit_prob=exit_prob[:, counted].sum(axis=1, dtype=np.float64),
        hazard=trace.hazard[:own, counted].sum(axis=1, dtype=np.float64),
        exits=np.array(exits).reshape(len(rules), own),
        exit_loss=np.array(exit_loss),
        exit_right=np.array(exit_right),
    )
