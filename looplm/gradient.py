"""The gradient of a training objective: the hand-written backward pass through all loops.

Backward needs what every application of a layer left behind, and each loop applies all layers again: most of a
training's memory.  What a cheap pass over the rest brings back is never kept (normed and activated values, sums with a
residual); a workspace may keep less still and run layers again, which gives the same bits:

none    nothing runs again
loop    the state between loops is kept, and the activations of one loop; each other loop runs again before its backward
layer   the input of every layer in every loop is kept, and the activations of one layer; each layer runs again

Where nothing runs again, activations are read once, from the last to the first: the gradient, which grows meanwhile,
lies where they lay (`gradient_begins`).
"""

import dataclasses
from typing import Any

import numpy as np

from .arrays import Floats, Ints, aligned_empty, lined_up
from .config import ModelConfig
from .kernels import cross_entropy, embedding, gate_forward, rmsnorm
from .kernels.product import Use
from .kernels.product.select import PATHS, Path
from .layer import Activations, Placement, layer_backward
from .model import LOGIT_CHUNK, Tape, add_up_layers, run_layers, run_loops, tape_sizes
from .objectives import StageOne
from .threads import even_shares, run_all, shards
from .weights import LAYER_MATRICES, Weights, matrix_shapes, parameter_count, sections

LOGIT_ROWS = 512  # at least so many positions have logits together: each such run reads and writes the head's gradient


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
        rows, size = batch * length, parameter_count(config)
        self.products = path.products(matrix_shapes(config))
        begin, end = gradient_begins(config, rows, recompute)
        behind, hidden = max(0, begin + size - end), aligned_empty((loops, batch, length, width))
        self.tape = Tape(config, hidden, recompute, self.products, behind)
        self.gradient = self.tape.memory[begin : begin + size]
        self.dhidden = aligned_empty((loops, rows, width))
        self.dx = aligned_empty((rows, width))
        self.loss = aligned_empty((loops, rows))
        self.logits = aligned_empty((min(rows, max(LOGIT_ROWS, LOGIT_CHUNK // vocab)), vocab))


def gradient_begins(config: ModelConfig, rows: int, recompute: str) -> tuple[int, int]:
    """The element of a tape's memory where the flat gradient may begin, and the one where activations end.

    What is behind the layers is added to from the start, and must lie behind all activations; so must an embedding that
    is the head too.  A layer's gradient is first added to when the layer's last application is next, in whose place and
    before which activations still count.  The embedding's comes when none does.
    """
    layers, part = config.num_hidden_layers, sections(config)
    each, (kept, _) = Activations.elements(config, rows), tape_sizes(config.total_ut_steps, layers, recompute)
    if recompute != "none" or config.tie_word_embeddings:
        return kept * each, kept * each
    free = [(kept - layers + index + 1) * each - layer.start for index, layer in enumerate(part.layers)]
    return lined_up(max(0, *free, kept * each - part.rest.start)), kept * each


def packing_rooms(config: ModelConfig, path: Path, recompute: str) -> dict[str, Any]:
    """What every matrix is packed into, by the names of `Weights.with_matrices`.

    Where no layer runs again, its backward products begin when all its forward ones are done: the weight is packed for
    the ones and for the others at that moment, into the same memory.  The head's take turns all the time.
    """
    *of_layer, head = matrix_shapes(config)
    named = [
        (f"{index}.{name}", shape)
        for index in range(config.num_hidden_layers)
        for name, shape in zip(LAYER_MATRICES, of_layer, strict=True)
    ]
    return {name: path.room(shape, recompute != "none") for name, shape in named} | {"head": path.room(head, True)}


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
        self.path, self.in_turn = path, recompute == "none"
        self.parts = shards(batch, threads)
        self.shards = [Shard(config, part.stop - part.start, length, recompute, path) for part in self.parts]
        self.gradients = [Weights.from_flat(config, shard.gradient) for shard in self.shards]
        self.rooms = packing_rooms(config, path, recompute)

    def packed(self, weights: Weights) -> Weights:
        """The weights as the products of all loops read them; those of layers forward only if `in_turn`."""
        return self._packed(weights, list(self.rooms), "forward" if self.in_turn else "both")

    def packed_for_backward(self, weights: Weights, packed: Weights) -> Weights:
        """The same for the layers' backward pass; `packed` is of no more use then."""
        if not self.in_turn:
            return packed
        return self._packed(weights, [name for name in self.rooms if name != "head"], "backward")

    def _packed(self, weights: Weights, names: list[str], use: Use) -> Weights:
        matrices: dict[str, Floats] = {}
        weights.with_matrices(lambda name, matrix: matrices.setdefault(name, matrix))
        packed: dict[str, Any] = {}

        def pack(share: list[str]) -> None:
            for name in share:
                packed[name] = self.path.pack(matrices[name], self.rooms[name], "both" if name == "head" else use)

        run_all(pack, even_shares({name: matrices[name].size for name in names}, len(self.parts)))
        return weights.with_matrices(lambda name, matrix: packed.get(name, matrix))

    @property
    def total(self) -> Weights:
        """Where `gradient` leaves its result, until it is called again."""
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
    packed, every = workspace.packed(weights), list(range(len(workspace.parts)))
    ids = [np.ascontiguousarray(input_ids[rows]) for rows in workspace.parts]
    starts = [None if start is None else start[rows] for rows in workspace.parts]
    places = [
        Placement.of(weights.config, len(own), own.shape[1], first) for own, first in zip(ids, starts, strict=True)
    ]

    def forward_part(index: int) -> GradientReport:
        rows, shard, dweights = workspace.parts[index], workspace.shards[index], workspace.gradients[index]
        run_loops(packed, shard.tape, ids[index], places[index])
        wanted = np.ascontiguousarray(target[rows]).reshape(-1)
        for tensor in (dweights.norm, dweights.gate_weight, dweights.gate_bias):
            tensor[...] = 0.0
        return _loss_and_dhidden(packed, dweights, shard, wanted, objective, 1.0 / counted)

    reports = run_all(forward_part, every)
    packed = workspace.packed_for_backward(weights, packed)

    def backward_part(index: int) -> None:
        shard, dweights = workspace.shards[index], workspace.gradients[index]
        _backward_through_loops(packed, dweights, shard, ids[index], places[index])

    run_all(backward_part, every)
    flat = [own.contiguous() for own in workspace.gradients]

    def add_up(part: slice) -> None:
        for other in flat[1:]:
            np.add(flat[0][part], other[part], out=flat[0][part])

    run_all(add_up, shards(flat[0].size, len(flat)))
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
            products.dweight_into(dweights.head, logits, hidden[r, part], r > 0 or begin > 0)
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
    every, part, flat = len(tape.hidden) * len(layers), sections(config), shard.gradient
    for application in range(every - 1, -1, -1):
        r, index = divmod(application, len(layers))
        after = application + 1
        if after < every and after % tape.kept == 0:  # the block that ends here was overwritten by the one after it
            run_layers(weights, tape, range(after - tape.kept, after), place)
        elif after < every and after % len(layers) == 0:  # outputs alone were, by those of the next loop
            add_up_layers(weights, tape, range(after - len(layers), after))
        if index == len(layers) - 1:
            if after < every:  # this state was also the next loop's input
                np.add(shard.dhidden[r], dx, out=shard.dhidden[r])
            last = tape.output(application)
            rmsnorm.backward_into(dx, dweights.norm, shard.dhidden[r], last, weights.norm, tape.rrms[r], False)
        x, saved = tape.input(application), tape.saved(application)
        again = after <= every - len(layers)  # the first time, activations may lie where the gradient will
        layer_backward(dx, dweights.layers[index], layers[index], config, x, saved, tape.scratch, place, again)
    if not config.tie_word_embeddings:
        flat[part.embedding] = 0.0
    embedding.scatter_add_into(dweights.embedding, dx, input_ids.reshape(-1))
