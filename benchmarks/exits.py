"""What exits and drafts save in decoding, and whether the time they take is the loops they run.

    python benchmarks/exits.py --config ouro-1.4b --rounds 3
    python benchmarks/exits.py --measure draft_speedup --model runs/tiny --prompt "KING HENRY:"

time_model_error     fixed cost + cost per loop * mean loops, from depths 1 and R, against the time of mixed exits
speedup_last_exited  tokens/s at a mean of 2 loops of 4 (exits told by a trace) over tokens/s at 4
speedup_exact        the same where deeper keys and values are computed later (cache policy `exact`)
draft_speedup        greedy tokens/s with drafts over without, the same text, for each depth and length of drafts
batch16_ratio        tokens/s of 16 texts over those of one; of a published shape only where it is asked for

All in one process, both sides of a ratio by turns in each round: median, minimum and maximum over the rounds.  Random
weights (`ouro-1.4b` as `looplm init` writes them, in a temporary folder) but for drafts, which want a trained model.
"""

import argparse
import contextlib
import importlib
import itertools
import json
import pathlib
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from typing import Any

import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))
from benchmarks.our_decode import model_config, random_weights
from benchmarks.side_by_side import DECODE_CONFIGS, BenchmarkError, paired, processor_name, report_errors, spread
from looplm.arrays import Ints
from looplm.cache import POLICIES
from looplm.checkpoint import resolve_model
from looplm.draft_plans import FLOW, DraftAccount, Drafts, Length
from looplm.drafting import generate_drafted
from looplm.errors import LoopLMError
from looplm.exit_trace import ExitTrace
from looplm.exits import LearnedGate
from looplm.generation import Generated, generate, useful_threads
from looplm.model_files import open_model
from looplm.published import NAMES, published_config, tokenizer_files
from looplm.random_model import write_random_model
from looplm.sampling import GREEDY
from looplm.stored import FORMATS, StoredWeights, read_stored

PROMPT = 32  # tokens of a random prompt
UNTIMED = 2  # the prompt's token, and the one whose pass loads the kernels
HALF = (1, 2, 3, 2)  # exits of a mean of 2 loops, over and over
MEASURES = ("time_model_error", "speedup_last_exited", "speedup_exact", "draft_speedup", "batch16_ratio")


class NotMeasured(Exception):
    """Why a measure has no number here."""


class Bench:
    """A model, a prompt (or several, round by round), and how long its texts take."""

    def __init__(self, weights: StoredWeights, prompts: list[Ints], args: argparse.Namespace) -> None:
        self.weights, self.prompts, self.args = weights, prompts, args
        self.loops = weights.config.total_ut_steps
        self.threads = args.threads or useful_threads(weights)

    def seconds(self, tokens: Iterator[Generated]) -> float:
        """Of one token, on average."""
        for _ in range(UNTIMED):
            next(tokens)
        began = time.perf_counter()
        timed = sum(1 for _ in tokens)
        return (time.perf_counter() - began) / timed

    def traced(self, exits: list[int], policy: str = "last-exited") -> float:
        """Seconds per token of a text with these exits, repeated as often as needed."""
        count = self.args.tokens + UNTIMED
        trace = ExitTrace([*([self.loops] * UNTIMED), *itertools.islice(itertools.cycle(exits), self.args.tokens)])
        settings: dict[str, Any] = {"policy": policy, "rule": trace, "max_new_tokens": count}
        return self.seconds(self._generate(0, settings))

    def greedy(self, number: int, drafts: Drafts | None, account: DraftAccount) -> tuple[float, list[int]]:
        """Seconds per token of full decoding, plain or drafted, and the text."""
        written: list[int] = []
        settings: dict[str, Any] = {"max_new_tokens": self.args.tokens + UNTIMED}
        if drafts is None:
            tokens = self._generate(number, settings | {"rule": LearnedGate(1.0)})
        else:
            tokens = self._drafted(number, drafts, settings | {"account": account})
        return self.seconds(written.append(token.token_id) or token for token in tokens), written

    def _generate(self, number: int, settings: dict[str, Any]) -> Iterator[Generated]:
        return generate(self.weights, self._prompt(number), **self._shared(), **settings)

    def _drafted(self, number: int, drafts: Drafts, settings: dict[str, Any]) -> Iterator[Generated]:
        return generate_drafted(self.weights, self._prompt(number), drafts, **self._shared(), **settings)

    def _prompt(self, number: int) -> Ints:
        return self.prompts[number % len(self.prompts)]

    def _shared(self) -> dict[str, Any]:
        return {"rng": np.random.default_rng(0), "sampling": GREEDY, "threads": self.threads}


# ---- the measures: each gives an object with median, min and max


def time_model_error(bench: Bench) -> dict[str, Any]:
    loops = bench.loops
    mixed = np.random.default_rng(0).integers(1, loops + 1, bench.args.tokens).tolist()
    mean, errors, per_loop, fixed = statistics.mean(mixed), [], [], []
    for _ in rounds(bench):
        shallow, measured, deep = bench.traced([1]), bench.traced(mixed), bench.traced([loops])
        per_loop.append((deep - shallow) / (loops - 1))
        fixed.append(shallow - per_loop[-1])
        errors.append(abs((fixed[-1] + per_loop[-1] * mean) / measured - 1.0))
    costs = {"ms_per_loop": statistics.median(per_loop), "fixed_ms": statistics.median(fixed)}
    return spread(errors) | {name: round(1e3 * seconds, 4) for name, seconds in costs.items()} | {"mean_loops": mean}


def speedup(bench: Bench, policy: str) -> dict[str, Any]:
    if policy not in POLICIES:
        raise NotMeasured(f"there is no cache policy {policy!r}; there are {', '.join(POLICIES)}")
    full, half = [], []
    for _ in rounds(bench):
        full.append(bench.traced([bench.loops]))
        half.append(bench.traced(list(HALF), policy))
    return paired(full, half) | {"mean_loops": statistics.mean(HALF), "loops": bench.loops}


def draft_speedup(bench: Bench) -> dict[str, Any]:
    """The best median; `choices` has all of them."""
    args = bench.args
    pairs = itertools.product(args.draft_loops or range(1, bench.loops), args.draft_tokens)
    choices = [Drafts(loops, tokens) for loops, tokens in pairs if loops < bench.loops]
    plain: dict[Drafts, list[float]] = {drafts: [] for drafts in choices}
    drafted: dict[Drafts, list[float]] = {drafts: [] for drafts in choices}
    accounts = {drafts: DraftAccount() for drafts in choices}
    for number, drafts in itertools.product(rounds(bench), choices):
        seconds, text = bench.greedy(number, None, accounts[drafts])
        plain[drafts].append(seconds)
        seconds, same = bench.greedy(number, drafts, accounts[drafts])
        drafted[drafts].append(seconds)
        if same != text:
            raise BenchmarkError(f"{drafts} changed the text", "nothing that is measured with them counts")
    found = [
        {
            "draft_loops": drafts.loops,
            "draft_tokens": drafts.tokens,
            "acceptance": round(accounts[drafts].acceptance or 0.0, 3),
            "tokens_per_round": round(accounts[drafts].tokens_per_round, 3),
            **paired(plain[drafts], drafted[drafts]),
        }
        for drafts in choices
    ]
    if not found:
        raise NotMeasured("no draft runs fewer loops than the model")
    return {**max(found, key=lambda one: one["median"]), "choices": found}


def batch16_ratio(bench: Bench) -> dict[str, Any]:
    try:
        module = importlib.import_module("benchmarks.batch_ratio")
    except ModuleNotFoundError as error:
        raise NotMeasured("there is no benchmarks/batch_ratio.py") from error
    found: dict[str, Any] = module.measure(bench.weights, bench.args.rounds, bench.args.threads)
    return found.pop("ratio") | found


def rounds(bench: Bench) -> range:
    return range(bench.args.rounds)


# ---- the models


@contextlib.contextmanager
def opened(args: argparse.Namespace, name: str) -> Iterator[Bench]:
    """A shape with random weights, or the model given: ready, its kernels loaded."""
    with tempfile.TemporaryDirectory(dir=args.dir) as place:
        rng = np.random.default_rng(1)
        if name in DECODE_CONFIGS:
            weights = random_weights(model_config(name), args.format or "bfloat16")
            prompts = [rng.integers(1, weights.config.vocab_size, PROMPT)]
        else:
            folder = resolve_model(name) if name not in NAMES else pathlib.Path(place, name)
            if name in NAMES:
                files, dtype = tokenizer_files(name), "bfloat16"
                write_random_model(folder, published_config(name), files, seed=0, dtype=dtype, threads=2)
            read = open_model(folder)
            weights = read_stored(read, args.format)
            texts = args.prompt or ["The"]
            prompts = [read.tokenizer.encode(text) for text in texts]
        yield Bench(weights, prompts, args)


def measure(bench: Bench, name: str) -> dict[str, Any]:
    if name.startswith("speedup_"):
        return speedup(bench, name.removeprefix("speedup_").replace("_", "-"))
    if name == "time_model_error":
        return time_model_error(bench)
    return draft_speedup(bench) if name == "draft_speedup" else batch16_ratio(bench)


def show(report: dict[str, Any]) -> None:
    where = "{measure}, {config} in {format}, {threads} threads, {rounds} rounds".format(**report)
    if "not_measured" in report:
        print(f"{where}: not measured, {report['not_measured']}", flush=True)
        return
    more = {key: value for key, value in report.items() if key not in HEADER}
    choices = more.pop("choices", [])
    print(
        f"{where}: {report['median']:g} ({report['min']:g} to {report['max']:g})", *_words(more), sep="  ", flush=True
    )
    for one in choices:
        print("   ", *_words(one), sep="  ", flush=True)


HEADER = ("measure", "config", "format", "threads", "rounds", "tokens", "processor", "median", "min", "max")


def _words(found: dict[str, Any]) -> list[str]:
    return [f"{key} {value:g}" if isinstance(value, int | float) else f"{key} {value}" for key, value in found.items()]


def length(text: str) -> Length:
    return FLOW if text == FLOW else int(text)


def arguments(given: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measure", action="append", choices=MEASURES, help="default: all that the models allow")
    parser.add_argument(
        "--config", action="append", choices=[*DECODE_CONFIGS, *NAMES], help="default: small, ouro-1.4b"
    )
    parser.add_argument("--model", help="a trained model, for draft_speedup; without --config the only one")
    parser.add_argument("--format", choices=list(FORMATS), help="of the weights; default: as stored, random: bfloat16")
    parser.add_argument("--prompt", action="append", help="for --model; several are taken in turn, round by round")
    parser.add_argument("--draft-loops", type=int, action="append", metavar="R", help="default: all below the model's")
    parser.add_argument("--draft-tokens", type=length, action="append", metavar="K|flow", help="default: flow, 1, 2, 4")
    parser.add_argument("--tokens", type=int, default=64, help="timed, of each text")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, help="default: as many as are useful")
    parser.add_argument("--dir", type=pathlib.Path, help="for the temporary folder; ouro-1.4b takes 2.9 GB")
    parser.add_argument("--json", action="store_true", help="one object per measure and model, one per line")
    args = parser.parse_args(given)
    if min(args.rounds, args.tokens, args.threads or 1) < 1:
        parser.error("--rounds, --tokens and --threads must be at least 1")
    args.draft_tokens = args.draft_tokens or [FLOW, 1, 2, 4]
    return args


def of_random_weights(config: str) -> list[str]:
    """What is measured unless it is told: in a published shape, sixteen texts would take a quarter of an hour."""
    left_out = ("draft_speedup", "batch16_ratio") if config in NAMES else ("draft_speedup",)
    return [name for name in MEASURES if name not in left_out]


def main(given: list[str] | None = None) -> int:
    args = arguments(given)
    for config in args.config or ([] if args.model else ["small", "ouro-1.4b"]):
        run(args, config, args.measure or of_random_weights(config))
    if args.model:
        run(args, args.model, args.measure or ["draft_speedup"])
    return 0


def run(args: argparse.Namespace, config: str, names: list[str]) -> None:
    """The measures of one model, each told as soon as it is there."""
    try:
        with opened(args, config) as bench:
            bench.traced([bench.loops])  # touches memory, loads kernels
            for name in names:
                header = {
                    "measure": name,
                    "config": config,
                    "format": bench.weights.matrices["model.layers.0.mlp.up_proj.weight"].format,
                    "threads": bench.threads,
                    "rounds": args.rounds,
                    "tokens": args.tokens,
                    "processor": processor_name(),
                }
                try:
                    report = header | measure(bench, name)
                except NotMeasured as why:
                    report = header | {"not_measured": str(why)}
                if args.json:
                    print(json.dumps(report, allow_nan=False), flush=True)
                else:
                    show(report)
    except LoopLMError as error:
        raise BenchmarkError(str(error), error.hint) from error


if __name__ == "__main__":
    sys.exit(report_errors(main))
