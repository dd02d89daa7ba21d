"""Whether a path multiplies right on this very machine: asked before it may be chosen.

A path of special instructions is tried in a process of its own first: what the processor or the compiler refuses ends
that one alone.
"""

import os
import pathlib
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np

from ...arrays import Array, Floats
from ..vectors import bfloat_bits

ROWS, SHAPE = 71, (67, 1101)  # no multiple of any tile or word, sums longer than any run
TOLERANCE = 1e-5  # sums in float32 are off by 1e-6, a rounding to bfloat16 too many or too few makes it 1e-3
SECONDS = 300.0  # for a trial, kernels compiled on the way; more means that it hangs
TRIAL = """\
import sys
from looplm.kernels.product.proof import fault
from looplm.kernels.product.select import PATHS
sys.exit(10 if fault(PATHS[sys.argv[1]]) else 0)
"""


class Multiplies(Protocol):
    """What is asked of a path."""

    @property
    def name(self) -> str: ...
    @property
    def precision(self) -> str: ...
    @property
    def needs(self) -> frozenset[str]: ...
    @property
    def room(self) -> Callable[[tuple[int, int]], Any]: ...
    @property
    def products(self) -> Callable[[Sequence[tuple[int, int]]], Any]: ...
    def pack(self, weight: Floats, room: Any) -> Any: ...


def fault(path: Multiplies) -> str:
    """What is wrong with a path's three products, beside NumPy's of the same operands; empty if nothing is."""
    (n, k), rng = SHAPE, np.random.default_rng(0)
    x, dy, weight = (rng.standard_normal(shape, np.float32) for shape in ((ROWS, k), (ROWS, n), SHAPE))
    y, dx, dweight = (np.full_like(array, np.nan) for array in (dy, x, weight))
    products, packed = path.products([SHAPE]), path.pack(weight, path.room(SHAPE))
    products.forward_into(y, x, packed)
    products.dx_into(dx, dy, packed)
    for add in (False, True):
        products.dweight_into(dweight, dy, x, add)
    right, left, matrix = (_operand(array, path.precision) for array in (x, dy, weight))
    compared = {
        "forward_into": (right @ matrix.T, y),
        "dx_into": (left @ matrix, dx),
        "dweight_into": (2.0 * left.T @ right, dweight),
    }
    for name, (expected, found) in compared.items():
        error = float(np.sqrt(np.mean((found - expected) ** 2) / np.mean(expected**2)))
        if not error <= TOLERANCE:  # nor is NaN
            return f"{name} is off by {error:.2g}, {TOLERANCE:g} allowed"
    return ""


def _operand(array: Floats, precision: str) -> Array:
    """What is multiplied: float64 of the array, rounded before if the path rounds."""
    if precision == "bf16":
        array = (bfloat_bits(array) << np.uint32(16)).view(np.float32)
    return array.astype(np.float64)


def fault_here(path: Multiplies) -> str:
    """`fault`, without risk to this process."""
    if path.needs and (ended := outcome([sys.executable, "-c", TRIAL, path.name])):
        return ended
    return fault(path)


def outcome(command: list[str], seconds: float = SECONDS) -> str:
    """How a trial ended, if it did not come to a verdict: a signal, an error, no end in time; otherwise empty."""
    package = pathlib.Path(__file__).parents[3]
    found = [str(package), *filter(None, [os.environ.get("PYTHONPATH")])]
    try:
        done = subprocess.run(
            command,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(found)},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            timeout=seconds,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"a trial of it came to no end: {error}"
    if done.returncode in (0, 10):
        return ""
    if done.returncode < 0:
        return f"a trial of it was ended by {signal.Signals(-done.returncode).name}"
    return f"a trial of it failed with exit code {done.returncode}"
