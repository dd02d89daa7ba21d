"""How many times the tokens per second of one text a batch of texts gets: by turns, in one process, on random weights.

    python benchmarks/batch_ratio.py --config small --format float32 --rows 16

All loops run, so both sides do the same work per token; prompts and first tokens are not timed.
"""

import argparse
import json
import pathlib
import sys
import time
from collections.abc import Iterator
from typing import Any

import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))
from benchmarks.our_decode import model_config, random_weights
from benchmarks.side_by_side import DECODE_CONFIGS, BenchmarkError, paired, processor_name, report_errors, spread
from looplm import batching, generation
from looplm.exits import LearnedGate
from looplm.generation import Generated
from looplm.stored import FORMATS, StoredWeights

PROMPT = 16  # tokens


def batch16_ratio(rounds: int = 5, threads: int | None = None) -> dict[str, float]:
    """Median, min and max of: tokens/s of 16 texts at once over that of one, preset small in float32."""
    found: dict[str, float] = measure(random_weights(model_config("small"), "float32"), rounds, threads)["ratio"]
    return found


def measure(
    weights: StoredWeights, rounds: int = 5, threads: int | None = None, rows: int = 16, tokens: int = 64
) -> dict[str, Any]:
    """Rates of both sides, and their ratio round by round; threads None: as many as each side finds useful."""
    alone, together = [], []
    for number in range(1 + rounds):
        one, many = rate(_one(weights, threads, tokens), 1), rate(_many(weights, threads, rows, tokens), rows)
        if number:  # the first loads the kernels
            alone.append(one)
            together.append(many)
    return {"tokens_per_s_of_one": spread(alone), "tokens_per_s": spread(together), "ratio": paired(together, alone)}


def rate(tokens: Iterator[Generated], untimed: int) -> float:
    """Tokens per second, without those of the prompts, which are the first to come."""
    for _ in range(untimed):
        next(tokens)
    began = time.perf_counter()
    return sum(1 for _ in tokens) / (time.perf_counter() - began)


def _prompts(weights: StoredWeights, count: int) -> list[np.ndarray]:
    return list(np.random.default_rng(1).integers(0, weights.config.vocab_size, (count, PROMPT)))


def _one(weights: StoredWeights, threads: int | None, tokens: int) -> Iterator[Generated]:
    return generation.generate(
        weights,
        _prompts(weights, 1)[0],
        rule=LearnedGate(1.0),
        rng=np.random.default_rng(0),
        max_new_tokens=tokens,
        threads=threads or generation.useful_threads(weights),
    )


def _many(weights: StoredWeights, threads: int | None, rows: int, tokens: int) -> Iterator[Generated]:
    wanted = [
        batching.Request(prompt, np.random.default_rng(number), tokens)
        for number, prompt in enumerate(_prompts(weights, rows))
    ]
    threads = threads or batching.useful_threads(weights, rows)
    return (token for _, token in batching.Batch(weights, wanted, rule=LearnedGate(1.0), rows=rows, threads=threads))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", choices=list(DECODE_CONFIGS), default="small")
    parser.add_argument("--format", choices=["float32", "bfloat16", *FORMATS], default="float32")
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=64, help="of each text")
    parser.add_argument("--threads", type=int, help="default: as many as each side finds useful")
    args = parser.parse_args()
    if min(args.rows, args.rounds, args.tokens - 1) < 1:
        raise BenchmarkError("nothing would be timed", "give at least one row, one round and two tokens")
    weights = random_weights(model_config(args.config), args.format)
    found = measure(weights, args.rounds, args.threads, args.rows, args.tokens)
    print(json.dumps({"processor": processor_name(), **vars(args), **found}))
    return 0


if __name__ == "__main__":
    sys.exit(report_errors(main))
