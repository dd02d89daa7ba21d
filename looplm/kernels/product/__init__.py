"""Matrix products: one face, several paths; which of them runs is nobody's business outside this folder.

A path turns a weight into what its products want to read (a `Matrix`), once per optimizer step, and gives every thread
a `Products` of its own: see select.py for the paths there are.
"""

from collections.abc import Callable
from typing import Any, Literal, Protocol

import numpy as np

from ...arrays import Array, Floats
from ..attention import Attends
from .blas import BlasProducts

__all__ = ["BlasProducts", "Matrix", "Products", "Use"]

Matrix = Any  # a weight as one path's products read it; only `Path.pack` makes it
Use = Literal["both", "forward", "backward"]  # which products a weight is packed for: forward_into, dx_into


class Products(Protocol):
    """One thread's matrix products with weights N x K and rows M."""

    @property
    def attention(self) -> Callable[[int, int, bool], Attends]:
        """Who attends in the same precision: made for so many keys and channels, and for its gradient, too, or not."""

    @property
    def operand(self) -> type[np.generic]:
        """What x and dy are best given as: float32, or uint16, the bits of bfloat16 numbers, where they are rounded.

        Such products take float32, too.
        """

    def forward_into(self, y: Floats, x: Array, weight: Matrix) -> None:
        """y = x times the weight's transpose.  x: MK -> y: MN"""

    def dx_into(self, dx: Floats, dy: Array, weight: Matrix) -> None:
        """dx = dy times the weight.  dy: MN -> dx: MK"""

    def dweight_into(self, dweight: Floats, dy: Array, x: Array, add: bool) -> None:
        """dweight = dy's transpose times x, added to what is there if `add`.  dy: MN, x: MK, dweight: NK"""
