"""What do ranks cost?  One process with N threads against N ranks with one thread each, on the same rows of every step.

    python benchmarks/ranks.py                         two ranks, preset nano, five rounds, about two minutes
    python benchmarks/ranks.py --preset small --rounds 3 --steps 6

Needs `pip install "looplm-cpu[mpi]"`.  Each round runs three processes or groups of processes one after the other: one
thread alone with a rank's rows, N threads, N ranks; the figures of a round are compared with each other, and the median
over rounds is told.  All-reduce is the sum of gradients alone; the wait before it, for the slower rank, stands apart.
"""

import argparse
import json
import os
import pathlib
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from looplm.arrays import Floats
from looplm.data import TextSource
from looplm.ranks import Ranks, connect
from looplm.settings import run_config
from looplm.training import Trainer
from looplm.weights import initialise, parameter_count

WARM_UP = 3  # steps that are not timed: kernels are loaded, buffers touched for the first time


class Timed:
    """Ranks that note how long each sum takes."""

    def __init__(self, ranks: Ranks) -> None:
        self._ranks, self.rank, self.size, self.sharing = ranks, ranks.rank, ranks.size, ranks.sharing
        self.waiting = self.summing = 0.0  # seconds

    def sum_small(self, values: Sequence[float]) -> list[float]:
        """Comes first in a step: whoever is ready earlier waits here."""
        began = time.perf_counter()
        sums = self._ranks.sum_small(values)
        self.waiting += time.perf_counter() - began
        return sums

    def sum_in_place(self, buffer: Floats) -> None:
        began = time.perf_counter()
        self._ranks.sum_in_place(buffer)
        self.summing += time.perf_counter() - began

    def broadcast(self, value: Any) -> Any:
        return self._ranks.broadcast(value)

    def broadcast_in_place(self, buffer: Floats) -> None:
        self._ranks.broadcast_in_place(buffer)

    def abort(self, exit_code: int) -> None:
        self._ranks.abort(exit_code)


def measure(preset: str, vocab_size: int, rows: int, threads: int, steps: int) -> dict[str, float]:
    """Train on random tokens, as one of the ranks that a launcher started, or alone; `rows` are those of a rank."""
    ranks = Timed(connect())
    given = {"threads": threads, "steps": WARM_UP + steps} | ({"batch_size": rows} if rows else {})
    config = run_config(preset, {"train": given})
    model, train = config.model_config(vocab_size=vocab_size), config.train
    ids = np.random.default_rng(0).integers(0, vocab_size, 200_000).astype(np.uint16)
    source = TextSource(ids, ids, train.batch_size * ranks.size, train.seq_len, 0, 1.0, vocab_size)
    trainer = Trainer(initialise(model, config.init, 0), source, train, ranks)
    for _ in range(WARM_UP):
        trainer.step()
    ranks.waiting = ranks.summing = 0.0
    began = time.perf_counter()
    for _ in range(steps):
        trainer.step()
    spent = time.perf_counter() - began
    return {
        "rank": ranks.rank,
        "rows": train.batch_size,
        "parameters": parameter_count(model),
        "tokens_per_s": steps * train.batch_size * ranks.size * train.seq_len / spent,
        "step_s": spent / steps,
        "all_reduce_share": ranks.summing / spent,
        "waiting_share": ranks.waiting / spent,
    }


def started(options: argparse.Namespace, ranks: int, rows: int, threads: int) -> dict[str, float]:
    """`measure` in fresh processes; rank 0's figures."""
    work = [str(value) for value in (options.preset, options.vocab_size, rows, threads, options.steps)]
    command = [sys.executable, __file__, "--work", *work]
    if ranks > 1:
        command = [str(pathlib.Path(sys.executable).with_name("mpiexec")), "-n", str(ranks), *command]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=os.environ)
    return next(line for line in map(json.loads, done.stdout.splitlines()) if line["rank"] == 0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="nano")
    parser.add_argument("--vocab-size", type=int, default=512)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=15, help="timed in each run")
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")
    parser.add_argument("--work", nargs=5, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        preset, *numbers = options.work
        sys.stdout.write(json.dumps(measure(preset, *map(int, numbers))) + "\n")
        return
    count, rounds = options.ranks, []
    for number in range(1, options.rounds + 1):
        one = started(options, 1, 0, 1)
        rows = int(one["rows"])
        pair = [("threads", 1, rows * count, count), ("ranks", count, rows, 1)]
        found = {name: started(options, *how) for name, *how in (pair if number % 2 else pair[::-1])}
        rounds.append({"one": one, **found})
        rates = {name: round(figures["tokens_per_s"]) for name, figures in rounds[-1].items()}
        print(
            f"round {number}: one thread {rates['one']:,} tokens/s, {count} threads {rates['threads']:,}, "
            f"{count} ranks {rates['ranks']:,}",
            flush=True,
        )
    result = summary(options, rounds)
    for name, value in result.items():
        print(f"{name:28s} {value:,}" if isinstance(value, int) else f"{name:28s} {value}")
    if options.json:
        print(json.dumps(result))


def summary(options: argparse.Namespace, rounds: list[dict[str, dict[str, float]]]) -> dict[str, Any]:
    """Medians over rounds; ratios are those within a round."""

    def median(value: Any, digits: int) -> float:
        return round(statistics.median(map(value, rounds)), digits)

    rates = {f"tokens_per_s_{name}": int(median(lambda r, name=name: r[name]["tokens_per_s"], 0)) for name in rounds[0]}
    return {
        "preset": options.preset,
        "parameters": int(rounds[0]["one"]["parameters"]),
        "ranks": options.ranks,
        "rounds": len(rounds),
        **rates,
        "ranks_over_threads": median(lambda r: r["ranks"]["tokens_per_s"] / r["threads"]["tokens_per_s"], 3),
        "scaling_efficiency_ranks": median(
            lambda r: r["ranks"]["tokens_per_s"] / r["one"]["tokens_per_s"] / options.ranks, 3
        ),
        "scaling_efficiency_threads": median(
            lambda r: r["threads"]["tokens_per_s"] / r["one"]["tokens_per_s"] / options.ranks, 3
        ),
        "step_ms": median(lambda r: 1e3 * r["ranks"]["step_s"], 2),
        "all_reduce_share": median(lambda r: r["ranks"]["all_reduce_share"], 5),
        "waiting_share": median(lambda r: r["ranks"]["waiting_share"], 4),
    }


if __name__ == "__main__":
    main()
