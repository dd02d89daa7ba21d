"""Linear layers without bias: BLAS does the matrix products."""

import numpy as np

from ..arrays import Floats


def linear_forward(x: Floats, weight: Floats) -> tuple[Floats]:
    return (np.matmul(x, weight.T),)


def linear_backward(dy: Floats, x: Floats, weight: Floats) -> tuple[Floats, Floats]:
    rows = dy.reshape(-1, dy.shape[-1])
    return np.matmul(dy, weight), np.matmul(rows.T, x.reshape(-1, x.shape[-1]))


def accumulate_outer(dweight: Floats, dy: Floats, x: Floats, scratch: Floats) -> None:
    """dweight += dy.T @ x over rows; `scratch` is any float32 buffer of at least dweight.size elements."""
    product = scratch[: dweight.size].reshape(dweight.shape)
    np.matmul(dy.T, x, out=product)
    np.add(dweight, product, out=dweight)
