"""Building blocks of kernels: what loops over them give, and how wide they are compiled."""

import numpy as np
import pytest

from looplm.kernels.intrinsics import larger32, put
from looplm.kernels.jit import features, njit
from looplm.kernels.vectors import bfloat_bits


@njit
def highest(numbers):  # type: ignore[no-untyped-def]
    found = numbers[0]
    for i in range(numbers.size):
        found = larger32(found, numbers[i])
    return found


@pytest.mark.kernels
@pytest.mark.plain_python
@pytest.mark.parametrize("size", [1, 7, 64, 1000])
def test_the_largest_of_numbers_and_a_nan_wherever_it_is(size: int) -> None:
    numbers = np.random.default_rng(size).standard_normal(size).astype(np.float32)
    assert highest(numbers) == numbers.max()
    for at in {0, size // 2, size - 1}:  # Python's max would lose most of them
        numbers_and_none = numbers.copy()
        numbers_and_none[at] = np.nan
        assert np.isnan(highest(numbers_and_none))
    numbers[-1] = np.inf
    assert highest(numbers) == np.inf


@njit
def put_all(into, numbers):  # type: ignore[no-untyped-def]
    for i in range(numbers.size):
        put(into, i, numbers[i])


@pytest.mark.kernels
@pytest.mark.plain_python
def test_a_number_is_put_as_the_array_keeps_it() -> None:
    """In bfloat16 ties go to the even one, what is too large becomes infinite, and no number stays none."""
    special = np.array([0x3F808000, 0x3F818000, 0x7F7FFFFF, 1, 0x7F800001, 0xFFC00000], np.uint32).view(np.float32)
    numbers = np.concatenate([special, np.random.default_rng(0).standard_normal(61, np.float32)])
    floats, bits = np.empty_like(numbers), np.empty(numbers.size, np.uint16)
    put_all(floats, numbers)
    put_all(bits, numbers)
    np.testing.assert_array_equal(floats, numbers)
    assert bits[:4].tolist() == [0x3F80, 0x3F82, 0x7F80, 0]
    assert np.isnan((bits[4:6].astype(np.uint32) << np.uint32(16)).view(np.float32)).all()
    np.testing.assert_array_equal(bits, bfloat_bits(numbers))
    turned = np.empty((2, numbers.size), np.uint16).T[:, 1]  # of a column, too
    put_all(turned, numbers)
    np.testing.assert_array_equal(turned, bits)


@pytest.mark.skipif("avx512vnni" not in features(), reason="vectors of 64 bytes are wanted where they are fast")
def test_loops_are_compiled_for_whole_registers() -> None:
    """LLVM would take half of them on processors of Intel."""
    highest(np.ones(8, np.float32))
    (assembly,) = highest.inspect_asm().values()
    assert "zmm" in assembly
