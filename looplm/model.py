"""The whole LoopLM: one stack of layers applied R times, with the final norm inside the loop.

`forward` gives a Trace: the state after every loop, and on demand logits, losses and the exit law.  `gradient` is the
hand-written backward pass of a training objective through all loops.  The logits of all loops are never alive at once.

Source: Section 3.1 and Algorithm 1; the norm between loops is in the published code, not in the paper's formula.
"""

import dataclasses
from collections.abc import Callable

import numpy as np

from .arrays import Floats, Ints, aligned_empty
from .config import ModelConfig
from .kernels import (
    cross_entropy,
    embedding,
    exit_distribution_forward,
    exit_loop,
    gate_backward,
    gate_forward,
    rmsnorm,
)
from .kernels.linear import accumulate_outer
from .layer import Activations, Placement, Scratch, layer_backward, layer_forward
from .objectives import StageOne
from .threads import run_all, shards
from .weights import Weights

LOGIT_CHUNK = 1 << 19  # logits alive at once in one thread (2 MiB): a whole vocabulary for a few hundred positions

Taps = list[tuple[str, Floats]]  # intermediate arrays by name, in forward order


class Tape:
    """The buffers of one shard's forward pass; with `keep`, one set per loop and layer, as backward needs them."""

    def __init__(self, config: ModelConfig, batch: int, length: int, loops: int, keep: bool) -> None:
        rows, layers = batch * length, config.num_hidden_layers
        self.shape = (batch, length, loops)
        self.scratch = Scratch(config, batch, length, length, backward=keep)
        self.rrms = aligned_empty((loops, rows))  # of the norm that ends each loop
        self._layers, self._keep = layers, keep
        self._saved = [Activations(config, batch, length) for _ in range(loops * layers if keep else 1)]
        self.embedded = aligned_empty((rows, config.hidden_size))
        self._outputs = [aligned_empty((rows, config.hidden_size)) for _ in range(loops * layers if keep else 2)]
        if keep:
            self.hidden = aligned_empty((loops, batch, length, config.hidden_size))
            self.dhidden = aligned_empty((loops, rows, config.hidden_size))
            self.logits = aligned_empty((max(LOGIT_CHUNK, config.vocab_size),))
            self.outer = aligned_empty((config.vocab_size * config.hidden_size,))

    def saved(self, r: int, layer: int) -> Activations:
        return self._saved[r * self._layers + layer if self._keep else 0]

    def output(self, r: int, layer: int) -> Floats:
        """ND: what layer `layer` of loop r gives."""
        return self._outputs[r * self._layers + layer if self._keep else layer % 2]

    def loop_input(self, r: int, hidden: Floats) -> Floats:
        """ND: what loop r starts from: the embedding, or the normed state of the loop before."""
        return hidden[r - 1].reshape(self.embedded.shape) if r else self.embedded


def run_loops(
    weights: Weights, tape: Tape, hidden: Floats, input_ids: Ints, place: Placement, taps: Taps | None = None
) -> None:
    """Fill `hidden` (RBSD) with the state after each loop; everything else of interest stays in the tape."""
    config = weights.config
    embedding.gather_into(tape.embedded, input_ids.reshape(-1), weights.embedding)
    for r in range(hidden.shape[0]):
        x = tape.loop_input(r, hidden)
        for index, layer in enumerate(weights.layers):
            out, saved = tape.output(r, index), tape.saved(r, index)
            layer_forward(layer, config, x, out, saved, tape.scratch, place)
            if taps is not None:
                _tap_layer(taps, f"loop{r + 1}.layer{index + 1}", config, x, saved, place)
            x = out
        after = hidden[r].reshape(x.shape)
        rmsnorm.forward_into(after, tape.rrms[r], x, weights.norm, config.rms_norm_eps)
        if taps is not None:
            taps.append((f"loop{r + 1}.hidden", hidden[r].copy()))


def _tap_layer(taps: Taps, where: str, config: ModelConfig, x: Floats, saved: Activations, place: Placement) -> None:
    shape = (place.batch, place.length)
    heads, groups, channels = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    borders = (heads * channels, (heads + groups) * channels)
    named = dict(zip("qkv", np.split(saved.qkv, borders, axis=1), strict=True))
    gate, up = np.split(saved.gate_up, 2, axis=1)
    named = {"x": x, **named, "attention": saved.attention, "attention_out": saved.attention_out, "mid": saved.mid}
    named |= {"gate": gate, "up": up, "mlp_out": saved.mlp_out}
    for name, value in named.items():
        split = (-1, channels) if name in ("q", "k", "v") else (-1,)
        taps.append((f"{where}.{name}", value.reshape(*shape, *split).copy()))


class Trace:
    """What a forward pass found, loop axis first.

    hidden: RBSD after each loop's final norm; gate_logit: RBS.  Everything else is computed from them when asked for.
    Positions before a row's `start` hold nothing of interest.
    """

    def __init__(self, weights: Weights, hidden: Floats, start: Ints | None = None) -> None:
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
        return np.matmul(self.hidden[r], self.weights.head.T)

    def token_loss(self, target: Ints, visit: Callable[[int, slice, Floats], None] | None = None) -> Floats:
        """RBS: cross-entropy in nats of each loop's prediction, 0 where target is -1; in chunks of the positions.

        `visit(r, rows, logits)` sees each chunk of logits on its way (rows are flat B * S indices).
        """
        loops, width = self.hidden.shape[0], self.hidden.shape[-1]
        rows, targets = self.hidden.reshape(loops, -1, width), np.ascontiguousarray(target).reshape(-1)
        loss, lse = np.empty(rows.shape[:2], np.float32), np.empty(rows.shape[1], np.float32)
        chunk = max(1, LOGIT_CHUNK // self.weights.head.shape[0])
        for r in range(loops):
            for begin in range(0, targets.size, chunk):
                part = slice(begin, min(begin + chunk, targets.size))
                logits = np.matmul(rows[r, part], self.weights.head.T)
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
        tape = Tape(config, len(ids), length, loops, keep=False)
        place = Placement.of(config, len(ids), length, None if start is None else start[rows])
        run_loops(weights, tape, hidden[:, rows], ids, place, taps)

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


@dataclasses.dataclass(frozen=True)
class GradientReport:
    """Sums over counted positions of a batch; divide by `tokens` for means."""

    objective: float
    loss: Floats  # R, nats
    exit_prob: Floats  # R
    tokens: int


class GradientWorkspace:
    """Buffers for `gradient` on batches of one shape, made once: per thread a tape and a gradient of its own."""

    def __init__(self, config: ModelConfig, batch: int, length: int, threads: int) -> None:
        self.parts = shards(batch, threads)
        self.tapes = [
            Tape(config, part.stop - part.start, length, config.total_ut_steps, keep=True) for part in self.parts
        ]
        self.gradients = [Weights.zeros(config) for _ in self.parts]

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

    input_ids, target: BS.  The result is the same bits for the same number of threads.
    """
    counted = max(1, int((target >= 0).sum()))

    def work(index: int) -> GradientReport:
        rows, tape, dweights = workspace.parts[index], workspace.tapes[index], workspace.gradients[index]
        ids, wanted = np.ascontiguousarray(input_ids[rows]), np.ascontiguousarray(target[rows]).reshape(-1)
        place = Placement.of(weights.config, len(ids), ids.shape[1], None if start is None else start[rows])
        dweights.contiguous()[:] = 0.0
        run_loops(weights, tape, tape.hidden, ids, place)
        report = _loss_and_dhidden(weights, dweights, tape, wanted, objective, 1.0 / counted)
        _backward_through_loops(weights, dweights, tape, ids, place)
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
    weights: Weights, dweights: Weights, tape: Tape, target: Ints, objective: StageOne, scale: float
) -> GradientReport:
    """Losses of all loops and, in the same pass over chunks of logits, the gradients of head, gate and states.

    The weight of each loop's loss is the exit probability, known from the gate before any logit is.
    """
    loops, rows, width = tape.dhidden.shape
    hidden = tape.hidden.reshape(loops, rows, width)
    (gate_logit,) = gate_forward(hidden, weights.gate_weight, weights.gate_bias)
    counted = target >= 0
    exit_prob = objective.loss_weight(gate_logit)
    dloss = exit_prob * np.float32(scale)
    loss, lse = np.empty((loops, rows), np.float32), np.empty(rows, np.float32)
    chunk = max(1, LOGIT_CHUNK // weights.head.shape[0])
    for r in range(loops):
        for begin in range(0, rows, chunk):
            part = slice(begin, min(begin + chunk, rows))
            logits = tape.logits[: (part.stop - begin) * weights.head.shape[0]].reshape(part.stop - begin, -1)
            np.matmul(hidden[r, part], weights.head.T, out=logits)
            cross_entropy.loss_into(loss[r, part], lse[part], logits, target[part])
            cross_entropy.gradient_into(logits, dloss[r, part], logits, target[part], lse[part])
            np.matmul(logits, weights.head, out=tape.dhidden[r, part])
            accumulate_outer(dweights.head, logits, hidden[r, part], tape.outer)
    value, dgate_logit = objective.value_and_dgate(loss, gate_logit)
    dgate_logit *= np.float32(scale) * counted
    dhidden, dweight, dbias = gate_backward(dgate_logit, hidden, weights.gate_weight)
    np.add(tape.dhidden, dhidden, out=tape.dhidden)
    dweights.gate_weight[...] += dweight
    dweights.gate_bias[...] += dbias
    return GradientReport(
        objective=float(value[counted].sum(dtype=np.float64)),
        loss=loss.sum(1),
        exit_prob=exit_prob[:, counted].sum(1),
        tokens=int(counted.sum()),
    )


def _backward_through_loops(weights: Weights, dweights: Weights, tape: Tape, input_ids: Ints, place: Placement) -> None:
    """From the gradients of all states back to the embedding; each loop adds to the same shared tensors."""
    config, layers = weights.config, weights.layers
    loops, rows, width = tape.dhidden.shape
    dx = np.zeros((rows, width), np.float32)
    for r in range(loops - 1, -1, -1):
        np.add(tape.dhidden[r], dx, out=tape.dhidden[r])  # this state was also the next loop's input
        last = tape.output(r, len(layers) - 1)
        rmsnorm.backward_into(dx, dweights.norm, tape.dhidden[r], last, weights.norm, tape.rrms[r], False)
        for index in range(len(layers) - 1, -1, -1):
            x = tape.output(r, index - 1) if index else tape.loop_input(r, tape.hidden)
            saved = tape.saved(r, index)
            layer_backward(dx, dweights.layers[index], layers[index], config, x, saved, tape.scratch, place)
    embedding.scatter_add_into(dweights.embedding, dx, input_ids.reshape(-1))
