"""Attention in float32 and of bfloat16 operands: what it computes on each path, wherever its blocks end."""

import types
from typing import Any

import numpy as np
import pytest

from looplm.arrays import aligned_empty
from looplm.kernels.amx import BLOCK
from looplm.kernels.attention import QUERY_BLOCK as FLOAT_BLOCK
from looplm.kernels.attention import Attention, attention_with
from looplm.kernels.product.select import PATHS
from looplm.kernels.rounded_attention import QUERY_BLOCK, PairAttention, TileAttention
from looplm.kernels.softmax import ROWS
from looplm.kernels.vectors import TILE_COLUMNS
from looplm.memory import nbytes
from looplm_reference import bfloat16, contract

ROUNDED = [PairAttention, TileAttention]
every_kind = pytest.mark.parametrize("kind", [Attention, *ROUNDED])


def dims_of(*shapes: tuple[int, int, int, int, int]) -> list[dict[str, int]]:
    return [{"B": 2, "S": s, "P": p, "H": h, "G": g, "K": k} for s, p, h, g, k in shapes]


# Queries, keys and channels that end inside a block and on its border; groups of heads.
SMALL = dims_of((ROWS + 1, 9, 4, 2, 6), (3, BLOCK + 1, 2, 1, 8))
LARGE = dims_of(
    (BLOCK, BLOCK, 2, 2, BLOCK),
    (BLOCK + 1, 2 * BLOCK, 2, 1, BLOCK + 2),
    (QUERY_BLOCK, QUERY_BLOCK + 1, 2, 1, 64),
    (2 * QUERY_BLOCK + 3, 2 * QUERY_BLOCK + 70, 3, 1, 10),
)
OF_FLOATS = dims_of(
    (FLOAT_BLOCK, FLOAT_BLOCK + 7, 2, 1, 32),
    (2 * FLOAT_BLOCK + ROWS - 1, 2 * FLOAT_BLOCK + ROWS - 1, 2, 2, TILE_COLUMNS),
)


def on(kind: Any) -> types.SimpleNamespace:
    forward, backward = attention_with(kind)
    return types.SimpleNamespace(attention_forward=forward, attention_backward=backward)


def rows_of(kind: Any, dims: dict[str, int], rounded: bool) -> list[contract.Row]:
    expected = {"tolerance": bfloat16.ATTENTION_TOLERANCE, "truth": bfloat16.products} if rounded else {}
    return list(contract.check(on(kind), "attention", dims, **expected))


def name_of(dims: dict[str, int]) -> str:
    return "x".join(str(dims[letter]) for letter in "SPHGK")


@pytest.mark.kernels
@pytest.mark.plain_python
@every_kind
@pytest.mark.parametrize("dims", SMALL, ids=name_of)
def test_it_rounds_what_is_multiplied_or_nothing(kind: Any, dims: dict[str, int]) -> None:
    assert contract.first_failure(rows_of(kind, dims, kind in ROUNDED)) is None


@pytest.mark.kernels
@pytest.mark.plain_python
@pytest.mark.parametrize(("kind", "channels"), [(Attention, 1), (PairAttention, 2), (TileAttention, 2)])
def test_so_it_does_with_one_of_everything(kind: Any, channels: int) -> None:
    (dims,) = dims_of((1, 1, 1, 1, channels))
    assert contract.first_failure(rows_of(kind, dims, kind in ROUNDED)) is None


@pytest.mark.kernels
@every_kind
@pytest.mark.parametrize("dims", [*contract.DIMS, *LARGE], ids=name_of)
def test_it_does_so_in_blocks(kind: Any, dims: dict[str, int]) -> None:
    assert contract.first_failure(rows_of(kind, dims, kind in ROUNDED)) is None


@pytest.mark.kernels
@pytest.mark.parametrize("dims", OF_FLOATS, ids=name_of)
def test_so_does_float32_in_its_own(dims: dict[str, int]) -> None:
    assert contract.first_failure(rows_of(Attention, dims, False)) is None


@every_kind
def test_one_precision_is_told_from_the_other(kind: Any) -> None:
    assert contract.first_failure(rows_of(kind, LARGE[0], kind not in ROUNDED)) is not None


@pytest.mark.parametrize("path", PATHS.values(), ids=lambda path: path.name)
def test_products_and_attention_have_the_same_precision(path: Any) -> None:
    rounds = issubclass(path.products([(1, 1)]).attention, PairAttention)
    assert rounds == (path.precision == "bf16")


def drawn(batch: int, queries: int, keys: int, heads: int, groups: int, channels: int) -> dict[str, Any]:
    rng = np.random.default_rng(4)

    def normal(*shape: int) -> Any:
        return rng.standard_normal(shape, np.float32)

    return {
        "q": normal(batch, queries, heads, channels),
        "k": normal(batch, keys, groups, channels),
        "v": normal(batch, keys, groups, channels),
        "dy": normal(batch, queries, heads, channels),
        "start": np.array([0, 5, keys - 3][:batch]),
    }


def computed(kind: Any, given: dict[str, Any]) -> dict[str, Any]:
    q, k, v, start, dy = (given[name] for name in ("q", "k", "v", "start", "dy"))
    y, lse = on(kind).attention_forward(q, k, v, start)
    return dict(
        zip(
            ("y", "lse", "dq", "dk", "dv"),
            (y, lse, *on(kind).attention_backward(dy, q, k, v, start, y, lse)),
            strict=True,
        )
    )


def test_paths_differ_in_the_order_of_sums_alone() -> None:
    given = drawn(3, 90, 101, 4, 2, 24)
    pairs, tiles = (computed(kind, given) for kind in ROUNDED)
    for name, expected in pairs.items():
        assert contract.relative_error(expected, tiles[name]) < bfloat16.ATTENTION_TOLERANCE, name


@every_kind
def test_a_row_of_a_batch_is_the_same_alone(kind: Any) -> None:
    given = drawn(3, 70, 70, 4, 2, 16)
    together = computed(kind, given)
    for b in range(3):
        for name, array in computed(kind, {name: value[b : b + 1] for name, value in given.items()}).items():
            np.testing.assert_array_equal(array[0], together[name][b])


@every_kind
def test_heads_may_lie_beside_each_other_and_buffers_be_used_again(kind: Any) -> None:
    """As in training: q, k and v are views of one array, their gradients of another."""
    batch, length, heads, groups, channels = 2, 75, 4, 2, 20
    given = drawn(batch, length, length, heads, groups, channels)
    expected = computed(kind, given)
    both = [aligned_empty((batch, length, heads + 2 * groups, channels)) for _ in range(2)]
    (q, k, v), (dq, dk, dv) = ((x[:, :, :heads], x[:, :, heads:-groups], x[:, :, -groups:]) for x in both)
    q[:], k[:], v[:] = given["q"], given["k"], given["v"]
    y, lse, attention = np.empty_like(expected["y"]), np.empty_like(expected["lse"]), kind(length, channels, True)
    for _ in range(2):
        attention.forward_into(y, lse, q, k, v, given["start"])
        attention.backward_into(dq, dk, dv, given["dy"], q, k, v, given["start"], y, lse)
        for name, array in zip(expected, (y, lse, dq, dk, dv), strict=True):
            np.testing.assert_array_equal(array, expected[name])


@every_kind
def test_what_is_not_seen_does_not_matter_and_what_is_no_number_shows(kind: Any) -> None:
    given = drawn(2, 40, 40, 2, 2, 8)
    before = computed(kind, given)
    given["k"][1, :5], given["k"][0, 39] = 1e30, np.nan
    after = computed(kind, given)
    np.testing.assert_array_equal(after["y"][1], before["y"][1])
    np.testing.assert_array_equal(after["y"][0, :39], before["y"][0, :39])
    assert np.isnan(after["y"][0, 39]).all()
    assert (after["y"][1, :5] == 0.0).all()
    assert (after["lse"][1, :5] == 0.0).all()


@every_kind
def test_what_its_buffers_held_does_not_matter(kind: Any) -> None:
    given = drawn(2, 53, 61, 4, 2, 12)
    expected, attention = computed(kind, given), kind(61, 12, True)
    buffers = [array for name, array in vars(attention).items() if name != "_state"]
    for buffer in buffers:
        buffer.view(np.uint32)[:] = 0xFFFFFFFF  # NaN in float32, and twice in bfloat16
    assert buffers
    y, lse = np.empty_like(expected["y"]), np.empty_like(expected["lse"])
    attention.forward_into(y, lse, given["q"], given["k"], given["v"], given["start"])
    np.testing.assert_array_equal(y, expected["y"])
    found = [np.empty_like(expected[name]) for name in ("dq", "dk", "dv")]
    attention.backward_into(*found, given["dy"], given["q"], given["k"], given["v"], given["start"], y, lse)
    for name, array in zip(("dq", "dk", "dv"), found, strict=True):
        np.testing.assert_array_equal(array, expected[name])


@every_kind
def test_memory_for_a_backward_pass_is_taken_only_for_one(kind: Any) -> None:
    assert 0 < nbytes(kind(100, 24)) < nbytes(kind(100, 24, True))
