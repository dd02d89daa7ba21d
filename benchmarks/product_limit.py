"""What this machine can multiply: the best rate of big float32 matrix products that fit in its cache.

    python benchmarks/product_limit.py --candidate panels --threads 2        then one line on standard input per round

Each way of multiplying is a side of its own; the limit is the best of all of them at the same moment.
"""

import argparse
import pathlib
import sys
import time
from collections.abc import Callable

import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))
from benchmarks.side_by_side import Answer, serve
from looplm.arrays import Floats
from looplm.kernels.product import Matrix, Products
from looplm.kernels.product.blas import limit_blas_threads
from looplm.threads import run_all

SIZES = (256, 384, 512, 768, 1024)  # rows and columns; the last takes 12 MiB with its result
SMALL = (32, 48)
BURSTS = 4  # of each size, the best counts: what slows one down is no property of the machine
BURST_SECONDS = 0.05

TOGETHER = "blas-together"


def candidates() -> list[str]:
    """Ways to multiply in float32: one product that BLAS shares out, or a product per thread on each path there is."""
    from looplm.kernels.product.select import PATHS

    return [TOGETHER, *(path.name for path in PATHS.values() if path.precision == "fp32" and not path.missing())]


def work_of(name: str, a: Floats, b: Floats, threads: int) -> tuple[Callable[[], object], int]:
    """A function that multiplies a by b (the transpose of b on a path, packed beforehand), and how often it does so."""
    if name == TOGETHER:
        limit_blas_threads(threads)
        out = np.empty_like(a)
        return lambda: np.matmul(a, b, out=out), 1
    from looplm.kernels.product.select import PATHS

    path = PATHS[name]

    def operands() -> tuple[Products, tuple[Floats, Floats, Matrix]]:
        return path.products([b.shape]), (np.empty_like(a), a.copy(), path.pack(b.copy(), path.room(b.shape)))

    mine = [operands() for _ in range(threads)]
    return lambda: run_all(lambda each: each[0].forward_into(*each[1]), mine), threads


def best_rate(name: str, size: int, threads: int) -> float:
    """GFLOP/s of the fastest of a few bursts of products, each size x size."""
    rng = np.random.default_rng(size)
    a, b = rng.standard_normal((2, size, size), np.float32)
    multiply, products = work_of(name, a, b, threads)
    multiply()  # what it loads or compiles is not counted
    began = time.perf_counter()
    multiply()
    calls = max(1, int(BURST_SECONDS / (time.perf_counter() - began)))
    seconds = []
    for _ in range(BURSTS):
        began = time.perf_counter()
        for _ in range(calls):
            multiply()
        seconds.append(time.perf_counter() - began)
    return calls * products * 2.0 * size**3 / min(seconds) / 1e9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--candidate", default=TOGETHER, help="default: %(default)s")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--small", action="store_true", help="sizes that prove nothing")
    args = parser.parse_args()
    sizes = SMALL if args.small else SIZES

    def answer() -> Answer:
        rates = {size: best_rate(args.candidate, size, args.threads) for size in sizes}
        size = max(rates, key=rates.__getitem__)
        return {"gflops": rates[size], "size": size}

    serve(lambda: ({}, answer))


if __name__ == "__main__":
    main()
