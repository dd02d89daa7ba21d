"""How training scales: with threads, with the length of sequences, and from the command to the first step.

    python benchmarks/scaling.py                            all three, about ten minutes
    python benchmarks/scaling.py --what threads --config tiny --json

threads     two threads against one: ratio of rates of rounds that followed each other.
length      cost per token at 1024 positions against 128, the tokens of a batch constant; as measured, and without
            attention, whose cost per token must grow.  Attention is timed in the same round, its kernels alone.
start       seconds from `looplm train` to its first optimizer step, with nothing compiled yet and then with the cache
            that this left.
Nothing is timed before everything `looplm verify` checks of kernels and engine has passed (first two).
"""

import argparse
import json
import pathlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))
from benchmarks.side_by_side import (
    CONFIGS,
    ROOT,
    SHOWN,
    Answer,
    BenchmarkError,
    Side,
    environment,
    paired,
    processor_name,
    report_errors,
    spread,
)

WHAT = ("threads", "length", "start")
LENGTHS = (128, 1024)
TOKENS = 2048  # of a batch when lengths are compared: two sequences of the longer kind, one per thread
FIRST_STEP_LIMIT = 600.0  # seconds

Spread = dict[str, float]


def our_side(name: str, config: str, *more: str) -> Side:
    return Side(name, [sys.executable, str(ROOT / "benchmarks" / "our_side.py"), "--config", config, *more])


def by_turns(commands: dict[str, list[str]], config: str, rounds: int) -> dict[str, list[Answer]]:
    """What each side answered, round by round."""
    with ExitStack() as running:
        sides = {name: running.enter_context(our_side(name, config, *more)) for name, more in commands.items()}
        found: dict[str, list[Answer]] = {name: [] for name in sides}
        for _ in range(rounds):
            for name, side in sides.items():
                found[name].append(side.round())
    return found


def threads(config: str, args: argparse.Namespace) -> dict[str, Any]:
    """Tokens per second with one thread and with two."""
    sides = {f"{count} threads": ["--threads", str(count), *seconds(args)] for count in (1, 2)}
    one, two = ([each["tokens_per_s"] for each in answers] for answers in by_turns(sides, config, args.rounds).values())
    return {"one": spread(one), "two": spread(two), "two_to_one": paired(two, one)}


def length(config: str, args: argparse.Namespace) -> dict[str, Any]:
    """Cost per token, long against short."""
    sides = {
        f"{positions} positions": [
            *("--S", str(positions), "--B", str(TOKENS // positions)),
            *("--threads", str(args.threads), "--time-attention", *seconds(args)),
        ]
        for positions in args.lengths
    }
    return length_ratios(*by_turns(sides, config, args.rounds).values())


def length_ratios(short: Sequence[Answer], long: Sequence[Answer]) -> dict[str, Any]:
    """Microseconds per token and their ratios, with attention and without."""

    def per_token(answers: Sequence[Answer], without_attention: bool) -> list[float]:
        taken = [each["attention_s_per_token"] if without_attention else 0.0 for each in answers]
        return [1e6 * (1.0 / each["tokens_per_s"] - less) for each, less in zip(answers, taken, strict=True)]

    found: dict[str, Any] = {}
    for name, without in (("with_attention", False), ("without_attention", True)):
        before, after = per_token(short, without), per_token(long, without)
        found[name] = {
            "short_us_per_token": spread(before),
            "long_us_per_token": spread(after),
            "long_to_short": paired(after, before),
        }
    return found


def start(args: argparse.Namespace) -> dict[str, Any]:
    """Seconds to the first step with a fresh cache, and again with what is in it then."""
    cold, warm = [], []
    for _ in range(args.rounds):
        with tempfile.TemporaryDirectory() as place:
            cold.append(first_step(pathlib.Path(place, "cold"), pathlib.Path(place, "cache"), args.train))
            warm.append(first_step(pathlib.Path(place, "warm"), pathlib.Path(place, "cache"), args.train))
    return {"cold_s": spread(cold), "warm_s": spread(warm)}


def first_step(folder: pathlib.Path, cache: pathlib.Path, arguments: Sequence[str]) -> float:
    """Seconds from the start of `looplm train` until its log tells of a step.

    Raises: BenchmarkError if it ends, or takes longer than FIRST_STEP_LIMIT, without one.
    """
    command = [sys.executable, "-m", "looplm_cli", "train", *arguments, "--steps", "1", "--quiet"]
    began = time.perf_counter()
    process = subprocess.Popen(
        [*command, "--out-dir", str(folder)],
        env=environment(NUMBA_CACHE_DIR=str(cache), XDG_CACHE_HOME=str(cache)),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        while not (stepped := has_step(folder / "log.jsonl")) and process.poll() is None:
            if time.perf_counter() - began > FIRST_STEP_LIMIT:
                break
            time.sleep(0.005)
        taken = time.perf_counter() - began
        if not (stepped or has_step(folder / "log.jsonl")):
            process.kill()
            raise BenchmarkError(f"looplm train took no step in {taken:.0f} s", process.communicate()[1].strip())
        process.communicate()  # it evaluates and saves, which fills the cache
    finally:
        process.kill()
    return taken


def has_step(log: pathlib.Path) -> bool:
    lines = log.read_text(encoding="utf-8").splitlines(keepends=True) if log.exists() else []
    return any(json.loads(line)["kind"] == "step" for line in lines if line.endswith("\n"))


def seconds(args: argparse.Namespace) -> list[str]:
    return ["--round-seconds", str(args.round_seconds)]


def flat(found: dict[str, Any], prefix: str = "") -> list[tuple[str, Spread]]:
    """Every spread in a nested report, with its path."""
    rows: list[tuple[str, Spread]] = []
    for name, value in found.items():
        if isinstance(value, dict):
            path = f"{prefix}{name.replace('_', ' ')}"
            rows += [(path, value)] if "median" in value else flat(value, f"{path}: ")
    return rows


def arguments(given: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--what", action="append", choices=WHAT, help="default: all")
    parser.add_argument("--config", action="append", choices=list(CONFIGS), metavar="|".join(SHOWN), dest="configs")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--round-seconds", type=float, default=2.0)
    parser.add_argument("--threads", type=int, default=2, help="of `length`")
    parser.add_argument("--json", action="store_true", help="one object")
    args = parser.parse_args(given)
    if args.rounds < 1:
        parser.error("--rounds must be at least 1")
    args.lengths, args.train = LENGTHS, ["builtin:python-topics", "--preset", "tiny"]
    return args


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """All that was asked for: what -> configuration -> spreads."""
    what, configs = args.what or WHAT, args.configs or SHOWN
    found: dict[str, Any] = {"processor": processor_name(), "rounds": args.rounds}
    for name, measured in (("threads", threads), ("length", length)):
        if name in what:
            found[name] = {}
            for config in configs:
                found[name][config] = measured(config, args)
                print(f"{name}, {config}: done", file=sys.stderr, flush=True)
    if "start" in what:
        found["start"] = start(args)
    return found


def main(given: list[str] | None = None) -> int:
    args = arguments(given)
    found = measure(args)
    if args.json:
        print(json.dumps(found, allow_nan=False))
        return 0
    from looplm_cli.render import print_table

    rows = [[name, *(f"{spread[which]:,.4g}" for which in ("median", "min", "max"))] for name, spread in flat(found)]
    print_table(["", "median", "min", "max"], rows, f"{found['processor']}, {found['rounds']} rounds")
    return 0


if __name__ == "__main__":
    sys.exit(report_errors(main))
