"""Products by NumPy's BLAS: nothing is packed; the path of decoding, and the yardstick of the others."""

import ctypes
import functools
import pathlib
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from ...arrays import Floats, aligned_empty
from ..attention import Attention


class BlasProducts:
    """One thread's products; `shapes` of the weights (N, K) that gradients are wanted of."""

    attention = Attention
    operand = np.float32

    def __init__(self, shapes: Sequence[tuple[int, int]] = ()) -> None:
        self._outer = aligned_empty((max((n * k for n, k in shapes), default=0),))

    def forward_into(self, y: Floats, x: Floats, weight: Floats) -> None:
        """y: MN from x: MK."""
        np.matmul(x, weight.T, out=y)

    def dx_into(self, dx: Floats, dy: Floats, weight: Floats) -> None:
        """dx: MK from dy: MN."""
        np.matmul(dy, weight, out=dx)

    def dweight_into(self, dweight: Floats, dy: Floats, x: Floats, add: bool) -> None:
        """dweight: NK from dy: MN and x: MK."""
        product = self._outer[: dweight.size].reshape(dweight.shape) if add else dweight
        np.matmul(dy.T, x, out=product)
        if add:
            np.add(dweight, product, out=dweight)


def _blas_libraries() -> Iterator[pathlib.Path]:
    package = pathlib.Path(np.__file__).parent
    for folder in (package.parent / "numpy.libs", package / ".dylibs"):
        yield from sorted(folder.glob("*openblas*"))


@functools.cache
def _blas_setter() -> Callable[[int], object] | None:
    for path in _blas_libraries():
        library = ctypes.CDLL(str(path))
        for name in ("scipy_openblas_set_num_threads64_", "scipy_openblas_set_num_threads"):
            if hasattr(library, name):
                return getattr(library, name)
    return None


def limit_blas_threads(threads: int = 1) -> bool:
    """Hold NumPy's bundled OpenBLAS to so many threads; False if it is another BLAS."""
    setter = _blas_setter()
    if setter is not None:
        setter(threads)
    return setter is not None
