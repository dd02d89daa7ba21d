"""The gradient of a training objective: the hand-written backward pass through all loops.

Backward needs what every application of a layer left behind, and each loop applies all layers again: most of a
training's memory.  A workspace may keep less and run layers again from what it did keep, which gives the same bits:

none    everything is kept
loop    the state between loops is kept, and the activations of one loop; each other loop runs again before its backward
layer   the input of every layer in every loop is kept, and the activations of one layer; each layer runs again
"""

import dataclasses
from typing import Any

import numpy as np

from .arrays import Floats, Ints, aligned_empty
from .config import ModelConfig
from .kernels import cross_entropy, embedding, gate_forward, rmsnorm
from .kernels.product.select import PATHS, Path
from .layer import Placement, layer_backward
from .model import LOGIT_CHUNK, Tape, run_layers, run_loops
from .objectives import StageOne
from .threads import run_all, shards
from .weights import Weights, matrix_shapes


@dataclasses.dataclass(frozen=True)
class GradientReport:
    """Sums over counted positions of a batch; divide by `tokens` for means."""

    objective: float
    loss: Floats  # R, nats
    exit_prob: Floats  # R
    tokens: int


class Shard:
    """One thread's buffers for some rows of a batch: a tape, and what backward adds to it."""

    def __init__(self, config: ModelConfig, batch: int, length: int, recompute: str, path: Path) -> None:
        loops, width, vocab = config.total_ut_steps, config.hidden_size, config.vocab_size
        rows = batch * length
        self.products = path.products(matrix_shapes(config))
        self.tape = Tape(config, aligned_empty((loops, batch, length, width)), recompute, self.products)
        self.dhidden = aligned_empty((loops, rows, width))
        self.dx = aligned_empty((rows, width))
        self.loss = aligned_empty((loops, rows))
        self.logits = aligned_empty((min(rows, max(1, LOGIT_CHUNK // vocab)), vocab))


def _matrices(weights: Weights) -> dict[str, Floats]:
    found: dict[str, Floats] = {}
    weights.with_matrices(lambda name, matrix: found.setdefault(name, matrix))
    return found


class GradientWorkspace:
    """Buffers for `gradient` on batches of one shape, made once: per thread a shard and a gradient of its own.

    `recompute` is none, loop or layer; it changes memory and time, never a bit of the result.  `path` multiplies.
    """

    def __init__(
        self,
        config: ModelConfig,
        batch: int,
        length: int,
        threads: int,
        recompute: str = "none",
        path: Path = PATHS["panels"],
    ) -> None:
        self.path = path
        self.parts = shards(batch, threads)
        self.shards = [Shard(config, part.stop - part.start, length, recompute, path) for part in self.parts]
        self.gradients = [Weights.zeros(config) for _ in self.parts]
        self.rooms = {name: path.room(matrix.shape) for name, matrix in _matrices(self.gradients[0]).items()}

    def packed(self, weights: Weights) -> Weights:
        """The weights as the products read them: packed once for all loops, forward and backward."""
        matrices = _matrices(weights)
        packed: dict[str, Any] = {}

        def pack(names: list[str]) -> None:
            for name in names:
                packed[name] = self.path.pack(matrices[name], self.rooms[name])

        names, threads = list(matrices), len(self.parts)
        run_all(pack, [names[first::threads] for first in range(threads)])
        return weights.with_matrices(lambda name, matrix: packed[name])

    @property
    def total(self) -> Weights:
        """Where `gradient` leaves its result."""
        return self.gradients[0]


def gradient(
    weights: Weights,
    workspace: GradientWorkspace,
    input_ids: Ints,
    target: Ints,
    objective: StageOne,
    start: Ints | None = None,
) -> GradientReport:
    """Gradient of the mean objective over counted positions (target >= 0), left in `workspace.total`.

    input_ids, target: BS.  The result is the same bits for the same number of threads and the same path.
    """
    counted = max(1, int((target >= 0).sum()))
    weights = workspace.packed(weights)

    def work(index: int) -> GradientReport:
        rows, shard, dweights = workspace.parts[index], workspace.shards[index], workspace.gradients[index]
        ids, wanted = np.ascontiguousarray(input_ids[rows]), np.ascontiguousarray(target[rows]).reshape(-1)
        place = Placement.of(weights.config, len(ids), ids.shape[1], None if start is None else start[rows])
        dweights.contiguous()[:] = 0.0
        run_loops(weights, shard.tape, ids, place)
        report = _loss_and_dhidden(weights, dweights, shard, wanted, objective, 1.0 / counted)
        _backward_through_loops(weights, dweights, shard, ids, place)
        return report

    reports = run_all(work, list(range(len(workspace.parts))))
    total = workspace.total.contiguous()
    for other in workspace.gradients[1:]:
        np.add(total, other.contiguous(), out=total)
    return GradientReport(
        objective=sum(report.objective for report in reports),
        loss=np.sum([report.loss for report in reports], axis=0),
        exit_prob=np.sum([report.exit_prob for report in reports], axis=0),
        tokens=sum(report.tokens for report in reports),
    )


def _loss_and_dhidden(
    weights: Weights, dweights: Weights, shard: Shard, target: Ints, objective: StageOne, scale: float
) -> GradientReport:
    """Losses of all loops and, in the same pass over chunks of logits, the gradients of head, gate and states.

    The weight of each loop's loss is the exit probability, known from the gate before any logit is.
    """
    loops, rows, width = shard.dhidden.shape
    hidden, loss, products = shard.tape.hidden.reshape(loops, rows, width), shard.loss, shard.products
    (gate_logit,) = gate_forward(hidden, weights.gate_weight, weights.gate_bias)
    counted = target >= 0
    exit_prob = objective.loss_weight(gate_logit)
    dloss = exit_prob * np.float32(scale)
    chunk = len(shard.logits)
    for r in range(loops):
        for begin in range(0, rows, chunk):
            part = slice(begin, min(begin + chunk, rows))
            logits = shard.logits[: part.stop - begin]
            products.forward_into(logits, hidden[r, part], weights.head)
            cross_entropy.loss_and_gradient_in_place(loss[r, part], logits, dloss[r, part], target[part])
            products.dx_into(shard.dhidden[r, part], logits, weights.head)
            products.accumulate_dweight(dweights.head, logits, hidden[r, part])
    value, dgate_logit = objective.value_and_dgate(loss, gate_logit)
    dgate_logit *= np.float32(scale) * counted
    _gate_backward(weights, dweights, shard, dgate_logit)
    return GradientReport(
        objective=float(value[counted].sum(dtype=np.float64)),
        loss=loss.sum(1),
        exit_prob=exit_prob[:, counted].sum(1),
        tokens=int(counted.sum()),
    )


def _gate_backward(weights: Weights, dweights: Weights, shard: Shard, dgate_logit: Floats) -> None:
    """`kernels.gate_backward`, adding to what is there: its dhidden would be a temporary of the size of all states."""
    loops, rows, width = shard.dhidden.shape
    branch = shard.dx  # holds nothing until the backward pass begins
    for r in range(loops):
        np.multiply(dgate_logit[r, :, None], weights.gate_weight[0], out=branch)
        np.add(shard.dhidden[r], branch, out=shard.dhidden[r])
    dweights.gate_weight[0] += np.matmul(dgate_logit.reshape(-1), shard.tape.hidden.reshape(loops * rows, width))
    dweights.gate_bias[0] += dgate_logit.sum()


def _backward_through_loops(
    weights: Weights, dweights: Weights, shard: Shard, input_ids: Ints, place: Placement
) -> None:
    """From the gradients of all states back to the embedding; each loop adds to the same shared tensors."""
    config, layers, tape, dx = weights.config, weights.layers, shard.tape, shard.dx
    every = len(tape.hidden) * len(layers)
    for application in range(every - 1, -1, -1):
        r, index = divmod(application, len(layers))
        after = application + 1
        if after < every and after % tape.kept == 0:  # the block that ends here was overwritten by the one after it
            run_layers(weights, tape, range(after - tape.kept, after), place)
        if index == len(layers) - 1:
            if after < every:  # this state was also the next loop's input
                np.add(shard.dhidden[r], dx, out=shard.dhidden[r])
            last = tape.output(application)
            rmsnorm.backward_into(dx, dweights.norm, shard.dhidden[r], last, weights.norm, tape.rrms[r], False)
        x, saved = tape.input(application), tape.saved(application)
        layer_backward(dx, dweights.layers[index], layers[index], config, x, saved, tape.scratch, place)
    embedding.scatter_add_into(dweights.embedding, dx, input_ids.reshape(-1))
