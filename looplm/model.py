"""The whole LoopLM, forward: one stack of layers applied R times, with the final norm inside the loop.

`forward` gives a Trace: the state after every loop, and on demand logits, losses and the exit law.  The logits of all
loops are never alive at once.  The backward pass is in gradient.py.

Source: Section 3.1 and Algorithm 1; the norm between loops is in the published code, not in the paper's formula.
"""

from collections.abc import Callable
from typing import Protocol

import numpy as np

from .arrays import Floats, Ints, aligned_empty
from .config import ModelConfig
from .kernels import cross_entropy, embedding, exit_distribution_forward, exit_loop, gate_forward, rmsnorm
from .kernels.product import Products
from .layer import Activations, Placement, Scratch, layer_forward, layer_output
from .threads import run_all, shards
from .weights import LayerWeights, Weights

LOGIT_CHUNK = 1 << 19  # logits alive at once in one thread (2 MiB): a whole vocabulary for a few hundred positions

Taps = list[tuple[str, Floats]]  # intermediate arrays by name, in forward order


def tape_sizes(loops: int, layers: int, recompute: str | None) -> tuple[int, int]:
    """Of how many applications of a layer the activations are kept, and of how many the outputs."""
    every = loops * layers
    return {None: (1, 2), "none": (every, layers), "loop": (layers, layers), "layer": (1, every)}[recompute]


class Tape:
    """The buffers of one shard's forward pass, and what of it is still there when a backward pass begins.

    The R * L applications of a layer are numbered in forward order.  Activations of the last `kept` of them are in
    memory, each following block of `kept` overwriting the one before.  Outputs of layers are overwritten as well: where
    all activations are kept, those of a whole loop come back by sums alone (`add_up_layers`).
    """

    def __init__(
        self,
        config: ModelConfig,
        hidden: Floats,
        recompute: str | None = None,
        products: Products | None = None,
        behind: int = 0,
    ) -> None:
        """`hidden` (RBSD) will hold the state after each loop.  `recompute` as in TrainConfig; None: no backward.

        `memory` has room for so many elements `behind` all activations.
        """
        loops, batch, length, width = hidden.shape
        rows, layers = batch * length, config.num_hidden_layers
        self.kept, outputs = tape_sizes(loops, layers, recompute)
        self._layers = layers
        self.hidden = hidden
        self.rrms = aligned_empty((loops, rows))  # of the norm that ends each loop
        self.embedded = aligned_empty((rows, width))
        each = Activations.elements(config, rows)
        self.memory = aligned_empty((self.kept * each + behind,))
        self.activation_elements = self.kept * each
        self.activations = [
            Activations(config, rows, self.memory[at * each : (at + 1) * each]) for at in range(self.kept)
        ]
        self.outputs = [aligned_empty((rows, width)) for _ in range(outputs)]
        self.scratch = Scratch(config, batch, length, length, recompute is not None, products)

    def saved(self, application: int) -> Activations:
        return self.activations[application % self.kept]

    def output(self, application: int) -> Floats:
        """ND: what this application of a layer gives."""
        return self.outputs[application % len(self.outputs)]

    def input(self, application: int) -> Floats:
        """ND: what it starts from; in a loop's first layer the embedding, or the normed state of the loop before."""
        r, layer = divmod(application, self._layers)
        if layer:
            return self.output(application - 1)
        return self.hidden[r - 1].reshape(self.embedded.shape) if r else self.embedded


def run_loops(weights: Weights, tape: Tape, input_ids: Ints, place: Placement, taps: Taps | None = None) -> None:
    """Fill the tape's `hidden` with the state after each loop; everything else of interest stays in the tape."""
    layers = len(weights.layers)
    embedding.gather_into(tape.embedded, input_ids.reshape(-1), weights.embedding)
    for r, after in enumerate(tape.hidden):
        run_layers(weights, tape, range(r * layers, (r + 1) * layers), place, taps)
        x = tape.output((r + 1) * layers - 1)
        rmsnorm.forward_into(after.reshape(x.shape), tape.rrms[r], x, weights.norm, weights.config.rms_norm_eps)
        if taps is not None:
            taps.append((f"loop{r + 1}.hidden", after.copy()))


def run_layers(weights: Weights, tape: Tape, applications: range, place: Placement, taps: Taps | None = None) -> None:
    """Apply layers, from the input of the first of these applications; their activations are then in the tape."""
    config = weights.config
    for application in applications:
        r, index = divmod(application, len(weights.layers))
        x, saved = tape.input(application), tape.saved(application)
        layer_forward(weights.layers[index], config, x, tape.output(application), saved, tape.scratch, place)
        if taps is not None:
            _tap_layer(taps, f"loop{r + 1}.layer{index + 1}", weights.layers[index], config, x, saved, place)


def add_up_layers(weights: Weights, tape: Tape, applications: range) -> None:
    """The outputs of these applications of a layer once more, from their activations and the input of the first."""
    for application in applications:
        layer, x, out = (
            weights.layers[application % len(weights.layers)],
            tape.input(application),
            tape.output(application),
        )
        layer_output(layer, weights.config, x, out, tape.saved(application), tape.scratch)


def _tap_layer(
    taps: Taps, where: str, layer: LayerWeights, config: ModelConfig, x: Floats, saved: Activations, place: Placement
) -> None:
    shape, mid, rrms = (place.batch, place.length), np.empty_like(x), np.empty_like(saved.rrms[1])
    rmsnorm.residual_forward_into(mid, rrms, saved.attention_out, x, layer.norm_2, config.rms_norm_eps)
    heads, groups, channels = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    borders = (heads * channels, (heads + groups) * channels)
    named = dict(zip("qkv", np.split(saved.qkv, borders, axis=1), strict=True))
    gate, up = np.split(saved.gate_up, 2, axis=1)
    named = {"x": x, **named, "attention": saved.attention, "attention_out": saved.attention_out, "mid": mid}
    named |= {"gate": gate, "up": up, "mlp_out": saved.mlp_out}
    for name, value in named.items():
        split = (-1, channels) if name in ("q", "k", "v") else (-1,)
        taps.append((f"{where}.{name}", value.reshape(*shape, *split).copy()))


class Readable(Protocol):
    """What a trace asks of the weights it was made with: Weights, or StoredWeights."""

    @property
    def config(self) -> ModelConfig: ...

    @property
    def gate_weight(self) -> Floats: ...

    @property
    def gate_bias(self) -> Floats: ...

    def embedded(self, input_ids: Ints) -> Floats:
        """input_ids: any shape -> shape x D"""

    def logits(self, states: Floats) -> Floats:
        """Next-token logits.  states: ...D -> ...V"""


class Trace:
    """What a forward pass found, loop axis first.

    hidden: RBSD after each loop's final norm; gate_logit: RBS.  Everything else is computed from them when asked for.
    Positions before a row's `start` hold nothing of interest.
    """

    def __init__(self, weights: Readable, hidden: Floats, start: Ints | None = None) -> None:
        self.weights, self.hidden, self.start = weights, hidden, start
        (self.gate_logit,) = gate_forward(hidden, weights.gate_weight, weights.gate_bias)

    @property
    def exit_prob(self) -> Floats:
        """RBS: chance to stop exactly at loop r; the last loop takes the remainder."""
        return exit_distribution_forward(self.gate_logit)[0]

    @property
    def exit_cdf(self) -> Floats:
        """RBS: chance to have stopped by loop r; 1 at the last."""
        cdf = np.cumsum(self.exit_prob, axis=0)
        cdf[-1] = 1.0
        return cdf

    @property
    def hazard(self) -> Floats:
        """RBS: chance to stop at loop r, given not stopped before (the paper's lambda)."""
        with np.errstate(over="ignore"):
            return np.float32(1.0) / (np.float32(1.0) + np.exp(-self.gate_logit))

    def exit_index(self, exit_threshold: float) -> Ints:
        """BS: the loop, counted from 0, at which each position stops."""
        return exit_loop(self.exit_prob, exit_threshold)[0]

    def logits(self, r: int) -> Floats:
        """BSV: next-token logits read after loop r."""
        return self.weights.logits(self.hidden[r])

    def token_loss(self, target: Ints, visit: Callable[[int, slice, Floats], None] | None = None) -> Floats:
        """RBS: cross-entropy in nats of each loop's prediction, 0 where target is -1; in chunks of the positions.

        `visit(r, rows, logits)` sees each chunk of logits on its way (rows are flat B * S indices).
        """
        loops, width = self.hidden.shape[0], self.hidden.shape[-1]
        rows, targets = self.hidden.reshape(loops, -1, width), np.ascontiguousarray(target).reshape(-1)
        loss, lse = np.empty(rows.shape[:2], np.float32), np.empty(rows.shape[1], np.float32)
        chunk = max(1, LOGIT_CHUNK // self.weights.config.vocab_size)
        for r in range(loops):
            for begin in range(0, targets.size, chunk):
                part = slice(begin, min(begin + chunk, targets.size))
                logits = self.weights.logits(rows[r, part])
                cross_entropy.loss_into(loss[r, part], lse[part], logits, targets[part])
                if visit is not None:
                    visit(r, part, logits)
        return loss.reshape(loops, *target.shape)


def forward(
    weights: Weights,
    input_ids: Ints,
    *,
    loops: int | None = None,
    start: Ints | None = None,
    threads: int = 1,
    taps: Taps | None = None,
) -> Trace:
    """Run all loops over a batch.  input_ids: BS -> Trace.

    `start` (B) is each row's first real position (left padding); right padding needs nothing, since no position sees
    what follows it.  Ids must be below vocab_size: they index memory.  `loops` defaults to the model's.
    """
    config = weights.config
    batch, length = input_ids.shape
    loops = config.total_ut_steps if loops is None else loops
    hidden = aligned_empty((loops, batch, length, config.hidden_size))

    def work(rows: slice) -> None:
        ids = np.ascontiguousarray(input_ids[rows])
        place = Placement.of(config, len(ids), length, None if start is None else start[rows])
        run_loops(weights, Tape(config, hidden[:, rows]), ids, place, taps)

    run_all(work, shards(batch, 1 if taps is not None else threads))
    trace = Trace(weights, hidden, start)
    if taps is not None:
        _tap_gates(taps, trace)
    return trace


def _tap_gates(taps: Taps, trace: Trace) -> None:
    """Put each loop's gate logit behind its state."""
    for r in range(trace.gate_logit.shape[0]):
        at = next(i for i, (name, _) in enumerate(taps) if name == f"loop{r + 1}.hidden")
        taps.insert(at + 1, (f"loop{r + 1}.gate_logit", trace.gate_logit[r]))
