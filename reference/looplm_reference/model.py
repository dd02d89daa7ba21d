"""The whole LoopLM in float64, forward and backward, as the paper and the published code define it.

    h = embedding[ids]
    R times, with the same weights each time:
        h = layer_L(... layer_1(h))
        h = RMSNorm(h)              feeds the gate, the head and the next loop

The paper writes F = head . stack . ... . stack . embedding (Section 3.1) and does not mention the norm between loops;
the published code has it, and the published weights need it.  There is no embedding of the loop's number, no second
injection of the input, and no weight of a loop's own.

Nothing here is fast: no chunks, no reuse of buffers.  Each method is one idea, small enough to be replaced by a wrong
one, which is how the judge's own mutants are made.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from . import exits, ops
from .ops import Array

Taps = list[tuple[str, Array]]
Grads = dict[str, Array]
PER_LAYER = ("x", "q", "k", "v", "attention", "attention_out", "mid", "gate", "up", "mlp_out")


@dataclasses.dataclass
class Place:
    """Where the tokens of a call sit.  position: BS, counted from each row's first real token; start: B."""

    position: Array
    start: Array


@dataclasses.dataclass
class Tape:
    """Everything a forward pass computed; `layers` and `norms` hold one entry per loop (and layer) in order."""

    place: Place
    layers: list[list[dict[str, Array]]]
    norms: list[tuple[Array, Array]]  # input and rrms of the norm that ends each loop
    hidden: Array  # RBSD
    gate_logit: Array  # RBS


class Cache:
    """Keys and values already computed: one slot per (loop, layer), because each loop sees its own states."""

    def __init__(self) -> None:
        self.filled = 0
        self.slots: dict[int, tuple[Array, Array]] = {}

    def store(self, slot: int, k: Array, v: Array) -> tuple[Array, Array]:
        """Put new positions at the end of a slot and give all of it.  k, v: BSGK -> BPGK."""
        past = self.slots.get(slot)
        if past is not None:
            k, v = (np.concatenate([old[:, : self.filled], new], 1) for old, new in zip(past, (k, v), strict=True))
        self.slots[slot] = k, v
        return k, v


class LoopLM:
    """tensors: name in the published files -> array, widened to float64; config: the keys of config.json."""

    def __init__(self, tensors: Mapping[str, Array], config: Mapping[str, Any]) -> None:
        self.weight = {name: np.asarray(value, np.float64) for name, value in tensors.items()}
        self.loops = int(config["total_ut_steps"])
        self.layers = int(config["num_hidden_layers"])
        self.heads = int(config["num_attention_heads"])
        self.groups = int(config.get("num_key_value_heads") or self.heads)
        self.channels = int(config.get("head_dim") or config["hidden_size"] // self.heads)
        self.eps = float(config["rms_norm_eps"])
        rope: Mapping[str, Any] = config.get("rope_parameters") or config
        self.theta = float(rope["rope_theta"])
        tied = bool(config.get("tie_word_embeddings"))
        self.head_name = "model.embed_tokens.weight" if tied else "lm_head.weight"

    def layer_tensor(self, layer: int, name: str) -> str:
        return f"model.layers.{layer}.{name}.weight"

    def norm_names(self, layer: int) -> tuple[str, str, str, str]:
        """The sandwich's four norms: before and after attention, before and after the MLP (the names mislead)."""
        names = ("input_layernorm", "input_layernorm_2", "post_attention_layernorm", "post_attention_layernorm_2")
        first, second, third, fourth = (self.layer_tensor(layer, name) for name in names)
        return first, second, third, fourth

    def norm(self, x: Array, name: str) -> tuple[Array, Array]:
        return ops.rmsnorm_forward(x, self.weight[name], self.eps)

    def add_normed(self, x: Array, residual: Array, name: str) -> tuple[Array, Array]:
        return ops.rmsnorm_residual_forward(x, residual, self.weight[name], self.eps)

    def linear(self, x: Array, weight: Array) -> Array:
        return ops.linear_forward(x, weight)[0]

    def linear_backward(self, dy: Array, x: Array, weight: Array) -> tuple[Array, Array]:
        dx, dweight = ops.linear_backward(dy, x, weight)
        return dx, dweight

    def project(self, x: Array, layer: int, name: str) -> Array:
        return self.linear(x, self.weight[self.layer_tensor(layer, name)])

    def turn(self, x: Array, position: Array) -> Array:
        return ops.rope_forward(x, position, self.theta)[0]

    def attend(self, q: Array, k: Array, v: Array, start: Array) -> tuple[Array, Array]:
        return ops.attention_forward(q, k, v, start)

    def attend_backward(
        self, dy: Array, q: Array, k: Array, v: Array, start: Array, y: Array, lse: Array
    ) -> tuple[Array, Array, Array]:
        return ops.attention_backward(dy, q, k, v, start, y, lse)

    def layer_forward(
        self, r: int, layer: int, x: Array, place: Place, cache: Cache | None
    ) -> tuple[Array, dict[str, Array]]:
        """x: BSD -> what the layer makes of it, and everything computed on the way, by name."""
        before_attention, after_attention, before_mlp, after_mlp = self.norm_names(layer)
        rows = x.shape[:2]
        a = {"x": x}
        a["normed_x"], a["rrms_x"] = self.norm(x, before_attention)
        a["q"], a["k"], a["v"] = (
            self.project(a["normed_x"], layer, f"self_attn.{name}_proj").reshape(*rows, heads, self.channels)
            for name, heads in (("q", self.heads), ("k", self.groups), ("v", self.groups))
        )
        a["q"], a["k"] = self.turn(a["q"], place.position), self.turn(a["k"], place.position)
        keys, values = (a["k"], a["v"]) if cache is None else cache.store(self.slot(r, layer), a["k"], a["v"])
        y, a["lse"] = self.attend(a["q"], keys, values, place.start)
        a["attention"] = y.reshape(*rows, -1)
        a["attention_out"] = self.project(a["attention"], layer, "self_attn.o_proj")
        a["mid"], a["rrms_attention"] = self.add_normed(a["attention_out"], x, after_attention)

        a["normed_mid"], a["rrms_mid"] = self.norm(a["mid"], before_mlp)
        a["gate"] = self.project(a["normed_mid"], layer, "mlp.gate_proj")
        a["up"] = self.project(a["normed_mid"], layer, "mlp.up_proj")
        (a["activated"],) = ops.swiglu_forward(a["gate"], a["up"])
        a["mlp_out"] = self.project(a["activated"], layer, "mlp.down_proj")
        out, a["rrms_mlp"] = self.add_normed(a["mlp_out"], a["mid"], after_mlp)
        return out, a

    def layer_backward(self, layer: int, dout: Array, a: dict[str, Array], place: Place, grads: Grads) -> Array:
        """From the gradient of the layer's output to that of its input; adds to the layer's tensors in `grads`."""
        before_attention, after_attention, before_mlp, after_mlp = self.norm_names(layer)
        w = self.weight

        def back(dy: Array, x: Array, name: str) -> Array:
            full = self.layer_tensor(layer, name)
            dx, dweight = self.linear_backward(dy, x, w[full])
            grads[full] += dweight
            return dx

        dmlp, dmid, dnorm = ops.rmsnorm_residual_backward(dout, a["mlp_out"], w[after_mlp], a["rrms_mlp"])
        grads[after_mlp] += dnorm
        dactivated = back(dmlp, a["activated"], "mlp.down_proj")
        dgate, dup = ops.swiglu_backward(dactivated, a["gate"], a["up"])
        dnormed = back(dgate, a["normed_mid"], "mlp.gate_proj") + back(dup, a["normed_mid"], "mlp.up_proj")
        dbranch, dnorm = ops.rmsnorm_backward(dnormed, a["mid"], w[before_mlp], a["rrms_mid"])
        grads[before_mlp] += dnorm
        dmid = dmid + dbranch

        dattention_out, dx, dnorm = ops.rmsnorm_residual_backward(
            dmid, a["attention_out"], w[after_attention], a["rrms_attention"]
        )
        grads[after_attention] += dnorm
        dy = back(dattention_out, a["attention"], "self_attn.o_proj").reshape(a["q"].shape)
        y = a["attention"].reshape(a["q"].shape)
        dq, dk, dv = self.attend_backward(dy, a["q"], a["k"], a["v"], place.start, y, a["lse"])
        (dq,), (dk,) = (ops.rope_backward(d, place.position, self.theta) for d in (dq, dk))
        rows = (*dx.shape[:2], -1)
        dnormed = np.zeros_like(dx)
        for name, d in (("q", dq), ("k", dk), ("v", dv)):
            dnormed += back(d.reshape(rows), a["normed_x"], f"self_attn.{name}_proj")
        dbranch, dnorm = ops.rmsnorm_backward(dnormed, a["x"], w[before_attention], a["rrms_x"])
        grads[before_attention] += dnorm
        return dx + dbranch

    def slot(self, r: int, layer: int) -> int:
        """Loop r must not read the keys that another loop's states gave: R * L slots, not L."""
        return r * self.layers + layer

    def place(self, input_ids: Array, start: Array | None, past: int = 0) -> Place:
        """A token's position is counted from its row's first real one, as if the row stood alone."""
        batch, length = input_ids.shape
        first = np.zeros(batch, np.int64) if start is None else np.asarray(start, np.int64)
        return Place(np.maximum(np.arange(past, past + length) - first[:, None], 0), first)

    def next_input(self, embedded: Array, before_norm: Array, hidden: Array) -> Array:
        """What a loop hands to the next one: its normed state, and nothing else."""
        return hidden

    def gate_input(self, before_norm: Array, hidden: Array) -> Array:
        return hidden

    def run(self, input_ids: Array, place: Place, loops: int | None = None, cache: Cache | None = None) -> Tape:
        """All loops over a batch.  input_ids: BS."""
        (embedded,) = ops.embedding_forward(input_ids, self.weight["model.embed_tokens.weight"])
        layers: list[list[dict[str, Array]]] = []
        x, norms, hidden, gate_input = embedded, [], [], []
        for r in range(self.loops if loops is None else loops):
            layers.append([])
            for layer in range(self.layers):
                x, activations = self.layer_forward(r, layer, x, place, cache)
                layers[r].append(activations)
            state, rrms = self.norm(x, "model.norm.weight")
            norms.append((x, rrms))
            hidden.append(state)
            gate_input.append(self.gate_input(x, state))
            x = self.next_input(embedded, x, state)
        weight, bias = self.weight["model.early_exit_gate.weight"], self.weight["model.early_exit_gate.bias"]
        (gate_logit,) = ops.gate_forward(np.stack(gate_input), weight, bias)
        return Tape(place, layers, norms, np.stack(hidden), gate_logit)

    def run_backward(self, input_ids: Array, dhidden: Array, tape: Tape, grads: Grads) -> None:
        """From the gradients of all loops' states to every tensor of the trunk.  dhidden: RBSD."""
        dx = np.zeros_like(dhidden[0])
        for r in reversed(range(len(dhidden))):
            before, rrms = tape.norms[r]
            dstate = dhidden[r] + self.dnext_input(dx)
            dx, dnorm = ops.rmsnorm_backward(dstate, before, self.weight["model.norm.weight"], rrms)
            grads["model.norm.weight"] += dnorm
            for layer in reversed(range(self.layers)):
                dx = self.layer_backward(layer, dx, tape.layers[r][layer], tape.place, grads)
        (dembedding,) = ops.embedding_backward(dx, input_ids, self.weight["model.embed_tokens.weight"])
        grads["model.embed_tokens.weight"] += dembedding

    def dnext_input(self, dx: Array) -> Array:
        """Gradient that a loop gets back from the next one: training goes through all loops."""
        return dx

    def dgate_input(self, dhidden: Array) -> Array:
        """Gradient that the states get from their gate: nothing is detached (Section 3.3 trains both jointly)."""
        return dhidden

    def exit_distribution(self, gate_logit: Array) -> Array:
        return ops.exit_distribution_forward(gate_logit)[0]

    @staticmethod
    def exit_loop(exit_prob: Array, exit_threshold: float) -> Array:
        return ops.exit_loop(exit_prob, exit_threshold)[0]

    def exit_statistic(self, rule: str, hidden: Array) -> Array:
        """hidden: RBSD -> RBS, as looplm_reference.exits defines it."""
        return exits.statistic(rule, hidden, self.logits(hidden))

    def rule_exit(self, rule: str, threshold: float, hidden: Array) -> Array:
        """hidden: RBSD -> BS."""
        return exits.exit_loop(rule, threshold, self.exit_statistic(rule, hidden))

    def logits(self, hidden: Array) -> Array:
        """RBSD -> RBSV: the same head reads every loop's state."""
        return self.linear(hidden, self.weight[self.head_name])

    def forward(
        self, input_ids: Array, start: Array | None = None, loops: int | None = None, taps: Taps | None = None
    ) -> dict[str, Array]:
        """input_ids: BS -> hidden: RBSD, logits: RBSV, gate_logit, exit_prob: RBS.

        Intermediate arrays are appended to `taps` in forward order, as loop1.layer1.x ... loop1.gate_logit ...
        """
        tape = self.run(input_ids, self.place(input_ids, start), loops)
        if taps is not None:
            for r, layers in enumerate(tape.layers, 1):
                for number, activations in enumerate(layers, 1):
                    taps += [(f"loop{r}.layer{number}.{name}", activations[name]) for name in PER_LAYER]
                taps += [(f"loop{r}.hidden", tape.hidden[r - 1]), (f"loop{r}.gate_logit", tape.gate_logit[r - 1])]
        return {
            "hidden": tape.hidden,
            "logits": self.logits(tape.hidden),
            "gate_logit": tape.gate_logit,
            "exit_prob": self.exit_distribution(tape.gate_logit),
        }

    def cached_hidden(self, input_ids: Array, start: Array | None = None) -> Array:
        """The same states, RBSD, from one position at a time: each loop and layer remembers its keys and values."""
        cache, states = Cache(), []
        for s in range(input_ids.shape[1]):
            token = input_ids[:, s : s + 1]
            tape = self.run(token, self.place(token, start, past=s), cache=cache)
            states.append(tape.hidden)
            cache.filled += 1
        return np.concatenate(states, axis=2)

    def greedy(self, input_ids: Array, exit_threshold: float, new_tokens: int) -> Array:
        """Continue each row with its most likely token, recomputing everything for every token.  BS -> B(S + new).

        All loops always run, as in the published code: the exit only chooses which loop's state is read.
        """
        for _ in range(new_tokens):
            out = self.forward(input_ids)
            chosen = self.exit_loop(out["exit_prob"][:, :, -1:], exit_threshold)
            logits = np.take_along_axis(out["logits"][:, :, -1], chosen.reshape(1, -1, 1), axis=0)[0]
            input_ids = np.concatenate([input_ids, logits.argmax(-1)[:, None]], axis=1)
        return input_ids

    def token_loss(self, hidden: Array, target: Array) -> tuple[Array, Array, Array]:
        """RBS: cross-entropy of every loop's prediction; also the logits and their lse."""
        logits = self.logits(hidden)
        each = [ops.cross_entropy_forward(logits[r], target) for r in range(len(hidden))]
        return np.stack([loss for loss, _ in each]), logits, np.stack([lse for _, lse in each])

    def stage1(
        self,
        input_ids: Array,
        target: Array,
        entropy_weight: float,
        log_prior: Array | None = None,
        start: Array | None = None,
    ) -> dict[str, Any]:
        """Stage I: the mean objective over counted targets, and its gradient by every tensor.

        input_ids, target: BS -> objective, loss: RBS, exit_prob: RBS, grads by tensor name.
        """
        tape = self.run(input_ids, self.place(input_ids, start))
        loss, logits, lse = self.token_loss(tape.hidden, target)
        prior = np.zeros(len(loss)) if log_prior is None else np.asarray(log_prior, np.float64)
        value, exit_prob = ops.stage1_forward(loss, tape.gate_logit, prior, entropy_weight)
        share = (target >= 0) / max(1, (target >= 0).sum())

        grads = {name: np.zeros_like(tensor) for name, tensor in self.weight.items()}
        dloss, dgate_logit = ops.stage1_backward(share, loss, tape.gate_logit, prior, entropy_weight)
        dhidden = self.dgate_input(self.gate_backward(dgate_logit, tape.hidden, grads))
        for r in range(len(loss)):
            (dlogits,) = ops.cross_entropy_backward(dloss[r], logits[r], target, lse[r])
            dstate, dhead = self.linear_backward(dlogits, tape.hidden[r], self.weight[self.head_name])
            dhidden[r] += dstate
            grads[self.head_name] += dhead
        self.run_backward(input_ids, dhidden, tape, grads)
        return {"objective": float((value * share).sum()), "loss": loss, "exit_prob": exit_prob, "grads": grads}

    def gate_backward(self, dgate_logit: Array, hidden: Array, grads: Grads) -> Array:
        weight, bias = "model.early_exit_gate.weight", "model.early_exit_gate.bias"
        dhidden, grads[weight], grads[bias] = ops.gate_backward(dgate_logit, hidden, self.weight[weight])
        return dhidden

    def stage2(
        self,
        input_ids: Array,
        target: Array,
        target_kind: str = "paper",
        improvement_slope: float = 50.0,
        improvement_threshold: float = 0.005,
        start: Array | None = None,
    ) -> dict[str, Any]:
        """Stage II: the gate alone learns, from losses that are constants; mean over counted targets.

        input_ids, target: BS -> objective, and grads of the gate's two tensors.
        """
        tape = self.run(input_ids, self.place(input_ids, start))
        loss, _, _ = self.token_loss(tape.hidden, target)
        wish, counted = ops.continue_target(loss, improvement_slope, improvement_threshold, target_kind)
        (value,) = ops.stage2_forward(tape.gate_logit, wish, counted)
        share = (target >= 0) / max(1, (target >= 0).sum())
        (dgate_logit,) = ops.stage2_backward(share, tape.gate_logit, wish, counted)
        grads: Grads = {}
        self.gate_backward(dgate_logit, tape.hidden, grads)
        return {"objective": float((value * share).sum()), "grads": grads}
