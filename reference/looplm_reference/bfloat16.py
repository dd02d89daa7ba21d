"""Products whose operands are rounded to bfloat16, the LoopLM made of them, and wrong versions of both.

Training in bf16 precision keeps weights, states, norms, softmax and losses as they are; only what enters a matrix
product, forward or backward, with a weight or in attention, is rounded to 8 significant bits first.  The gate and the
exit distribution are no such products.  A long prompt in bf16 rounds what enters products with weights of the stack,
and attends exactly.  Sums are exact here, float32 in an engine.
"""

import dataclasses
import types
from collections.abc import Callable
from typing import Any

import numpy as np

from . import ops
from .contract import DIMS, Row, check, first_failure
from .judge import ReferenceCandidate, compare_gradients
from .model import LoopLM
from .ops import Array

TOLERANCE = 1.6e-2  # whole model: float32 upstream rounds operands the other way, up to 1.2e-2; mutants are 2.6e-2 off
ATTENTION_TOLERANCE = 2e-4  # alone: float32 rounds up to 1e-4 of it the other way, mutants are 8e-4 away and more
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


Rounding = Callable[[Array], Array]


def _linear(operand: Rounding, upstream: Rounding) -> dict[str, Callable[..., Any]]:
    """ops' linear layer; `upstream` is what becomes of the gradient that comes in, `operand` of all else."""

    def linear_forward(x: Array, weight: Array) -> tuple[Array]:
        return ops.linear_forward(operand(x), operand(weight))

    def linear_backward(dy: Array, x: Array, weight: Array) -> tuple[Array, Array]:
        return ops.linear_backward(upstream(dy), operand(x), operand(weight))

    return {"linear_forward": linear_forward, "linear_backward": linear_backward}


def _attention(
    operand: Rounding, upstream: Rounding, prob: Rounding, dscore: Rounding
) -> dict[str, Callable[..., Any]]:
    """ops' attention with what each of its seven products multiplies rounded, and nothing else.

    Forward, what is rounded of the probabilities is exp(score - highest); the sum that divides afterwards is exact.
    Backward, it is the probabilities.  The sum dy . y, which is no matrix product, takes dy as it is.
    """

    def attention_forward(q: Array, k: Array, v: Array, start: Array) -> tuple[Array, Array]:
        key, value = (ops._per_query_head(operand(x), q.shape[2]) for x in (k, v))
        weight, total, lse = ops._softmax_parts(ops._scores(operand(q), key, start))
        return np.einsum("bshp,bphk->bshk", prob(weight), value) / total, lse

    def attention_backward(
        dy: Array, q: Array, k: Array, v: Array, start: Array, y: Array, lse: Array
    ) -> tuple[Array, Array, Array]:
        query, incoming = operand(q), upstream(dy)
        key, value = (ops._per_query_head(operand(x), q.shape[2]) for x in (k, v))
        weight = np.exp(ops._scores(query, key, start) - lse[..., None])
        dweight = np.einsum("bshk,bphk->bshp", incoming, value) - (dy * y).sum(-1, keepdims=True)
        dscores = dscore(weight * dweight * q.shape[3] ** -0.5)
        grouped = (*k.shape[:3], q.shape[2] // k.shape[2], k.shape[3])
        dk = np.einsum("bshp,bshk->bphk", dscores, query).reshape(grouped).sum(3)
        dv = np.einsum("bshp,bshk->bphk", prob(weight), incoming).reshape(grouped).sum(3)
        return np.einsum("bshp,bphk->bshk", dscores, key), dk, dv

    return {"attention_forward": attention_forward, "attention_backward": attention_backward}


def _products(
    operand: Rounding = rounded,
    upstream: Rounding = rounded,
    prob: Rounding = rounded,
    dscore: Rounding = rounded,
) -> types.SimpleNamespace:
    return types.SimpleNamespace(**_linear(operand, upstream), **_attention(operand, upstream, prob, dscore))


products = _products()


@dataclasses.dataclass(frozen=True)
class Mutant:
    """A wrong version of the products: which operations show the mistake, and whether the whole model does, too."""

    products: types.SimpleNamespace
    shown_by: tuple[str, ...] = ("attention",)
    in_model: bool = True


BOTH = ("linear", "attention")
MUTANTS = {
    "operands cut off instead of rounded": Mutant(_products(_cut_off, _cut_off, _cut_off, _cut_off), BOTH),
    "operands not rounded": Mutant(_products(*[_as_it_is] * 4), BOTH),
    "incoming gradients not rounded": Mutant(_products(upstream=_as_it_is), BOTH, in_model=False),
    "probabilities cut off instead of rounded": Mutant(_products(prob=_cut_off)),
    "probabilities not rounded": Mutant(_products(prob=_as_it_is)),
    "gradients of scores cut off instead of rounded": Mutant(_products(dscore=_cut_off), in_model=False),
    "gradients of scores not rounded": Mutant(_products(dscore=_as_it_is), in_model=False),
}


def prompt_model_of(products: types.SimpleNamespace) -> type[LoopLM]:
    """The LoopLM with these products with weights in the place of exact ones, and exact attention."""

    class Rounding(LoopLM):
        def linear(self, x: Array, weight: Array) -> Array:
            y: Array = products.linear_forward(x, weight)[0]
            return y

        def linear_backward(self, dy: Array, x: Array, weight: Array) -> tuple[Array, Array]:
            dx, dweight = products.linear_backward(dy, x, weight)
            return dx, dweight

    return Rounding


def model_of(products: types.SimpleNamespace) -> type[LoopLM]:
    """The same with these products in attention, too."""

    class Rounding(prompt_model_of(products)):  # type: ignore[misc]  # a class that is made
        def attend(self, q: Array, k: Array, v: Array, start: Array) -> tuple[Array, Array]:
            y, lse = products.attention_forward(q, k, v, start)
            return y, lse

        def attend_backward(
            self, dy: Array, q: Array, k: Array, v: Array, start: Array, y: Array, lse: Array
        ) -> tuple[Array, Array, Array]:
            dq, dk, dv = products.attention_backward(dy, q, k, v, start, y, lse)
            return dq, dk, dv

    return Rounding


Bfloat16LoopLM = model_of(products)
Bfloat16PromptLM = prompt_model_of(products)


def first_failures(mutant: Mutant) -> list[Row | None]:
    """The first rows that catch wrong products: of the operations, and if `in_model` of the whole model's gradients."""
    found = []
    for name in mutant.shown_by:
        allowed = ATTENTION_TOLERANCE if name == "attention" else None
        rows = check(mutant.products, name, DIMS[0], dtype=np.float64, tolerance=allowed, truth=products)
        found.append(first_failure(rows))
    if mutant.in_model:
        wrong = ReferenceCandidate(model_of(mutant.products))
        found.append(first_failure(compare_gradients(wrong, TOLERANCE, Bfloat16LoopLM)))
    return found
