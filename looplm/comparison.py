"""Two versions of one model side by side on the same text: how far states and logits part by loop, and the losses.

Errors made in one loop go into the next, which applies the same weights again; so everything is reported per loop.
"""

import dataclasses
from collections.abc import Iterable

import numpy as np

from .arrays import Array, Floats, Ints
from .data import Batch
from .kernels import cross_entropy
from .model import LOGIT_CHUNK, forward
from .threads import run_all, shards
from .weights import Weights


@dataclasses.dataclass(frozen=True)
class Comparison:
    """One entry per loop, over all counted positions.  Errors are rms(after - before) / rms(before)."""

    tokens: int
    hidden_error: Array  # R
    logits_error: Array  # R
    loss_before: Array  # R, nats per token
    loss_after: Array  # R
    same_best: Array  # R, share of positions where both predict the same token

    @property
    def loss_change(self) -> Array:
        """R: relative change of the loss; above 0 is worse."""
        return self.loss_after / self.loss_before - 1.0


# Sums over counted positions, by loop: squares of the states' difference and of the states, the same of the logits,
# both losses, equal predictions.
_SUMS = 7


def compare(before: Weights, after: Weights, batches: Iterable[Batch], threads: int = 1) -> Comparison:
    """Run both over some batches."""
    sums, tokens = np.zeros((_SUMS, before.config.total_ut_steps)), 0
    for batch in batches:

        def work(rows: slice, batch: Batch = batch) -> Array:
            start = None if batch.start is None else batch.start[rows]
            target = np.ascontiguousarray(batch.target[rows])
            return _measure(before, after, batch.input_ids[rows], target, start)

        sums += sum(run_all(work, shards(len(batch.input_ids), threads)))
        tokens += int((batch.target >= 0).sum())
    count = max(1, tokens)
    with np.errstate(invalid="ignore", divide="ignore"):
        hidden, logits = np.sqrt(sums[0] / sums[1]), np.sqrt(sums[2] / sums[3])
    return Comparison(tokens, hidden, logits, sums[4] / count, sums[5] / count, sums[6] / count)


def _measure(before: Weights, after: Weights, ids: Ints, target: Ints, start: Ints | None) -> Array:
    """What `_SUMS` lists: 7R."""
    counted = target >= 0
    pair = [forward(weights, ids, start=start).hidden[:, counted] for weights in (before, after)]
    targets = target[counted]
    sums = np.zeros((_SUMS, len(pair[0])))
    chunk = max(1, LOGIT_CHUNK // before.head.shape[0])
    for r in range(len(pair[0])):
        for begin in range(0, targets.size, chunk):
            part = slice(begin, begin + chunk)
            old, new = (hidden[r, part] for hidden in pair)
            sums[0:2, r] += _squares(old, new)
            old, new = old @ before.head.T, new @ after.head.T
            sums[2:4, r] += _squares(old, new)
            sums[4, r] += _loss(old, targets[part])
            sums[5, r] += _loss(new, targets[part])
            sums[6, r] += (old.argmax(axis=1) == new.argmax(axis=1)).sum()
    return sums


def _squares(old: Floats, new: Floats) -> tuple[float, float]:
    return float(np.square(new - old, dtype=np.float64).sum()), float(np.square(old, dtype=np.float64).sum())


def _loss(logits: Floats, target: Ints) -> float:
    loss, lse = np.empty(len(target), np.float32), np.empty(len(target), np.float32)
    cross_entropy.loss_into(loss, lse, logits, target)
    return float(loss.sum(dtype=np.float64))
