"""Linear layers without bias: forward and backward, on any of the product paths."""

from collections.abc import Callable

import numpy as np

from ..arrays import Floats
from .product.select import PATHS, Path

Forward = Callable[[Floats, Floats], tuple[Floats]]
Backward = Callable[[Floats, Floats, Floats], tuple[Floats, Floats]]


def _rows(x: Floats) -> Floats:
    return np.ascontiguousarray(x).reshape(-1, x.shape[-1])


def linear_on(path: Path) -> tuple[Forward, Backward]:
    """`linear_forward` and `linear_backward` with the products of this path."""

    def linear_forward(x: Floats, weight: Floats) -> tuple[Floats]:
        y = np.empty((*x.shape[:-1], weight.shape[0]), x.dtype)
        packed = path.pack(weight, path.room(weight.shape))
        path.products([weight.shape]).forward_into(_rows(y), _rows(x), packed)
        return (y,)

    def linear_backward(dy: Floats, x: Floats, weight: Floats) -> tuple[Floats, Floats]:
        dx, dweight = np.empty_like(x), np.empty_like(weight)
        products, packed = path.products([weight.shape]), path.pack(weight, path.room(weight.shape))
        products.dx_into(_rows(dx), _rows(dy), packed)
        products.dweight_into(dweight, _rows(dy), _rows(x), False)
        return dx, dweight

    return linear_forward, linear_backward


linear_forward, linear_backward = linear_on(PATHS["panels"])
