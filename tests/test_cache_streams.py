"""What attention reads of the cache: scores and weighted values, of any count, width and type."""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from looplm import generation
from looplm.generation import Session
from looplm.kernels.cache_streams import CHANNEL_BLOCK, KEYS, scored, weighted
from looplm.kernels.cached_attention import SHARED_KEYS
from looplm.kernels.jit import njit
from looplm.kernels.product.stored import copy_columns, prepared_size, sort_columns
from looplm.kernels.streams import BFLOAT16, FLOAT32
from looplm.model import forward
from random_models import CONFIG, random_ids, random_weights, relative_error

KINDS = (FLOAT32, BFLOAT16)
COUNTS = (0, 1, 2, 7, 8, 9, 64, 65, 301)
UNTOUCHED = np.float32(123.0)


def stored(kind: int, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What the cache holds for these numbers, and what that stands for."""
    if kind == FLOAT32:
        return values, values
    words = (values.view(np.uint32) >> np.uint32(16)).astype(np.uint16)
    return words, (words.astype(np.uint32) << np.uint32(16)).view(np.float32)


def _score(kind: int) -> Callable[..., Any]:
    def run(keys, step, count, query, prepared, out, next_read):  # type: ignore[no-untyped-def]
        if kind == FLOAT32:
            copy_columns(prepared, query, query.size)
        else:
            sort_columns(prepared, query, query.size)
        scored(kind, keys, step, count, prepared, query.size, out, next_read)

    compiled: Callable[..., Any] = njit(run)
    return compiled


def _weigh(kind: int) -> Callable[..., Any]:
    def run(values, step, weight, count, out, next_read):  # type: ignore[no-untyped-def]
        weighted(kind, values, step, weight, count, out, next_read)

    compiled: Callable[..., Any] = njit(run)
    return compiled


SCORE, WEIGH = {kind: _score(kind) for kind in KINDS}, {kind: _weigh(kind) for kind in KINDS}


@pytest.mark.kernels
@pytest.mark.plain_python
@pytest.mark.parametrize("channels", [1, 6, 16, 31, 32, 64, 72, 128])
@pytest.mark.parametrize("kind", KINDS)
def test_scores_are_products_with_the_query(kind: int, channels: int) -> None:
    rng = np.random.default_rng(channels)
    held, keys = stored(kind, rng.standard_normal((max(COUNTS), channels), np.float32))
    query, prepared = rng.standard_normal(channels, np.float32), np.empty(prepared_size(channels, 1), np.float32)
    for count in COUNTS:
        out = np.full(count + KEYS + 1, UNTOUCHED)
        at = held.ctypes.data
        SCORE[kind](at, held.strides[0], count, query, prepared.ctypes.data, out.ctypes.data, at)
        expected = keys[:count].astype(np.float64) @ query
        np.testing.assert_allclose(out[:count], expected, rtol=1e-5, atol=1e-5 * np.sqrt(channels))
        assert out[-1] == UNTOUCHED


@pytest.mark.kernels
@pytest.mark.plain_python
@pytest.mark.parametrize("kind", KINDS)
def test_weighted_values_are_added(kind: int) -> None:
    rng = np.random.default_rng(1)
    held, values = stored(kind, rng.standard_normal((max(COUNTS), 3 * CHANNEL_BLOCK), np.float32))
    weight, before = rng.random(max(COUNTS), np.float32), rng.standard_normal(CHANNEL_BLOCK, np.float32)
    block = slice(CHANNEL_BLOCK, 2 * CHANNEL_BLOCK)
    for count in COUNTS:
        out = np.concatenate([before, [UNTOUCHED]]).astype(np.float32)
        at = held[:, block].ctypes.data
        WEIGH[kind](at, held.strides[0], weight.ctypes.data, count, out.ctypes.data, at)
        expected = before + weight[:count].astype(np.float64) @ values[:count, block]
        np.testing.assert_allclose(out[:-1], expected, rtol=1e-5, atol=1e-4)
        assert out[-1] == UNTOUCHED


@pytest.mark.parametrize("heads", [2, 6])
@pytest.mark.parametrize("kv_dtype", ["float32", "bfloat16"])
def test_queries_of_a_group_share_long_keys(kv_dtype: Any, heads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Few rows at a time, beyond the keys that the queries of a group share at once; channels fill no whole block."""
    monkeypatch.setattr(generation, "PREFILL_ROWS", 20)
    length = 2 * SHARED_KEYS + 9
    shape = {"num_attention_heads": heads, "num_key_value_heads": 2, "head_dim": CHANNEL_BLOCK + 8}
    weights = random_weights(dataclasses.replace(CONFIG, max_position_embeddings=length, **shape))
    ids = random_ids(1, length)
    found = Session(weights, kv_dtype=kv_dtype).feed(ids).hidden
    expected = forward(weights, ids).hidden
    rounded = 0.1  # what five loops of a random model make of it
    assert relative_error(found, expected) < (1e-5 if kv_dtype == "float32" else rounded)


@pytest.mark.parametrize("groups", [2, 4])
def test_left_padding_sees_nothing_and_is_not_seen(groups: int) -> None:
    weights = random_weights(dataclasses.replace(CONFIG, num_key_value_heads=groups))
    ids, start = random_ids(3, 12), np.array([0, 4, 7])
    session = Session(weights, batch=3, start=start)
    found = np.concatenate([session.feed(ids[:, s : s + 1]).hidden for s in range(12)], axis=2)
    for row, first in enumerate(start):
        alone = forward(weights, ids[row : row + 1, first:]).hidden[:, 0]
        assert relative_error(found[:, row, first:], alone) < 1e-5
