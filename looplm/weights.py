"""Every parameter of a model: named tensors, views into one flat float32 buffer.

The flat buffer makes the optimizer, the gradient norm and a checkpoint one loop each.  Its order is the order of
`parameter_table`; q, k and v lie side by side, and so do gate and up, so that each group is one matrix product.
"""

import copy
import dataclasses
import functools
import itertools
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from .arrays import Floats, Ints, aligned_empty
from .config import ModelConfig
from .settings import InitConfig


@dataclasses.dataclass(frozen=True)
class Parameter:
    """One tensor: its name in the file, its shape, and where it lies in the flat buffer (in elements)."""

    name: str
    shape: tuple[int, ...]
    offset: int

    @property
    def size(self) -> int:
        return int(np.prod(self.shape))

    @property
    def decays(self) -> bool:
        """Weight decay acts on matrices only: not on norms, and not on the gate (one row and a bias)."""
        return len(self.shape) == 2 and self.shape[0] > 1


@functools.cache
def parameter_table(config: ModelConfig) -> tuple[Parameter, ...]:
    """All parameters in the order of the flat buffer.  Source: the tensor names of the published checkpoints."""
    width, ff, vocab = config.hidden_size, config.intermediate_size, config.vocab_size
    query = config.num_attention_heads * config.head_dim
    key_value = config.num_key_value_heads * config.head_dim
    shapes: list[tuple[str, tuple[int, ...]]] = [("model.embed_tokens.weight", (vocab, width))]
    for layer in range(config.num_hidden_layers):
        prefix = f"model.layers.{layer}."
        shapes += [
            (prefix + "input_layernorm.weight", (width,)),
            (prefix + "self_attn.q_proj.weight", (query, width)),
            (prefix + "self_attn.k_proj.weight", (key_value, width)),
            (prefix + "self_attn.v_proj.weight", (key_value, width)),
            (prefix + "self_attn.o_proj.weight", (width, query)),
            (prefix + "input_layernorm_2.weight", (width,)),
            (prefix + "post_attention_layernorm.weight", (width,)),
            (prefix + "mlp.gate_proj.weight", (ff, width)),
            (prefix + "mlp.up_proj.weight", (ff, width)),
            (prefix + "mlp.down_proj.weight", (width, ff)),
            (prefix + "post_attention_layernorm_2.weight", (width,)),
        ]
    shapes += [
        ("model.norm.weight", (width,)),
        ("model.early_exit_gate.weight", (1, width)),
        ("model.early_exit_gate.bias", (1,)),
    ]
    if not config.tie_word_embeddings:
        shapes.append(("lm_head.weight", (vocab, width)))
    table, offset = [], 0
    for name, shape in shapes:
        table.append(Parameter(name, shape, offset))
        offset += table[-1].size
    return tuple(table)


@dataclasses.dataclass(frozen=True)
class Sections:
    """The flat buffer in parts: the embedding, every layer, and what comes after them."""

    embedding: slice
    layers: list[slice]
    rest: slice  # final norm, gate, and the head unless it is tied to the embedding


def sections(config: ModelConfig) -> Sections:
    """Where these lie in the flat buffer, in elements; each ends where the next begins."""
    borders = [p.offset for p in parameter_table(config) if p.name.endswith(".input_layernorm.weight")]
    borders.append(next(p.offset for p in parameter_table(config) if p.name == "model.norm.weight"))
    layers = [slice(begin, end) for begin, end in itertools.pairwise(borders)]
    return Sections(slice(0, borders[0]), layers, slice(borders[-1], parameter_count(config)))


def parameter_count(config: ModelConfig) -> int:
    """Number of distinct parameters; the loops add none."""
    last = parameter_table(config)[-1]
    return last.offset + last.size


@dataclasses.dataclass(frozen=True)
class LayerWeights:
    """One layer of the shared stack, as the forward pass reads it."""

    norm_1: Floats  # D, before attention
    qkv: Floats  # (H + 2G)K x D
    attention_out: Floats  # D x HK
    norm_2: Floats  # D, after attention
    norm_3: Floats  # D, before the MLP
    gate_up: Floats  # 2F x D
    down: Floats  # D x F
    norm_4: Floats  # D, after the MLP


LAYER_MATRICES = ("qkv", "attention_out", "gate_up", "down")


def matrix_shapes(config: ModelConfig) -> list[tuple[int, int]]:
    """Shapes N x K of the matrices that rows are multiplied by: those of a layer, and the head."""
    width, ff, query = config.hidden_size, config.intermediate_size, config.num_attention_heads * config.head_dim
    qkv = query + 2 * config.num_key_value_heads * config.head_dim
    return [(qkv, width), (width, query), (2 * ff, width), (width, ff), (config.vocab_size, width)]


class Weights:
    """The tensors of one model (or their gradients, or an optimizer's moments: the same shape)."""

    def __init__(self, config: ModelConfig, tensors: Mapping[str, Floats], flat: Floats | None) -> None:
        self.config = config
        self.tensors = dict(tensors)
        self.flat = flat
        self.embedding = self.tensors["model.embed_tokens.weight"]
        self.norm = self.tensors["model.norm.weight"]
        self.gate_weight = self.tensors["model.early_exit_gate.weight"]
        self.gate_bias = self.tensors["model.early_exit_gate.bias"]
        self.head = self.embedding if config.tie_word_embeddings else self.tensors["lm_head.weight"]
        self.layers = tuple(self._layer(index) for index in range(config.num_hidden_layers))

    def _layer(self, index: int) -> LayerWeights:
        prefix = f"model.layers.{index}."

        def named(*names: str) -> Floats:
            return joined([self.tensors[f"{prefix}{name}.weight"] for name in names])

        return LayerWeights(
            norm_1=named("input_layernorm"),
            qkv=named("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
            attention_out=named("self_attn.o_proj"),
            norm_2=named("input_layernorm_2"),
            norm_3=named("post_attention_layernorm"),
            gate_up=named("mlp.gate_proj", "mlp.up_proj"),
            down=named("mlp.down_proj"),
            norm_4=named("post_attention_layernorm_2"),
        )

    @classmethod
    def from_flat(cls, config: ModelConfig, flat: Floats) -> "Weights":
        """Named views into `flat`, which may be mapped from a file."""
        tensors = {p.name: flat[p.offset : p.offset + p.size].reshape(p.shape) for p in parameter_table(config)}
        return cls(config, tensors, flat)

    @classmethod
    def from_tensors(cls, config: ModelConfig, tensors: Mapping[str, Floats]) -> "Weights":
        """Use arrays as they are (mapped or not); only groups that are not side by side in memory are copied."""
        return cls(config, {p.name: tensors[p.name] for p in parameter_table(config)}, None)

    @classmethod
    def zeros(cls, config: ModelConfig) -> "Weights":
        flat = aligned_empty((parameter_count(config),))
        flat[:] = 0.0
        return cls.from_flat(config, flat)

    def with_matrices(self, packed: Callable[[str, Floats], Any]) -> "Weights":
        """The same weights with `packed(name, matrix)` in the place of every matrix that rows are multiplied by.

        Names are "head" and, for each layer, its number and field: "0.qkv".  The embedding is only looked up in.
        """
        other = copy.copy(self)
        other.head = packed("head", self.head)
        other.layers = tuple(
            dataclasses.replace(
                layer, **{name: packed(f"{index}.{name}", getattr(layer, name)) for name in LAYER_MATRICES}
            )
            for index, layer in enumerate(self.layers)
        )
        return other

    def embedded(self, input_ids: Ints) -> Floats:
        """input_ids: any shape -> shape x D"""
        return self.embedding[input_ids]

    def logits(self, states: Floats) -> Floats:
        """Next-token logits.  states: ...D -> ...V"""
        found: Floats = np.matmul(states, self.head.T)
        return found

    def copy(self) -> "Weights":
        """The same values in a fresh, writable flat buffer."""
        other = Weights.zeros(self.config)
        for name, value in self.tensors.items():
            other.tensors[name][...] = value
        return other

    def contiguous(self) -> Floats:
        """The flat buffer.  Raises: ValueError for tensors mapped one by one (`copy()` them first)."""
        if self.flat is None:
            raise ValueError("these weights are mapped tensor by tensor; take a copy() first")
        return self.flat


def joined(parts: list[Floats]) -> Floats:
    """The parts stacked by rows: a view where they already lie side by side in memory, else a copy."""
    if len(parts) == 1:
        return parts[0]
    base = parts[0].base
    end = parts[0].ctypes.data
    for part in parts:
        if not part.flags.c_contiguous or part.base is not base or part.ctypes.data != end:
            return np.concatenate(parts)
        end += part.nbytes
    rows = sum(part.shape[0] for part in parts)
    shape, strides = (rows, *parts[0].shape[1:]), parts[0].strides
    return np.lib.stride_tricks.as_strided(parts[0], shape, strides, writeable=parts[0].flags.writeable)


def initialise(config: ModelConfig, init: InitConfig, seed: int) -> Weights:
    """Fresh weights: linear layers N(0, weight_std), embedding N(0, embedding_std), norms 1, gate bias 0.

    The norms after attention and MLP start at `post_norm`: below 1, a loop starts as a small correction of the state
    it receives instead of drowning it.  Scheme "ouro" is the published one (every matrix N(0, 0.02), all norms 1),
    with which small models get worse with every loop.
    """
    weights = Weights.zeros(config)
    rng = np.random.default_rng([seed, 0])
    for parameter in parameter_table(config):
        view = weights.tensors[parameter.name]
        if parameter.name.endswith("embed_tokens.weight"):
            view[...] = rng.standard_normal(view.shape, np.float32) * np.float32(init.embedding_std)
        elif len(parameter.shape) == 2:
            view[...] = rng.standard_normal(view.shape, np.float32) * np.float32(init.weight_std)
        elif parameter.name.endswith("layernorm_2.weight"):
            view[...] = init.post_norm
        elif not parameter.name.endswith("bias"):
            view[...] = 1.0
    return weights
