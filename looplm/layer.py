"""One layer of the shared stack ("sandwich": a norm before and after attention and MLP), forward and backward.

The same forward serves training, inference and cached decoding; it writes into buffers made once.
Rows are N = B * S positions of a batch.

Source: Section 4.1; the four norms and their places are those of the published code.
"""

import dataclasses

import numpy as np

from .arrays import Array, Floats, Ints, aligned_empty
from .config import ModelConfig
from .kernels import attention, rmsnorm, rope, swiglu
from .kernels.linear import accumulate_outer
from .weights import LayerWeights


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
    def of(cls, config: ModelConfig, batch: int, length: int, start: Ints | None, past: int = 0) -> "Placement":
        """Rows that follow `past` earlier positions; `start` defaults to no left padding."""
        first = np.zeros(batch, np.int64) if start is None else np.ascontiguousarray(start, np.int64)
        position = np.maximum(np.arange(past, past + length)[None] - first[:, None], 0).reshape(-1)
        needed = max(config.max_position_embeddings, past + length)
        cos, sin = rope.rope_tables(needed, config.head_dim, config.rope_theta)
        return cls(batch, length, position, first, cos, sin)


@dataclasses.dataclass(frozen=True)
class Past:
    """One layer's key/value slot: keys and values are B x capacity x G x K, `filled` positions of it are known."""

    keys: Floats
    values: Floats
    filled: int


class Activations:
    """What one application of a layer leaves for its backward pass."""

    def __init__(self, config: ModelConfig, batch: int, length: int) -> None:
        rows, width = batch * length, config.hidden_size
        heads, groups, channels = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        self.qkv = aligned_empty((rows, (heads + 2 * groups) * channels))  # q and k after rotation
        self.attention = aligned_empty((rows, heads * channels))
        self.lse = aligned_empty((rows, heads))
        self.attention_out = aligned_empty((rows, width))
        self.mid = aligned_empty((rows, width))
        self.gate_up = aligned_empty((rows, 2 * config.intermediate_size))
        self.mlp_out = aligned_empty((rows, width))
        self.rrms = aligned_empty((4, rows))


class Scratch:
    """Buffers whose content nobody needs after the call."""

    def __init__(self, config: ModelConfig, batch: int, length: int, keys: int, backward: bool = False) -> None:
        rows = batch * length
        size = max(attention.score_buffer_size(length, keys, config.num_attention_heads), keys)
        self.normed = aligned_empty((rows, config.hidden_size))
        self.activated = aligned_empty((rows, config.intermediate_size))
        self.scores = aligned_empty((size,))
        if backward:
            heads, groups, channels = config.num_attention_heads, config.num_key_value_heads, config.head_dim
            qkv_width = (heads + 2 * groups) * channels
            self.dscores = aligned_empty((size,))
            self.dqkv = aligned_empty((rows, qkv_width))
            self.dattention = aligned_empty((rows, heads * channels))
            self.dout = aligned_empty((rows, config.hidden_size))
            self.dactivated = aligned_empty((rows, config.intermediate_size))
            self.dgate_up = aligned_empty((rows, 2 * config.intermediate_size))
            self.outer = aligned_empty((max(qkv_width, 2 * config.intermediate_size) * config.hidden_size,))


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
    past: Past | None = None,
) -> None:
    """x: ND -> out: ND.  With `past`, new keys and values are appended to its slot and all of it is attended to."""
    eps, normed = config.rms_norm_eps, scratch.normed
    rmsnorm.forward_into(normed, saved.rrms[0], x, layer.norm_1, eps)
    np.matmul(normed, layer.qkv.T, out=saved.qkv)
    q, k, v = split_heads(config, saved.qkv, place)
    turned = config.num_attention_heads + config.num_key_value_heads
    every_head = saved.qkv.reshape(place.position.size, -1, config.head_dim)
    rope.rotate_in_place(every_head, turned, place.position, place.cos, place.sin, np.float32(1.0))
    keys = place.length
    if past is not None:
        keys += past.filled
        past.keys[:, past.filled : keys], past.values[:, past.filled : keys] = k, v
        k, v = past.keys, past.values
    y, lse = _heads(saved.attention, place, config.head_dim), _heads(saved.lse, place, 1)[..., 0]
    attention.attend_into(y, lse, q, k, v, keys, place.start, scratch.scores)
    np.matmul(saved.attention, layer.attention_out.T, out=saved.attention_out)
    rmsnorm.residual_forward_into(saved.mid, saved.rrms[1], saved.attention_out, x, layer.norm_2, eps)

    rmsnorm.forward_into(normed, saved.rrms[2], saved.mid, layer.norm_3, eps)
    np.matmul(normed, layer.gate_up.T, out=saved.gate_up)
    swiglu.forward_into(scratch.activated, saved.gate_up)
    np.matmul(scratch.activated, layer.down.T, out=saved.mlp_out)
    rmsnorm.residual_forward_into(out, saved.rrms[3], saved.mlp_out, saved.mid, layer.norm_4, eps)


def layer_backward(
    dx: Floats,
    dlayer: LayerWeights,
    layer: LayerWeights,
    config: ModelConfig,
    x: Floats,
    saved: Activations,
    scratch: Scratch,
    place: Placement,
) -> None:
    """dx: ND holds the gradient of the layer's output and becomes that of its input; adds to every tensor of dlayer.

    Both residual paths carry the gradient on unchanged, so it stays in dx and each branch adds its own part.
    """
    rrms, dout = saved.rrms, scratch.dout

    # out = mid + norm_4(down(silu(gate) * up)),  gate | up = gate_up(norm_3(mid))
    rmsnorm.backward_into(dout, dlayer.norm_4, dx, saved.mlp_out, layer.norm_4, rrms[3], False)
    swiglu.forward_into(scratch.activated, saved.gate_up)
    accumulate_outer(dlayer.down, dout, scratch.activated, scratch.outer)
    np.matmul(dout, layer.down, out=scratch.dactivated)
    swiglu.backward_into(scratch.dgate_up, scratch.dactivated, saved.gate_up)
    rmsnorm.normed_into(scratch.normed, saved.mid, layer.norm_3, rrms[2])
    accumulate_outer(dlayer.gate_up, scratch.dgate_up, scratch.normed, scratch.outer)
    np.matmul(scratch.dgate_up, layer.gate_up, out=dout)
    rmsnorm.backward_into(dx, dlayer.norm_3, dout, saved.mid, layer.norm_3, rrms[2], True)

    # mid = x + norm_2(attention_out(attention(rope(qkv(norm_1(x))))))
    rmsnorm.backward_into(dout, dlayer.norm_2, dx, saved.attention_out, layer.norm_2, rrms[1], False)
    accumulate_outer(dlayer.attention_out, dout, saved.attention, scratch.outer)
    np.matmul(dout, layer.attention_out, out=scratch.dattention)
    q, k, v = split_heads(config, saved.qkv, place)
    dq, dk, dv = split_heads(config, scratch.dqkv, place)
    channels = config.head_dim
    attention.attend_backward_into(
        dq,
        dk,
        dv,
        _heads(scratch.dattention, place, channels),
        q,
        k,
        v,
        place.start,
        _heads(saved.attention, place, channels),
        _heads(saved.lse, place, 1)[..., 0],
        (scratch.scores, scratch.dscores),
    )
    turned = config.num_attention_heads + config.num_key_value_heads
    every_head = scratch.dqkv.reshape(place.position.size, -1, channels)
    rope.rotate_in_place(every_head, turned, place.position, place.cos, place.sin, np.float32(-1.0))
    rmsnorm.normed_into(scratch.normed, x, layer.norm_1, rrms[0])
    accumulate_outer(dlayer.qkv, scratch.dqkv, scratch.normed, scratch.outer)
    np.matmul(scratch.dqkv, layer.qkv, out=dout)
    rmsnorm.backward_into(dx, dlayer.norm_1, dout, x, layer.norm_1, rrms[0], True)
