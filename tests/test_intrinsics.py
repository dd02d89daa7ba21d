"""Building blocks of kernels: what loops over them give, and how wide they are compiled."""

import numpy as np
import pytest

from looplm.kernels.intrinsics import larger32
from looplm.kernels.jit import features, njit


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


@pytest.mark.skipif("avx512vnni" not in features(), reason="vectors of 64 bytes are wanted where they are fast")
def test_loops_are_compiled_for_whole_registers() -> None:
    """LLVM would take half of them on processors of Intel."""
    highest(np.ones(8, np.float32))
    (assembly,) = highest.inspect_asm().values()
    assert "zmm" in assembly
