"""Which path multiplies: what the processor can do, what was fastest here, what was asked for.

Usable follows from the processor's features and the system's permission; used is what proves itself here (proof.py) and
is fastest by a measurement, once per machine: the same instruction is twice as fast as float32 on one processor and
slower than it on another.
"""

import dataclasses
import json
import pathlib
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ...arrays import Floats, aligned_empty
from ..jit import TILE_FEATURES, cache_folder, features, processor, tiles_refused
from . import Use
from .blas import BlasProducts, limit_blas_threads
from .pairs import PairProducts, packed_pairs
from .panels import Packed, PanelProducts
from .proof import fault_here
from .tiles import TileProducts, packed_tiles

ROWS, SHAPE = 512, (768, 256)  # measured: the three products of a weight N x K as a small model has it
ROUNDS = 12
TIE = 1.1  # identical measurements differ by so much on a machine that others use too
BF16_ADVANTAGE = 1.2  # bfloat16 must be so much faster before `auto` gives up float32


@dataclasses.dataclass(frozen=True)
class Path:
    """One way to multiply: how a weight is packed, and who multiplies with it."""

    name: str
    precision: str  # what the operands are rounded to: fp32 or bf16
    summary: str
    # Shape N x K -> what a weight is packed into; None: products read it as it is.  A second argument, false, makes it
    # of half the size, to be packed for one use at a time.
    room: Callable[..., Any]
    products: Callable[[Sequence[tuple[int, int]]], Any]  # shapes of the weights -> one thread's Products
    needs: frozenset[str] = frozenset()  # features without which it is not worth choosing

    def pack(self, weight: Floats, room: Any, use: Use = "both") -> Any:
        """The weight, N x K, as the products want it, packed into `room` unless they read it as it is.

        What the room held before is lost.
        """
        return weight if room is None else room.fill(weight, use)

    def missing(self) -> list[str]:
        """Features that are not here: without them a path runs on other instructions, and is right but slow."""
        return sorted(self.needs - features())

    def obstacle(self) -> str:
        """Why it is not worth choosing here; empty if it is."""
        missing = self.missing()
        if not missing:
            return ""
        refused = tiles_refused() if TILE_FEATURES.intersection(missing) else ""
        return refused or f"the processor lacks {', '.join(missing)}"


PATHS = {
    path.name: path
    for path in (
        Path("panels", "fp32", "register tiles", Packed.empty, PanelProducts),
        Path("blas", "fp32", "NumPy's BLAS", lambda shape, apart=True: None, BlasProducts),
        Path(
            "pairs",
            "bf16",
            "register tiles, dot products of bfloat16 pairs",
            packed_pairs,
            PairProducts,
            frozenset({"avx512bf16"}),
        ),
        Path("tiles", "bf16", "tile registers (AMX)", packed_tiles, TileProducts, TILE_FEATURES),
    )
}


def choose(precision: str = "auto", name: str = "") -> Path:
    """The path to use: the one named, or the fastest of the precision asked for.

    `auto` is float32, unless bfloat16 is faster here by BF16_ADVANTAGE.

    Raises: LookupError if there is no path of that name, it has another precision, or multiplies wrong here.
    """
    if name:
        if name not in PATHS:
            raise LookupError(f"there is no kernel path {name!r}, only {', '.join(PATHS)}")
        if precision not in ("auto", PATHS[name].precision):
            raise LookupError(f"kernel path {name} is {PATHS[name].precision}, not {precision}")
        if fault := measured().faults.get(name):
            raise LookupError(f"kernel path {name} is not right on this machine: {fault}")
        return PATHS[name]
    found = measured()
    best = {kind: path for kind in ("fp32", "bf16") if (path := _fastest(kind, found))}
    if precision == "auto":
        rate = {kind: found.rates.get(path.name, 0.0) for kind, path in best.items()}
        gains = rate.get("bf16", 0.0) >= BF16_ADVANTAGE * rate.get("fp32", 0.0) > 0.0
        precision = "bf16" if gains else "fp32"
    if precision not in best:
        raise LookupError(f"no {precision} kernel path is right on this machine: {found.faults}")
    return best[precision]


@dataclasses.dataclass(frozen=True)
class Measured:
    """Of every path worth choosing here: GFLOP/s of one thread by its name, or what is wrong with it."""

    rates: dict[str, float]
    faults: dict[str, str]


def _fastest(precision: str, found: Measured) -> Path | None:
    """The first nearly as fast as the fastest, so that a tie always falls the same way; None if all are wrong."""
    paths = [path for path in PATHS.values() if path.precision == precision and path.name not in found.faults]
    best = max((found.rates.get(path.name, 0.0) for path in paths), default=0.0)
    return next((path for path in paths if found.rates.get(path.name, 0.0) >= best / TIE), None)


def measured() -> Measured:
    """Proved and measured once, and kept beside the kernels."""
    folder = cache_folder()
    file = pathlib.Path(folder) / "rates.json" if folder else None
    found = _read(file)
    key = f"{processor()['name']} {' '.join(sorted(features()))}"
    known = found.get(key)
    if not isinstance(known, dict) or known.keys() != {"rates", "faults"}:
        paths = [path for path in PATHS.values() if not path.missing()]
        faults = {path.name: fault for path in paths if (fault := fault_here(path))}
        rates = _measure([path for path in paths if path.name not in faults])
        known = found[key] = {"rates": rates, "faults": faults}
        _write(file, found)
    return Measured(**known)


def _measure(paths: list[Path]) -> dict[str, float]:
    """In turn, and the best of all rounds: other work on the machine only ever makes a round slower.

    The clock is the thread's own, which stands still while others have the processor.
    """
    (n, k), rng = SHAPE, np.random.default_rng(0)
    x, dy, weight, dweight = (rng.standard_normal(size, np.float32) for size in ((ROWS, k), (ROWS, n), (n, k), (n, k)))
    y, dx = aligned_empty((ROWS, n)), aligned_empty((ROWS, k))
    limit_blas_threads()
    ready = {path.name: (path.products([SHAPE]), path.pack(weight, path.room(SHAPE))) for path in paths}
    best = dict.fromkeys(ready, float("inf"))
    for _ in range(1 + ROUNDS):  # the first compiles
        for name, (products, packed) in ready.items():
            began = time.thread_time()
            products.forward_into(y, x, packed)
            products.dx_into(dx, dy, packed)
            products.dweight_into(dweight, dy, x, True)
            best[name] = min(best[name], time.thread_time() - began)
    return {name: round(3 * 2e-9 * ROWS * n * k / seconds, 1) for name, seconds in best.items()}


def _read(file: pathlib.Path | None) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text(encoding="utf-8")) if file else {}
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _write(file: pathlib.Path | None, rates: dict[str, Any]) -> None:
    if file is None:
        return
    unfinished = file.with_suffix(f".{time.monotonic_ns()}")
    try:
        unfinished.write_text(json.dumps(rates), encoding="utf-8")
        unfinished.replace(file)
    except OSError:  # a full or read-only disk: measured again next time
        unfinished.unlink(missing_ok=True)
