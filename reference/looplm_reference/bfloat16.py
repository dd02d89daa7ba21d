"""Products whose operands are rounded to bfloat16, the LoopLM made of them, and wrong versions of both.

Training in bf16 precision keeps weights, states, norms, softmax and losses as they are; only what enters a product
with a weight, forward or backward, is rounded to 8 significant bits first.  Sums are exact here, float32 in an engine.
"""

import types
from collections.abc import Callable

import numpy as np

from . import ops
from .contract import DIMS, Row, check, first_failure
from .judge import ReferenceCandidate, compare_gradients
from .model import LoopLM
from .ops import Array

TOLERANCE = 1.2e-2  # whole model: float32 upstream now and then rounds an operand the other way
PROMPT_TOLERANCE = 4e-3  # states after one loop: a model that does not round is 6e-3 away, one that cuts off 1e-2


def rounded(x: Array) -> Array:
    """The nearest number of 8 significant bits, ties to even, in the exponent range of float32."""
    mantissa, exponent = np.frexp(x)
    return np.ldexp(np.rint(mantissa * 256.0) / 256.0, exponent)


def _cut_off(x: Array) -> Array:
    mantissa, exponent = np.frexp(x)
    return np.ldexp(np.trunc(mantissa * 256.0) / 256.0, exponent)


def _as_it_is(x: Array) -> Array:
    return x


def _linear(operand: Callable[[Array], Array], upstream: Callable[[Array], Array]) -> types.SimpleNamespace:
    def linear_forward(x: Array, weight: Array) -> tuple[Array]:
        return ops.linear_forward(operand(x), operand(weight))

    def linear_backward(dy: Array, x: Array, weight: Array) -> tuple[Array, Array]:
        return ops.linear_backward(upstream(dy), operand(x), operand(weight))

    return types.SimpleNamespace(linear_forward=linear_forward, linear_backward=linear_backward)


linear = _linear(rounded, rounded)

# Wrong versions of it, and whether the whole model shows the mistake or only the operation by itself.
MUTANTS = {
    "operands cut off instead of rounded": (_linear(_cut_off, _cut_off), True),
    "operands not rounded": (_linear(_as_it_is, _as_it_is), True),
    "incoming gradients not rounded": (_linear(rounded, _as_it_is), False),
}


def model_of(products: types.SimpleNamespace) -> type[LoopLM]:
    """The LoopLM with these products in the place of exact ones."""

    class Rounding(LoopLM):
        def linear(self, x: Array, weight: Array) -> Array:
            y: Array = products.linear_forward(x, weight)[0]
            return y

        def linear_backward(self, dy: Array, x: Array, weight: Array) -> tuple[Array, Array]:
            dx, dweight = products.linear_backward(dy, x, weight)
            return dx, dweight

    return Rounding


Bfloat16LoopLM = model_of(linear)


def first_failures(products: types.SimpleNamespace, in_model: bool) -> list[Row | None]:
    """The first rows that catch wrong products: of the operation, and if `in_model` of the whole model's gradients."""
    found = [first_failure(check(products, "linear", DIMS[0], dtype=np.float64, truth=linear))]
    if in_model:
        wrong = ReferenceCandidate(model_of(products))
        found.append(first_failure(compare_gradients(wrong, TOLERANCE, Bfloat16LoopLM)))
    return found
