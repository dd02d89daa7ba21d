"""Products on tile registers with stored weights: as exact as float32, and the same bits whoever asks for what."""

import functools
from typing import Any

import numpy as np
import pytest

from looplm.arrays import aligned_empty
from looplm.kernels import amx, parts
from looplm.kernels.jit import njit
from looplm.kernels.product import tile_streams
from looplm.kernels.product.tile_streams import BLOCK, DEEP, multiply_exact, multiply_pairs
from looplm.kernels.streams import BFLOAT16
from looplm.safetensors_file import round_to_bfloat16, widen_bfloat16
from looplm.stored import FORMATS, Format, StoredMatrix, convert
from random_models import relative_error

SHAPES = [(1, 1), (3, 2), (16, 64), (33, 200), (70, 401)]
LARGE = (BLOCK + 37, 32 * DEEP + 45)  # more rows, and longer ones, than are read at a time
TOLERANCE = 5e-7
only_native = pytest.mark.skipif(not amx.NATIVE, reason="takes minutes on emulated registers")
POISON = 0x7FC0  # bits of a NaN


def random_matrix(shape: tuple[int, int], seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return (rng.standard_normal(shape) * rng.uniform(0.1, 3.0, (shape[0], 1))).astype(np.float32)


def stored(shape: tuple[int, int], name: Format = "bfloat16", offset: int = 0) -> StoredMatrix:
    """A matrix in a format; a bfloat16 one so many elements off a cache line, between NaNs."""
    matrix = convert(random_matrix(shape), name)
    if name != "bfloat16":
        return matrix
    memory = aligned_empty((shape[0] * shape[1] + 64,)).view(np.uint16)
    memory[:] = POISON
    codes = memory[offset : offset + matrix.codes.size].reshape(shape)
    codes[:] = matrix.codes
    return StoredMatrix("bfloat16", shape, codes)


def product(matrix: StoredMatrix, x: np.ndarray, first: int = 0, last: int | None = None, routine: Any = None) -> Any:
    """Rows first to last of a matrix times x; rows of x and y are longer than what is multiplied."""
    columns, rows = matrix.shape[1], len(x)
    last = matrix.shape[0] if last is None else last
    given = np.full((rows, columns + 3), np.nan, np.float32)
    given[:, :columns] = x
    y = np.full((rows, last - first + 5), 7.0, np.float32)
    prepared = aligned_empty((tile_streams.tiled_size(columns, rows),))
    scratch = aligned_empty((tile_streams.tiled_scratch_size(columns),))
    prepared[:], scratch[:] = np.nan, np.nan
    numbers = (columns, first, last, given.ctypes.data, given.shape[1], rows, y.ctypes.data, y.shape[1])
    (_, *at) = matrix.plan
    (routine or multiply_exact).call(*at, *numbers, prepared.ctypes.data, scratch.ctypes.data)
    assert (y[:, last - first :] == 7.0).all()
    return y[:, : last - first]


def exact(matrix: StoredMatrix, x: np.ndarray) -> np.ndarray:
    found: np.ndarray = x.astype(np.float64) @ matrix.rows(np.arange(matrix.shape[0])).astype(np.float64).T
    return found


@pytest.mark.kernels
@pytest.mark.plain_python
@pytest.mark.parametrize("rows", [1, 2, 5, 6, 11, 17])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_products_are_as_exact_as_float32(shape: tuple[int, int], rows: int) -> None:
    matrix, x = stored(shape), random_matrix((rows, shape[1]), seed=1)
    assert relative_error(product(matrix, x), exact(matrix, x)) < TOLERANCE


@pytest.mark.kernels
@pytest.mark.parametrize("rows", [1, 90, pytest.param(300, marks=only_native)])
def test_so_are_those_of_more_than_is_read_at_a_time(rows: int) -> None:
    for shape in (LARGE, (BLOCK, 32 * DEEP + 32)):
        matrix, x = stored(shape), random_matrix((rows, shape[1]), seed=1)
        assert relative_error(product(matrix, x), exact(matrix, x)) < TOLERANCE


@pytest.mark.kernels
@pytest.mark.parametrize("offset", [0, 1, 8])
@pytest.mark.parametrize("shape", [(96, 64), (70, 401), pytest.param(LARGE, marks=only_native)], ids=str)
def test_a_rows_bits_do_not_depend_on_company_or_place(shape: tuple[int, int], offset: int) -> None:
    """Nor on where weights lie, and so on whether they are copied on their way."""
    matrix, x = stored(shape, offset=offset), random_matrix((33, shape[1]), seed=1)
    alone = np.concatenate([product(stored(shape), row[None]) for row in x])
    for rows in (*range(2, 25), 33) if amx.NATIVE else (2, 5, 6, 17, 33):
        np.testing.assert_array_equal(product(matrix, x[:rows]), alone[:rows])
    for first, last in ((0, 1), (5, 37), (16, 32), (shape[0] - 17, shape[0])):
        np.testing.assert_array_equal(product(matrix, x[:7], first, last), alone[:7, first:last])


@pytest.mark.kernels
@pytest.mark.plain_python
@pytest.mark.filterwarnings("ignore:invalid value")
@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("rows", [2, 20])
def test_what_is_no_number_stays_none(bad: float, rows: int) -> None:
    matrix, x = stored((9, 70)), random_matrix((rows, 70), seed=1)
    x[1, 66] = bad
    y = product(matrix, x)
    assert np.isfinite(np.delete(y, 1, axis=0)).all()
    assert not np.isfinite(y[1]).any()


@pytest.mark.kernels
@pytest.mark.plain_python
@pytest.mark.parametrize("rows", [1, 17, 49])
@pytest.mark.parametrize("shape", [(3, 2), (33, 200), (70, 401)], ids=str)
@pytest.mark.parametrize("name", FORMATS)
def test_rounded_products_round_both_operands_and_no_sum(name: Format, shape: tuple[int, int], rows: int) -> None:
    matrix, x = stored(shape, name), random_matrix((rows, shape[1]), seed=1)
    weight = widen_bfloat16(round_to_bfloat16(matrix.rows(np.arange(shape[0]))))
    x_rounded = widen_bfloat16(round_to_bfloat16(x))
    expected = x_rounded.astype(np.float64) @ weight.astype(np.float64).T
    assert relative_error(product(matrix, x, routine=multiply_pairs[matrix.plan[0]]), expected) < TOLERANCE


# ---- parts


@functools.cache
def splitting(number: int) -> Any:
    def run(into, source):  # type: ignore[no-untyped-def]
        parts.split(number, into, 0, parts.WORDS, source, 0)

    return njit(run)


def parts_of(x: np.ndarray, number: int = parts.PARTS) -> np.ndarray:
    words = np.empty(number * parts.WORDS, np.uint32)
    splitting(number)(words, x)
    return widen_bfloat16(words.view(np.uint16).reshape(number, -1))


@pytest.mark.kernels
@pytest.mark.plain_python
def test_three_parts_are_the_number_and_two_are_not() -> None:
    x = random_matrix((1, parts.NUMBERS))[0] * np.float32(2.0) ** np.arange(-16, 16, dtype=np.float32)
    np.testing.assert_array_equal(parts_of(x).astype(np.float64).sum(axis=0), x)
    two = parts_of(x)[:2].astype(np.float64).sum(axis=0)
    assert 1e-7 < relative_error(two, x) < 1e-4
    np.testing.assert_array_equal(parts_of(x, 1)[0], widen_bfloat16(round_to_bfloat16(x)))


@pytest.mark.kernels
@pytest.mark.parametrize("lost", ["low", "middle"])
def test_a_lost_part_is_noticed(lost: str) -> None:
    """What x without its last parts makes is outside of the tolerance: the tests above would fail."""
    matrix, x = stored((33, 200)), random_matrix((3, 200), seed=1)
    kept = {"low": 2, "middle": 1}[lost]
    line = np.zeros((3, 224), np.float32)
    line[:, :200] = x
    shorter = [[parts_of(run)[:kept].sum(axis=0) for run in row.reshape(-1, parts.NUMBERS)] for row in line]
    wrong = product(matrix, np.asarray(shorter, np.float32).reshape(3, 224)[:, :200])
    assert relative_error(wrong, exact(matrix, x)) > TOLERANCE


def test_formats_are_numbered_as_routines_are() -> None:
    assert convert(random_matrix((1, 1)), "bfloat16").plan[0] == BFLOAT16
