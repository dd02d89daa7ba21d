"""One layer of the shared stack ("sandwich": a norm before and after attention and MLP), forward and backward.

The same forward serves training and inference (cached decoding: kernels/decoding.py); it writes into buffers made once.
Rows are N = B * S positions of a batch.

Source: Section 4.1; the four norms and their places are those of the published code.
"""

import dataclasses
from collections.abc import Iterator

import numpy as np

from .arrays import Array, Floats, Ints, aligned_empty, lined_up
from .config import ModelConfig
from .kernels import rmsnorm, rope, swiglu
from .kernels.product import BlasProducts, Products
from .weights import LayerWeights

ROW_BLOCK = 512  # rows that pass through a chain of operations together: what one writes, the next finds in cache


@dataclasses.dataclass(frozen=True)
class Placement:
    """Where the rows of a call sit: what attention and rotary positions need to know."""

    batch: int  # B
    length: int  # S
    position: Ints  # N, counted from each row's first real position
    start: Ints  # B, key index of each row's first real position (left padding)
    cos: Floats
    sin: Floats

    @classmethod
    def of(cls, config: ModelConfig, batch: int, length: int, start: Ints | None) -> "Placement":
        """`start` defaults to no left padding."""
        first = np.zeros(batch, np.int64) if start is None else np.ascontiguousarray(start, np.int64)
        position = np.maximum(np.arange(length)[None] - first[:, None], 0).reshape(-1)
        needed = max(config.max_position_embeddings, length)
        cos, sin = rope.rope_tables(needed, config.head_dim, config.rope_theta)
        return cls(batch, length, position, first, cos, sin)


class Activations:
    """What one application of a layer leaves for its backward pass.

    Not the sums with both residuals: they come back, to the bit, from one cheap pass over what is kept and the input.
    """

    def __init__(self, config: ModelConfig, rows: int, memory: Floats) -> None:
        """Views into `memory`, which has `elements` of these arguments."""
        views, at = [], 0
        for shape in self._shapes(config, rows):
            size = shape[0] * shape[1]
            views.append(memory[at : at + size].reshape(shape))
            at += lined_up(size)
        self.qkv, self.attention, self.lse, self.attention_out, self.gate_up, self.mlp_out, self.rrms = views

    @staticmethod
    def _shapes(config: ModelConfig, rows: int) -> list[tuple[int, int]]:
        width, heads, channels = config.hidden_size, config.num_attention_heads, config.head_dim
        return [
            (rows, (heads + 2 * config.num_key_value_heads) * channels),  # qkv: q and k after rotation
            (rows, heads * channels),  # attention
            (rows, heads),  # lse
            (rows, width),  # attention_out
            (rows, 2 * config.intermediate_size),  # gate_up
            (rows, width),  # mlp_out
            (4, rows),  # rrms
        ]

    @classmethod
    def elements(cls, config: ModelConfig, rows: int) -> int:
        """What they take, in float32."""
        return sum(lined_up(rows * columns) for rows, columns in cls._shapes(config, rows))


class Scratch:
    """Buffers whose content nobody needs after the call, and who multiplies matrices and attends for it."""

    def __init__(
        self,
        config: ModelConfig,
        batch: int,
        length: int,
        keys: int,
        backward: bool = False,
        products: Products | None = None,
    ) -> None:
        rows, channels = batch * length, config.head_dim
        block = min(rows, ROW_BLOCK)
        self.products = products or BlasProducts()
        self.rows = rows
        operand = self.products.operand  # of what enters products and nothing else
        self.normed = aligned_empty((block, config.hidden_size), operand)
        self.mid = aligned_empty((block, config.hidden_size))
        self.activated = aligned_empty((block, config.intermediate_size), operand)
        self.attention = self.products.attention(keys, channels, backward)
        if backward:
            heads, groups = config.num_attention_heads, config.num_key_value_heads
            self.dqkv = aligned_empty((rows, (heads + 2 * groups) * channels))
            self.dattention = aligned_empty((rows, heads * channels))
            self.dout = aligned_empty((block, config.hidden_size), operand)
            self.dnormed = aligned_empty((block, config.hidden_size))
            self.dactivated = aligned_empty((block, config.intermediate_size))
            self.dgate_up = aligned_empty((block, 2 * config.intermediate_size), operand)

    def blocks(self) -> Iterator[slice]:
        """All rows, a block at a time."""
        for begin in range(0, self.rows, ROW_BLOCK):
            yield slice(begin, min(begin + ROW_BLOCK, self.rows))


def split_heads(config: ModelConfig, qkv: Array, place: Placement) -> tuple[Array, Array, Array]:
    """qkv: N x (H+2G)K -> views q: BSHK, k: BSGK, v: BSGK."""
    heads, groups = config.num_attention_heads, config.num_key_value_heads
    all_heads = qkv.reshape(place.batch, place.length, heads + 2 * groups, config.head_dim)
    return all_heads[:, :, :heads], all_heads[:, :, heads : heads + groups], all_heads[:, :, heads + groups :]


def _heads(x: Floats, place: Placement, channels: int) -> Floats:
    return x.reshape(place.batch, place.length, -1, channels)


def layer_forward(
    layer: LayerWeights,
    config: ModelConfig,
    x: Floats,
    out: Floats,
    saved: Activations,
    scratch: Scratch,
    place: Placement,
) -> None:
    """x: ND -> out: ND"""
    for block in scratch.blocks():
        _project(layer, config, x[block], block, saved, scratch, place)
    q, k, v = split_heads(config, saved.qkv, place)
    y, lse = _heads(saved.attention, place, config.head_dim), _heads(saved.lse, place, 1)[..., 0]
    scratch.attention.forward_into(y, lse, q, k, v, place.start)
    for block in scratch.blocks():
        _mix(layer, config, x[block], out[block], block, saved, scratch)


def _project(
    layer: LayerWeights,
    config: ModelConfig,
    x: Floats,
    block: slice,
    saved: Activations,
    scratch: Scratch,
    place: Placement,
) -> None:
    """qkv = rope(qkv(norm_1(x))) of some rows."""
    normed, qkv, position = scratch.normed[: len(x)], saved.qkv[block], place.position[block]
    rmsnorm.forward_into(normed, saved.rrms[0, block], x, layer.norm_1, config.rms_norm_eps)
    scratch.products.forward_into(qkv, normed, layer.qkv)
    turned = config.num_attention_heads + config.num_key_value_heads
    every_head = qkv.reshape(len(x), -1, config.head_dim)
    rope.rotate_in_place(every_head, turned, position, place.cos, place.sin, np.float32(1.0))


def _mix(
    layer: LayerWeights,
    config: ModelConfig,
    x: Floats,
    out: Floats,
    block: slice,
    saved: Activations,
    scratch: Scratch,
) -> None:
    """mid = x + norm_2(attention_out(attention)), out = mid + norm_4(down(swiglu(gate_up(norm_3(mid))))), some rows."""
    eps, products, rrms = config.rms_norm_eps, scratch.products, saved.rrms[:, block]
    normed, activated = scratch.normed[: len(x)], scratch.activated[: len(x)]
    products.forward_into(saved.attention_out[block], saved.attention[block], layer.attention_out)
    mid = _add_attention(layer, config, x, block, saved, scratch)
    gate_up, mlp_out = saved.gate_up[block], saved.mlp_out[block]
    rmsnorm.forward_into(normed, rrms[2], mid, layer.norm_3, eps)
    products.forward_into(gate_up, normed, layer.gate_up)
    swiglu.forward_into(activated, gate_up)
    products.forward_into(mlp_out, activated, layer.down)
    rmsnorm.residual_forward_into(out, rrms[3], mlp_out, mid, layer.norm_4, eps)


def _add_attention(
    layer: LayerWeights, config: ModelConfig, x: Floats, block: slice, saved: Activations, scratch: Scratch
) -> Floats:
    """mid = x + norm_2(attention_out) of some rows; forward and backward call it alike, and so get the same bits."""
    mid, eps = scratch.mid[: len(x)], config.rms_norm_eps
    rmsnorm.residual_forward_into(mid, saved.rrms[1, block], saved.attention_out[block], x, layer.norm_2, eps)
    return mid


def layer_output(
    layer: LayerWeights, config: ModelConfig, x: Floats, out: Floats, saved: Activations, scratch: Scratch
) -> None:
    """x: ND -> out: ND, once more after `layer_forward`, to the bit: the sums alone, from what it left."""
    for block in scratch.blocks():
        mid = _add_attention(layer, config, x[block], block, saved, scratch)
        rrms, mlp_out = saved.rrms[3, block], saved.mlp_out[block]
        rmsnorm.residual_forward_into(out[block], rrms, mlp_out, mid, layer.norm_4, config.rms_norm_eps)


def layer_backward(
    dx: Floats,
    dlayer: LayerWeights,
    layer: LayerWeights,
    config: ModelConfig,
    x: Floats,
    saved: Activations,
    scratch: Scratch,
    place: Placement,
    add: bool,
) -> None:
    """dx: ND holds the gradient of the layer's output and becomes that of its input.

    `add` to the tensors of dlayer, or replace what is in them.  Both residual paths carry the gradient on unchanged, so
    it stays in dx and each branch adds its own part.
    """
    if not add:
        for norm in (dlayer.norm_1, dlayer.norm_2, dlayer.norm_3, dlayer.norm_4):
            norm[:] = 0.0
    for block in scratch.blocks():
        more = add or block.start > 0
        _mix_backward(dx[block], dlayer, layer, config, x[block], block, saved, scratch, more)
    q, k, v = split_heads(config, saved.qkv, place)
    dq, dk, dv = split_heads(config, scratch.dqkv, place)
    scratch.attention.backward_into(
        dq,
        dk,
        dv,
        _heads(scratch.dattention, place, config.head_dim),
        q,
        k,
        v,
        place.start,
        _heads(saved.attention, place, config.head_dim),
        _heads(saved.lse, place, 1)[..., 0],
    )
    for block in scratch.blocks():
        more = add or block.start > 0
        _project_backward(dx[block], dlayer, layer, config, x[block], block, saved, scratch, place, more)


def _mix_backward(
    dx: Floats,
    dlayer: LayerWeights,
    layer: LayerWeights,
    config: ModelConfig,
    x: Floats,
    block: slice,
    saved: Activations,
    scratch: Scratch,
    add: bool,
) -> None:
    """From the gradient of `out` to those of `mid` (in dx) and of `attention`, some rows."""
    products, rrms, rows = scratch.products, saved.rrms[:, block], len(dx)
    dout, normed, activated = scratch.dout[:rows], scratch.normed[:rows], scratch.activated[:rows]
    dnormed = scratch.dnormed[:rows]
    dactivated, dgate_up = scratch.dactivated[:rows], scratch.dgate_up[:rows]
    gate_up, mid = saved.gate_up[block], _add_attention(layer, config, x, block, saved, scratch)
    rmsnorm.backward_into(dout, dlayer.norm_4, dx, saved.mlp_out[block], layer.norm_4, rrms[3], False)
    products.dx_into(dactivated, dout, layer.down)
    swiglu.backward_into(dgate_up, activated, dactivated, gate_up)
    products.dweight_into(dlayer.down, dout, activated, add)
    rmsnorm.normed_into(normed, mid, layer.norm_3, rrms[2])
    products.dweight_into(dlayer.gate_up, dgate_up, normed, add)
    products.dx_into(dnormed, dgate_up, layer.gate_up)
    rmsnorm.backward_into(dx, dlayer.norm_3, dnormed, mid, layer.norm_3, rrms[2], True)
    rmsnorm.backward_into(dout, dlayer.norm_2, dx, saved.attention_out[block], layer.norm_2, rrms[1], False)
    products.dweight_into(dlayer.attention_out, dout, saved.attention[block], add)
    products.dx_into(scratch.dattention[block], dout, layer.attention_out)


def _project_backward(
    dx: Floats,
    dlayer: LayerWeights,
    layer: LayerWeights,
    config: ModelConfig,
    x: Floats,
    block: slice,
    saved: Activations,
    scratch: Scratch,
    place: Placement,
    add: bool,
) -> None:
    """From the gradients of q, k and v to that of x, added to dx; some rows."""
    products, rrms, rows = scratch.products, saved.rrms[0, block], len(dx)
    dnormed, normed, dqkv = scratch.dnormed[:rows], scratch.normed[:rows], scratch.dqkv[block]
    turned = config.num_attention_heads + config.num_key_value_heads
    every_head = dqkv.reshape(rows, -1, config.head_dim)
    rope.rotate_in_place(every_head, turned, place.position[block], place.cos, place.sin, np.float32(-1.0))
    rmsnorm.normed_into(normed, x, layer.norm_1, rrms)
    products.dweight_into(dlayer.qkv, dqkv, normed, add)
    products.dx_into(dnormed, dqkv, layer.qkv)
    rmsnorm.backward_into(dx, dlayer.norm_1, dnormed, x, layer.norm_1, rrms, True)
