"""Our side of the training benchmarks: `Trainer.step` on random tokens, after the kernels have proved themselves.

    python benchmarks/our_side.py --config small        then one line on standard input per round

Same shapes, initial values, batches' law and optimizer as the PyTorch peer: published initial values, no clipping, a
constant learning rate.
"""

import argparse
import multiprocessing
import pathlib
import sys
import time
from collections.abc import Callable, Iterator

import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))
from benchmarks.side_by_side import CONFIGS, LOOPS, Answer, BenchmarkError, forget_peak, peak_mib, serve
from looplm.arrays import Ints
from looplm.config import ModelConfig
from looplm.data import Batch
from looplm.errors import LoopLMError
from looplm.kernels.attention import Attends
from looplm.kernels.jit import cache_folder
from looplm.kernels.product.select import Path
from looplm.settings import PUBLISHED_INIT, InitConfig, TrainConfig
from looplm.threads import run_all, shards
from looplm.training import Trainer, product_path
from looplm.weights import Weights, initialise, matrix_shapes
from looplm_reference import contract

# Of a product, rms of the difference over rms of what is expected: rounding of sums, or of operands to 8 bits.
TOLERANCE = {"fp32": 2e-6, "bf16": 5e-3}
ROWS = 67  # no multiple of any tile
WARM_UP_STEPS = 3  # the first may compile
BATCHES = 8


def model_config(sizes: dict[str, int]) -> ModelConfig:
    heads = sizes["heads"]
    return ModelConfig(
        hidden_size=sizes["d"],
        num_hidden_layers=sizes["L"],
        num_attention_heads=heads,
        num_key_value_heads=heads,
        head_dim=sizes["d"] // heads,
        intermediate_size=sizes["ff"],
        vocab_size=sizes["vocab"],
        total_ut_steps=LOOPS,
        max_position_embeddings=max(1024, sizes["S"]),
    )


def initial_weights(sizes: dict[str, int]) -> Weights:
    return initialise(model_config(sizes), InitConfig(scheme="ouro", **PUBLISHED_INIT), seed=0)


class RandomBatches:
    """A few batches of random tokens, over and over.  ids: number of batches x B x (S + 1)."""

    bytes_per_token = None

    def __init__(self, ids: Ints) -> None:
        self.ids = ids

    @classmethod
    def drawn(cls, sizes: dict[str, int]) -> "RandomBatches":
        shape = (BATCHES, sizes["B"], sizes["S"] + 1)
        return cls(np.random.default_rng(1).integers(0, sizes["vocab"], shape))

    def batch(self, step: int) -> Batch:
        ids = self.ids[step % len(self.ids)]
        return Batch(np.ascontiguousarray(ids[:, :-1]), np.ascontiguousarray(ids[:, 1:]))

    def validation(self, max_batches: int | None = None) -> Iterator[Batch]:
        return iter(())


def train_config(threads: int, precision: str, selected: str) -> TrainConfig:
    """The peer's optimizer; `precision` and `selected` kernels as in TrainConfig."""
    return TrainConfig(
        threads=threads,
        steps=10**6,
        learning_rate=3e-4,
        warmup_steps=1,
        min_lr_ratio=1.0,  # with the above: constant
        entropy_weight=0.1,
        clip=0.0,
        precision=precision,
        kernels=selected,
    )


def require_contract(threads: int) -> None:
    """What `looplm verify` checks of kernels and engine.  Raises: BenchmarkError if any fails."""
    from looplm_cli import verification

    for section in verification.sections(threads):
        if section.mutants:
            continue
        for check in section.checks:
            if not check.ok:
                row = check.failures[0]
                note = f" ({row.note})" if row.note else ""
                raise BenchmarkError(
                    f"nothing is timed: {row.name} is off by {row.error:.3g}, {row.tolerance:.3g} allowed{note}",
                    "looplm verify --all shows every comparison",
                )


def require_products(path: Path, config: ModelConfig) -> None:
    """The three products of every matrix of this model, against float64.  Raises: BenchmarkError if one is wrong."""
    shapes = matrix_shapes(config)
    products, rng = path.products(shapes), np.random.default_rng(3)
    for n, k in shapes:
        x, dy, weight = (rng.standard_normal(shape, np.float32) for shape in ((ROWS, k), (ROWS, n), (n, k)))
        y, dx, dweight = (np.full_like(array, np.nan) for array in (dy, x, weight))
        packed = path.pack(weight, path.room(weight.shape))
        products.forward_into(y, x, packed)
        products.dx_into(dx, dy, packed)
        for add in (False, True):
            products.dweight_into(dweight, dy, x, add)
        left, right, matrix = (array.astype(np.float64) for array in (dy, x, weight))
        compared = {
            "forward_into": (right @ matrix.T, y),
            "dx_into": (left @ matrix, dx),
            "dweight_into": (2.0 * left.T @ right, dweight),
        }
        for name, (expected, found) in compared.items():
            error, allowed = contract.relative_error(expected, found), TOLERANCE[path.precision]
            if error > allowed:
                raise BenchmarkError(
                    f"nothing is timed: {name} of {path.name} is off by {error:.3g} with a weight of {n} x {k}, "
                    f"{allowed:.3g} allowed",
                    "--kernels takes another path",
                )


def require_all(threads: int, path: Path, config: ModelConfig) -> None:
    """Both of the above in a copy of this process, so that the memory they take is not counted as training's.

    The copy has this program's functions as they are, and loads the same files of compiled kernels: those, unchanged,
    that `kernel_files` gives before and after.  Where none are kept, or processes cannot be copied, everything is
    checked in this one.

    Raises: BenchmarkError as they do, or if the copy ends without a verdict.
    """
    if not (sys.platform.startswith("linux") and kernel_files()):
        require_contract(threads)
        require_products(path, config)
        return
    context = multiprocessing.get_context("fork")
    verdict, told = context.Pipe(duplex=False)

    def check() -> None:
        try:
            require_contract(threads)
            require_products(path, config)
        except BenchmarkError as error:
            told.send([str(error), error.hint])
        else:
            told.send([])

    copy = context.Process(target=check)
    copy.start()
    told.close()
    try:
        found = verdict.recv()
    except EOFError:
        found = ["nothing is timed: the process that checks the kernels ended without a verdict", "it says above why"]
    finally:
        copy.join()
    if found:
        raise BenchmarkError(*found)


def kernel_files() -> dict[str, tuple[int, int]]:
    """What the cache of compiled kernels holds: size and time of change by name."""
    folder = cache_folder()
    files = list(pathlib.Path(folder).rglob("*.nbc")) if folder else []
    return {str(file): (file.stat().st_size, file.stat().st_mtime_ns) for file in files}


class Rounds:
    """A trainer, warmed up, that answers rounds."""

    def __init__(self, sizes: dict[str, int], config: TrainConfig, seconds: float, time_attention: bool) -> None:
        self.sizes, self.seconds, self.time_attention = sizes, seconds, time_attention
        self.tokens = sizes["B"] * sizes["S"]
        self.trainer = Trainer(initial_weights(sizes), RandomBatches.drawn(sizes), config)
        for _ in range(WARM_UP_STEPS):
            began = time.perf_counter()
            self.trainer.step()
            self._step_seconds = time.perf_counter() - began

    def answer(self) -> Answer:
        steps = max(1, int(self.seconds / self._step_seconds))
        began = time.perf_counter()
        for _ in range(steps):
            self.trainer.step()
        seconds = time.perf_counter() - began
        found = {"tokens_per_s": steps * self.tokens / seconds, "peak_mib": peak_mib()}
        if self.time_attention:
            per_step = attention_seconds(self.sizes, self.trainer.path, self.trainer.threads, self.seconds)
            found["attention_s_per_token"] = per_step / self.tokens
        return found


def attention_seconds(sizes: dict[str, int], path: Path, threads: int, budget: float) -> float:
    """Seconds that one step spends in attention alone, forward and backward, for all layers and loops.

    The path's kernels run as they do in training: rows of the batch shared out to threads, q, k and v side by side.
    """
    rng = np.random.default_rng(2)
    heads, channels = sizes["heads"], sizes["d"] // sizes["heads"]
    parts = shards(sizes["B"], threads)
    shape = (sizes["B"], sizes["S"], 3 * heads, channels)
    q, k, v = np.split(rng.standard_normal(shape, np.float32), 3, axis=2)
    dqkv, dy = np.empty(shape, np.float32), rng.standard_normal(q.shape, np.float32)
    dq, dk, dv = np.split(dqkv, 3, axis=2)
    y, lse, start = np.empty_like(dy), np.empty(q.shape[:3], np.float32), np.zeros(sizes["B"], np.int64)
    products = path.products(matrix_shapes(model_config(sizes)))
    each = [(part, products.attention(sizes["S"], channels, True)) for part in parts]

    def work(one: tuple[slice, Attends]) -> None:
        part, attention = one
        attention.forward_into(y[part], lse[part], q[part], k[part], v[part], start[part])
        forward = q[part], k[part], v[part], start[part], y[part], lse[part]
        attention.backward_into(dq[part], dk[part], dv[part], dy[part], *forward)

    run_all(work, each)
    calls, began = 0, time.perf_counter()
    while time.perf_counter() - began < budget / 4:
        run_all(work, each)
        calls += 1
    return (time.perf_counter() - began) / calls * sizes["L"] * LOOPS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", choices=list(CONFIGS), default="small")
    parser.add_argument("--S", type=int, help="positions, instead of the configuration's")
    parser.add_argument("--B", type=int, help="sequences, instead of the configuration's")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--kernels", default="")
    parser.add_argument("--round-seconds", type=float, default=2.0)
    parser.add_argument("--time-attention", action="store_true")
    args = parser.parse_args()

    def prepare() -> tuple[Answer, Callable[[], Answer]]:
        before = kernel_files()
        sizes = CONFIGS[args.config] | {key: vars(args)[key] for key in ("S", "B") if vars(args)[key]}
        try:
            config = train_config(args.threads, args.precision, args.kernels)
            path = product_path(config)  # may measure
            require_all(args.threads, path, model_config(sizes))
            forget_peak()
            rounds = Rounds(sizes, config, args.round_seconds, args.time_attention)
        except LoopLMError as error:
            raise BenchmarkError(str(error), error.hint) from error
        ready = {"kernel_path": path.name, "precision": path.precision, "compiled": kernel_files() != before}
        return ready, rounds.answer

    serve(prepare)


if __name__ == "__main__":
    main()
