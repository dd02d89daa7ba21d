"""Weights of integers on tile registers: the same bits as without them."""

import numpy as np
import pytest

from looplm.arrays import aligned_empty
from looplm.kernels import amx
from looplm.kernels.addresses import pairs_at
from looplm.kernels.integer_lines import IN_BYTES
from looplm.kernels.jit import njit
from looplm.kernels.product.integer_tiles import on_tiles
from looplm.kernels.product.integers import _step, groups_of
from looplm.kernels.product.stored import multiply, prepared_size, scratch_size
from looplm.kernels.streams import INT4, INT8
from looplm.stored import StoredMatrix, convert

in_shorts = pytest.mark.skipif(not IN_BYTES[INT8], reason="such a processor is given x in 16 bits")
KINDS = pytest.mark.parametrize("name", [pytest.param("int8", marks=in_shorts), "int4"])


def random_matrix(shape: tuple[int, int], seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def tiled(kind: int):  # type: ignore[no-untyped-def]
    products = on_tiles(kind)

    @njit
    def multiply_runs(w, s, y, y_step, w_2, s_2, y_2, y_step_2, groups, x, x_step, rows, scratch):  # type: ignore[no-untyped-def]
        state = pairs_at(scratch, amx.STATE_SIZE)
        amx.begin_tiles(state)
        products(w, s, y, y_step, w_2, s_2, y_2, y_step_2, groups, x, x_step, rows, scratch)
        amx.end_tiles(state)

    return multiply_runs


TILED = {INT8: tiled(INT8), INT4: tiled(INT4)}


def on_registers(matrix: StoredMatrix, x: np.ndarray) -> np.ndarray:
    """x times the first 32 rows of a matrix, whatever the program would choose."""
    (kind, codes, scales), (rows, columns) = matrix.plan, x.shape
    prepared, scratch = aligned_empty((prepared_size(columns, 16),)), aligned_empty((scratch_size(columns),))
    prepared[:], scratch[:] = np.nan, np.nan
    multiply[kind].call(0, 0, columns, 0, 0, x.ctypes.data, columns, rows, 0, 0, prepared.ctypes.data, 0)
    y = np.full((rows, 40), 7.0, np.float32)
    groups = groups_of(kind, columns)
    size, s_size = matrix.codes[0].nbytes, matrix.scales[0].nbytes
    to = y.ctypes.data
    first, second = (codes, scales, to, 4 * 40), (codes + size, scales + s_size, to + 64, 4 * 40)
    at = prepared.ctypes.data, _step(kind, columns), rows, scratch.ctypes.data
    TILED[kind](*first, *second, groups, *at)
    assert (y[:, 32:] == 7.0).all()
    return y[:, :32]


@pytest.mark.kernels
@pytest.mark.parametrize(("rows", "columns"), [(1, 20), (5, 130), (16, 200)])
@KINDS
def test_a_row_on_registers_has_the_bits_that_it_has_alone(name: str, rows: int, columns: int) -> None:
    matrix, x = convert(random_matrix((32, columns)), name), random_matrix((rows, columns), seed=1)
    alone = np.concatenate([matrix.multiply(row[None]) for row in x])
    np.testing.assert_array_equal(on_registers(matrix, x), alone)


@pytest.mark.plain_python
@KINDS
def test_emulated_registers_multiply_bytes_with_and_without_sign(name: str) -> None:
    matrix, x = convert(random_matrix((32, 7)), name), random_matrix((2, 7), seed=1)
    expected = x @ matrix.rows(np.arange(32)).T
    np.testing.assert_allclose(on_registers(matrix, x), expected, rtol=1e-3, atol=1e-3)


@KINDS
def test_what_is_no_number_stays_in_its_row(name: str) -> None:
    matrix, x = convert(random_matrix((32, 200)), name), random_matrix((6, 200), seed=1)
    x[2, 70] = np.nan
    found = on_registers(matrix, x)
    assert np.isnan(found[2]).all()
    assert np.isfinite(np.delete(found, 2, axis=0)).all()


@pytest.mark.kernels
def test_bytes_of_every_sign_and_size_are_multiplied_exactly() -> None:
    """-128 and 255 among them, which a multiplication of 16-bit sums would not hold."""
    rng = np.random.default_rng(2)
    left = rng.integers(-128, 128, (16, 64)).astype(np.int8)
    right = rng.integers(0, 256, (16, 16, 4)).astype(np.uint8)  # four rows, column, row of the four
    left[0], right[:, 0] = -128, 255
    found = np.full((16, 16), 3, np.int32)

    @njit
    def product(state, into, a, b):  # type: ignore[no-untyped-def]
        amx.begin_tiles(state)
        amx.load_tile(state, 0, into, 0, 16)
        amx.load_tile(state, 1, a, 0, 16)
        amx.load_tile(state, 2, b, 0, 16)
        amx.dot_bytes(state, 0, 1, 2)
        amx.store_tile(state, 0, into, 0, 16)
        amx.end_tiles(state)

    product(amx.tile_state(), found.view(np.uint32), left.view(np.uint32), right.reshape(16, 64).view(np.uint32))
    columns = right.transpose(0, 2, 1).reshape(64, 16).astype(np.int64)
    np.testing.assert_array_equal(found, 3 + left.astype(np.int64) @ columns)
