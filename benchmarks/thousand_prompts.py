"""A thousand texts, the same to the bit however they are written: deferred loops and batches against the plain way.

    python benchmarks/thousand_prompts.py                      a small random model; a few minutes
    python benchmarks/thousand_prompts.py --model runs/tiny --prompts 100

exact  each prompt under the cache policy `exact` against `full`, with thresholds and bounds of waiting that change from
       prompt to prompt
batch  all prompts in one batch whose rows come and go against each alone, under every policy that batches have

Compared are tokens, the loops they are read from, log-probabilities to the last bit, and why a text ended; of a batch
also the loops that were run.  A line for each; exit code 0 if nothing differs.
"""

import argparse
import dataclasses
import json
import pathlib
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))
from benchmarks.side_by_side import BenchmarkError, report_errors
from looplm.batching import SERVED, Batch, Request, check_rows
from looplm.checkpoint import resolve_model
from looplm.config import ModelConfig
from looplm.deferral import MOST_DEFERRED
from looplm.errors import LoopLMError
from looplm.exits import LearnedGate
from looplm.generation import Generated, generate
from looplm.model_files import open_model
from looplm.sampling import GREEDY, Sampling
from looplm.settings import InitConfig
from looplm.stored import StoredWeights, read_stored
from looplm.weights import initialise

SMALL = ModelConfig(
    vocab_size=257,
    hidden_size=48,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=12,
    total_ut_steps=5,
    max_position_embeddings=256,
)
THRESHOLDS = (0.3, 0.45, 0.6, 0.75, 0.9)
BATCH_Q = 0.5
LIVELY = Sampling(temperature=0.9, repetition_penalty=1.1)
Text = list[Generated]


@dataclasses.dataclass
class Found:
    """What one comparison found.  `different` are the numbers of prompts, counted from 1."""

    what: str
    tokens: int = 0
    loops_run: int = 0  # before a token was predicted, prompts not counted
    loops_of_full: int = 0  # what running all of them would have been
    exits: set[int] = dataclasses.field(default_factory=set)
    different: list[int] = dataclasses.field(default_factory=list)

    def add(self, number: int, ours: Text, theirs: Text, same: bool, loops: int) -> None:
        """ours: the text whose way is judged; theirs: the plain way's."""
        self.tokens += len(theirs)
        self.loops_run += sum(token.loops_run for token in ours[1:])
        self.loops_of_full += loops * len(ours[1:])
        self.exits |= {token.exit_loop + 1 for token in theirs}
        if not same:
            self.different.append(number)

    def line(self, prompts: int) -> str:
        saved = 1.0 - self.loops_run / max(1, self.loops_of_full)
        ways = f"{self.what}: {prompts:,} prompts, {self.tokens:,} tokens read after loops {sorted(self.exits)}"
        verdict = "all the same to the bit" if not self.different else f"DIFFERENT: prompts {self.different[:10]}"
        return f"{ways}, {100 * saved:.0f} % of loops left out or for later: {verdict}"


def random_model(seed: int) -> StoredWeights:
    """Far from trained, with gates that differ from token to token."""
    weights = initialise(SMALL, InitConfig(post_norm=0.7, embedding_std=1.0, weight_std=0.2), seed)
    weights.gate_weight[...] = np.random.default_rng(seed).standard_normal(weights.gate_weight.shape) * 0.3
    weights.gate_bias[...] = -1.0
    return StoredWeights.of(weights)


def prompts_for(config: ModelConfig, count: int, longest: int, seed: int) -> list[np.ndarray]:
    """Of random lengths, each S: mostly short, some as long as allowed."""
    rng = np.random.default_rng(seed)
    lengths = np.exp(rng.uniform(0.0, np.log(longest + 1), count)).astype(np.int64)
    return [rng.integers(0, config.vocab_size, max(1, int(length))) for length in lengths]


def _read(text: Text) -> list[tuple[int, int, float, str | None]]:
    """All of a text but what it cost."""
    return [(token.token_id, token.exit_loop, token.logprob, token.finish) for token in text]


def compare_exact(weights: StoredWeights, prompts: Sequence[np.ndarray], tokens: int, threads: int) -> Found:
    """Greedy, `exact` against `full`."""
    found, loops = Found("exact = full"), weights.config.total_ut_steps
    for number, prompt in enumerate(prompts, 1):
        settings: dict[str, Any] = {"rule": LearnedGate(THRESHOLDS[number % len(THRESHOLDS)]), "sampling": GREEDY}
        settings |= {"max_new_tokens": tokens, "threads": threads}
        bound = 1 + number % MOST_DEFERRED
        full, exact = (
            list(generate(weights, prompt, rng=np.random.default_rng(0), policy=policy, **more, **settings))
            for policy, more in (("full", {}), ("exact", {"max_deferred": bound}))
        )
        found.add(number, exact, full, _read(exact) == _read(full), loops)
    return found


def compare_batches(
    weights: StoredWeights, prompts: Sequence[np.ndarray], tokens: int, threads: int, rows: int
) -> Iterator[Found]:
    """Sampled, texts of random lengths: all in one batch against each alone, policy by policy."""
    lengths = np.random.default_rng(len(prompts)).integers(1, 2 * tokens, len(prompts)).tolist()
    loops = weights.config.total_ut_steps
    for policy in SERVED:
        found = Found(f"batch of {rows} rows = alone, {policy}")
        settings: dict[str, Any] = {"rule": LearnedGate(BATCH_Q), "sampling": LIVELY, "policy": policy}
        settings["threads"] = threads
        together: list[Text] = [[] for _ in prompts]
        wanted = [
            Request(prompt, np.random.default_rng(seed), length)
            for seed, (prompt, length) in enumerate(zip(prompts, lengths, strict=True))
        ]
        for number, token in Batch(weights, wanted, rows=rows, **settings):
            together[number].append(token)
        for seed, (prompt, length, ours) in enumerate(zip(prompts, lengths, together, strict=True)):
            rng = np.random.default_rng(seed)
            alone = list(generate(weights, prompt, rng=rng, max_new_tokens=length, **settings))
            found.add(seed + 1, ours, alone, ours == alone, loops)
        yield found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a model or run folder; default: a small random model")
    parser.add_argument("--prompts", type=int, default=1000)
    parser.add_argument("--longest", type=int, default=128, help="tokens of a prompt")
    parser.add_argument("--tokens", type=int, default=20, help="new ones of each text; of a batch's, on average")
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0, help="of prompts and random weights")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    if min(args.prompts, args.longest, args.tokens, args.threads) < 1 or args.seed < 0:
        raise BenchmarkError("nothing would be compared", "give at least one prompt, one token and one thread")
    try:
        check_rows(args.rows)
        weights = random_model(args.seed) if args.model is None else read_stored(open_model(resolve_model(args.model)))
    except LoopLMError as error:
        raise BenchmarkError(str(error), error.hint) from error
    longest = min(args.longest, weights.config.max_position_embeddings)
    prompts = prompts_for(weights.config, args.prompts, longest, args.seed)
    results: list[Found] = []
    for compare in (
        lambda: [compare_exact(weights, prompts, args.tokens, args.threads)],
        lambda: compare_batches(weights, prompts, args.tokens, args.threads, args.rows),
    ):
        for found in compare():
            results.append(found)
            print(found.line(len(prompts)), flush=True, file=sys.stderr if args.json else sys.stdout)
    if args.json:
        told = [dataclasses.asdict(found) | {"exits": sorted(found.exits)} for found in results]
        print(json.dumps({**vars(args), "found": told}))
    return int(any(found.different for found in results))


if __name__ == "__main__":
    sys.exit(report_errors(main))
