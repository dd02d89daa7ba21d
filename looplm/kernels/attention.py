"""Causal attention with grouped key/value heads: forward and backward.

Query blocks keep the scores small: memory grows with the number of keys, never with its square.  BLAS multiplies,
compiled kernels do the softmax.  A few queries at a time (decoding) take a kernel of their own, where the calls would
cost more than the arithmetic.
"""

import numpy as np

from ..arrays import Array, Floats, Ints
from .intrinsics import exp32
from .jit import njit

QUERY_BLOCK = 128  # queries whose scores are alive at once
FEW_QUERIES = 4  # up to so many, the one-call kernel wins over block products

_ZERO, _ONE = np.float32(0.0), np.float32(1.0)
_LOWEST = np.float32(-3.0e38)


@njit(inline="always")
def _visible(row, first_key, last):
    """The scores of keys first_key .. last; all others in the row become 0."""
    end = max(last + 1, first_key)
    row[:first_key] = _ZERO
    row[end:] = _ZERO
    return row[first_key:end]


@njit
def _softmax_in_place(scores, lse, first_key, diagonal, scale):
    """scores: HSP, in place; query s sees keys first_key .. diagonal + s.  A query before first_key gets zeros."""
    for head in range(scores.shape[0]):
        for s in range(scores.shape[1]):
            seen = _visible(scores[head, s], first_key, diagonal + s)
            if not seen.size:
                lse[s, head] = _ZERO
                continue
            highest = _LOWEST
            for j in range(seen.size):
                highest = max(highest, seen[j])
            highest *= scale
            total = _ZERO
            for j in range(seen.size):
                weight = exp32(seen[j] * scale - highest)
                seen[j] = weight
                total += weight
            inverse = _ONE / total
            for j in range(seen.size):
                seen[j] *= inverse
            lse[s, head] = highest + np.log(total)


@njit
def _probabilities_again(scores, lse, first_key, diagonal, scale):
    """scores: HSP -> softmax probabilities in place, from the saved log-sum-exp."""
    for head in range(scores.shape[0]):
        for s in range(scores.shape[1]):
            seen, shift = _visible(scores[head, s], first_key, diagonal + s), lse[s, head]
            for j in range(seen.size):
                seen[j] = exp32(seen[j] * scale - shift)


@njit
def _score_gradient(dscores, prob, dy, y, scale):
    """dscores: HSP holds dy @ v.T; becomes p * (dy @ v.T - dy . y) * scale.  dy, y: SHK."""
    for head in range(prob.shape[0]):
        for s in range(prob.shape[1]):
            dot = _ZERO
            for i in range(dy.shape[2]):
                dot += dy[s, head, i] * y[s, head, i]
            p, d = prob[head, s], dscores[head, s]
            for j in range(p.size):
                d[j] = p[j] * (d[j] - dot) * scale


@njit
def _attend_few(y, lse, q, k, v, keys, start, scores):
    """y: BSHK for a handful of queries, one (row, query, head) after the other; the first `keys` positions of k, v."""
    batch, queries, heads, channels = q.shape
    per_group = heads // k.shape[2]
    scale = np.float32(1.0 / np.sqrt(channels))
    for b in range(batch):
        for s in range(queries):
            last = keys - queries + s
            for head in range(heads):
                group, query, out = head // per_group, q[b, s, head], y[b, s, head]
                out[:] = _ZERO
                lse[b, s, head] = _ZERO
                if last < start[b]:
                    continue
                highest = _LOWEST
                for j in range(start[b], last + 1):
                    dot, key = _ZERO, k[b, j, group]
                    for i in range(channels):
                        dot += query[i] * key[i]
                    dot *= scale
                    scores[j] = dot
                    highest = max(highest, dot)
                total = _ZERO
                for j in range(start[b], last + 1):
                    weight, value = exp32(scores[j] - highest), v[b, j, group]
                    total += weight
                    for i in range(channels):
                        out[i] += weight * value[i]
                inverse = _ONE / total
                for i in range(channels):
                    out[i] *= inverse
                lse[b, s, head] = highest + np.log(total)


def score_buffer_size(queries: int, keys: int, heads: int) -> int:
    """Elements `scores` must have in `attend_into` and in `attend_backward_into`."""
    return heads * min(queries, QUERY_BLOCK) * keys


def _by_group(x: Array, groups: int) -> Array:
    """SHK -> G x (H/G) x S x K, a view."""
    queries, heads, channels = x.shape
    return x.reshape(queries, groups, heads // groups, channels).transpose(1, 2, 0, 3)


def attend_into(
    y: Floats, lse: Floats, q: Floats, k: Floats, v: Floats, keys: int, start: Ints, scores: Floats
) -> None:
    """y: BSHK and lse: BSH from q: BSHK and the first `keys` positions of k, v: BPGK.

    q, k and v may be views into one projection; whole cache slots keep the one-call kernel on contiguous memory.
    """
    batch, queries, heads, channels = q.shape
    groups = k.shape[2]
    if queries <= FEW_QUERIES:
        _attend_few(y, lse, q, k, v, keys, start, scores)
        return
    scale = np.float32(channels**-0.5)
    for b in range(batch):
        for begin in range(0, queries, QUERY_BLOCK):
            block = slice(begin, min(begin + QUERY_BLOCK, queries))
            rows, seen = block.stop - begin, keys - queries + block.stop
            part = scores[: heads * rows * seen].reshape(heads, rows, seen)
            grouped = part.reshape(groups, heads // groups, rows, seen)
            np.matmul(_by_group(q[b, block], groups), k[b, :seen].transpose(1, 2, 0)[:, None], out=grouped)
            _softmax_in_place(part, lse[b, block], start[b], keys - queries + begin, scale)
            np.matmul(grouped, v[b, :seen].transpose(1, 0, 2)[:, None], out=_by_group(y[b, block], groups))


def attend_backward_into(
    dq: Floats,
    dk: Floats,
    dv: Floats,
    dy: Floats,
    q: Floats,
    k: Floats,
    v: Floats,
    start: Ints,
    y: Floats,
    lse: Floats,
    scores: tuple[Floats, Floats],
) -> None:
    """Overwrites dq: BSHK, dk, dv: BPGK; probabilities are computed again from `lse`, block by block."""
    batch, queries, heads, channels = q.shape
    keys, groups = k.shape[1], k.shape[2]
    scale = np.float32(channels**-0.5)
    for b in range(batch):
        for begin in range(0, queries, QUERY_BLOCK):
            block = slice(begin, min(begin + QUERY_BLOCK, queries))
            rows, seen = block.stop - begin, keys - queries + block.stop
            prob, dscores = (buffer[: heads * rows * seen].reshape(heads, rows, seen) for buffer in scores)
            grouped = (groups, heads // groups, rows, seen)
            p, d = prob.reshape(grouped), dscores.reshape(grouped)
            q_block, dy_block = _by_group(q[b, block], groups), _by_group(dy[b, block], groups)
            np.matmul(q_block, k[b, :seen].transpose(1, 2, 0)[:, None], out=p)
            _probabilities_again(prob, lse[b, block], start[b], keys - queries + begin, scale)
            np.matmul(dy_block, v[b, :seen].transpose(1, 2, 0)[:, None], out=d)
            _score_gradient(dscores, prob, dy[b, block], y[b, block], scale)
            np.matmul(d, k[b, :seen].transpose(1, 0, 2)[:, None], out=_by_group(dq[b, block], groups))
            whole = begin == 0 and block.stop == queries  # one block covers every key: nothing to add up
            for into, left, right in ((dk, d, q_block), (dv, p, dy_block)):
                target = into[b, :seen].transpose(1, 0, 2)
                if whole and heads == groups:
                    np.matmul(left[:, 0].swapaxes(1, 2), right[:, 0], out=target)
                    continue
                if begin == 0:
                    into[b] = 0.0
                target += np.matmul(left.swapaxes(2, 3), right).sum(1)


def attention_forward(q: Floats, k: Floats, v: Floats, start: Ints) -> tuple[Floats, Floats]:
    y, lse = np.empty_like(q), np.empty(q.shape[:3], q.dtype)
    scores = np.empty(max(k.shape[1], score_buffer_size(q.shape[1], k.shape[1], q.shape[2])), q.dtype)
    attend_into(y, lse, q, k, v, k.shape[1], start, scores)
    return y, lse


def attention_backward(
    dy: Floats, q: Floats, k: Floats, v: Floats, start: Ints, y: Floats, lse: Floats
) -> tuple[Floats, Floats, Floats]:
    dq, dk, dv = np.empty_like(q), np.empty_like(k), np.empty_like(v)
    size = score_buffer_size(q.shape[1], k.shape[1], q.shape[2])
    attend_backward_into(dq, dk, dv, dy, q, k, v, start, y, lse, (np.empty(size, q.dtype), np.empty(size, q.dtype)))
    return dq, dk, dv
