"""What a model answers on a task's new sequences: accuracy by difficulty and loop, and where it would stop."""

import dataclasses

import numpy as np

from ..arrays import Array, Floats, Ints
from ..kernels import exit_loop
from ..model import forward
from ..weights import Weights
from .hops import HopsSource, accuracy_by_hop_and_loop, hops_of, mean_by_hop

SCORED_BATCHES = 24


@dataclasses.dataclass(frozen=True)
class HopsAnswers:
    """predictions: RBS, hidden: RBSD, target: BS, hops: B (1 to max_hops), over several batches laid end to end."""

    predictions: Ints
    hidden: Floats
    target: Ints
    hops: Ints
    max_hops: int

    def accuracy(self) -> Array:
        """One row per number of hops, one column per loop."""
        return accuracy_by_hop_and_loop(self.predictions, self.target, self.hops, self.max_hops)

    def at_threshold(self, exit_prob: Floats, q: float) -> tuple[Array, Array]:
        """Mean exit loop (from 1) and accuracy by number of hops, when every position stops by q.  exit_prob: RBS."""
        (stop,) = exit_loop(exit_prob, q)
        right = np.take_along_axis(self.predictions, stop[None], axis=0)[0] == self.target
        loops, accuracy = (mean_by_hop(x, self.target, self.hops, self.max_hops) for x in (stop + 1.0, right))
        return loops, accuracy


def answer(weights: Weights, source: HopsSource, batches: int = SCORED_BATCHES, threads: int = 1) -> HopsAnswers:
    """Run the model on sequences that no step trained on."""
    predictions, hidden, targets, hops = [], [], [], []
    for batch in source.validation(batches):
        trace = forward(weights, batch.input_ids, threads=threads)
        best: Ints = np.empty(trace.hidden.shape[:3], np.int64)
        flat = best.reshape(len(best), -1)

        def keep(r: int, part: slice, logits: Floats, flat: Ints = flat) -> None:
            flat[r, part] = logits.argmax(axis=1)

        trace.token_loss(batch.target, keep)
        predictions.append(best)
        hidden.append(trace.hidden)
        targets.append(batch.target)
        hops.append(hops_of(batch.input_ids))
    return HopsAnswers(
        np.concatenate(predictions, axis=1),
        np.concatenate(hidden, axis=1),
        np.concatenate(targets),
        np.concatenate(hops),
        source.settings["max_hops"],
    )
