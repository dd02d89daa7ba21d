"""How fast a training step is, beside PyTorch's and beside what this machine can multiply.

    python benchmarks/train.py --torch-python PATH                     all configurations, about ten minutes
    python benchmarks/train.py --torch-python PATH --config tiny --rounds 2 --json

The same model, objective, optimizer and batch shapes on both sides, each side in a process of its own, by turns: ours,
a PyTorch variant, ours, the next variant, and so on.  Ratios are ours / theirs of two rounds that followed each other,
as median, min and max over rounds; above 1 this project is faster.  "Best" is the variant with the highest median; one
that is five times slower in the first round than another has no further rounds.
The share of the limit counts only useful floating-point operations of matrix products; in every round the limit is
what the best of several ways to multiply big float32 matrices reaches just then.

PyTorch is no dependency: in any environment, `pip install torch==2.13.0`, and give --torch-python that python.  Its
compiled variants need a C++ compiler.  Nothing is timed before everything `looplm verify` checks of kernels and engine
has passed, in a copy of the very process that is timed, on the same files of compiled kernels.
"""

import argparse
import dataclasses
import json
import pathlib
import statistics
import sys
from collections import defaultdict
from contextlib import ExitStack
from typing import Any

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))
from benchmarks.product_limit import candidates
from benchmarks.side_by_side import (
    CONFIGS,
    ROOT,
    SHOWN,
    Side,
    gemm_flops_per_token,
    paired,
    processor_name,
    report_errors,
    spread,
)

HERE = ROOT / "benchmarks"
OUR_SIDE = HERE / "our_side.py"
PEER = HERE / "peers" / "torch_looplm_train.py"
HOPELESS = 5.0  # a variant so many times slower than the best in the first round has no further ones
VARIANTS = "eager,compile-layer,eager+bf16,compile-layer+bf16"


@dataclasses.dataclass
class Rounds:
    """Everything measured: one number per round, in order.

    `ours` and `ours_fp32` hold the rounds next to each variant, under the variant's name.
    """

    limit: list[float]  # GFLOP/s
    ours: dict[str, list[float]]  # tokens/s
    ours_fp32: dict[str, list[float]]
    theirs: dict[str, list[float]]
    peak_mib: dict[str, list[float]]


def is_fp32(variant: str) -> bool:
    return "bf16" not in variant.split("+")


def our_side(name: str, args: argparse.Namespace, precision: str) -> Side:
    """Our step, from compiled kernels: compiling takes memory that training does not, so it happens in a first life."""
    command = [sys.executable, str(OUR_SIDE), "--config", name, *shared(args), "--precision", precision]
    if args.kernels:
        command += ["--kernels", args.kernels]
    side = Side("ours", command)
    if side.ready["compiled"]:
        side.close()
        side = Side("ours", command)
    return side


def shared(args: argparse.Namespace) -> list[str]:
    """What both sides are told alike."""
    return ["--threads", str(args.threads), "--round-seconds", str(args.round_seconds)]


def compare(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """All rounds of one configuration, and what they say."""
    with ExitStack() as running:

        def started(side: Side) -> Side:
            say(f"{name}: {side.name} is ready")
            return running.enter_context(side)

        ours = started(our_side(name, args, args.precision))
        ours_fp32 = ours if ours.ready["precision"] == "fp32" else started(our_side(name, args, "fp32"))
        limit = [sys.executable, str(HERE / "product_limit.py"), "--threads", str(args.threads)]
        limit += [] if name in SHOWN else ["--small"]
        limits = [started(Side(f"limit {each}", [*limit, "--candidate", each])) for each in candidates()]
        peer = [args.torch_python, str(args.peer), "--serve", "--config", name, *shared(args)]
        peers = {each: started(Side(f"PyTorch {each}", [*peer, "--variants", each])) for each in args.variants}
        rounds = take_turns(name, args.rounds, ours, ours_fp32, limits, peers)
        torch = next(iter(peers.values())).ready.get("torch")
    flops = gemm_flops_per_token(**CONFIGS[name])
    about = {
        "config": name,
        "processor": processor_name(),
        "kernel_path": ours.ready["kernel_path"],
        "precision": ours.ready["precision"],
        "threads": args.threads,
        "rounds": args.rounds,
        "torch": torch,
        "gemm_mflop_per_token": round(flops / 1e6, 2),
    }
    return about | conclusions(rounds, flops)


def take_turns(
    name: str, count: int, ours: Side, ours_fp32: Side, limits: list[Side], peers: dict[str, Side]
) -> Rounds:
    """In each round: the limit, then for each variant our side and it.  Ours in float32 has a turn where it differs."""
    found = Rounds([], defaultdict(list), defaultdict(list), defaultdict(list), defaultdict(list))
    for number in range(1, count + 1):
        found.limit.append(max(side.round()["gflops"] for side in limits))
        for variant, side in peers.items():
            if number > 1 and hopeless(variant, found.theirs):
                continue
            our_turn = ours.round()
            fp32_turn = our_turn if ours_fp32 is ours or not is_fp32(variant) else ours_fp32.round()
            their_turn = side.round()
            found.ours[variant].append(our_turn["tokens_per_s"])
            found.theirs[variant].append(their_turn["tokens_per_s"])
            if is_fp32(variant):
                found.ours_fp32[variant].append(fp32_turn["tokens_per_s"])
            found.peak_mib[variant].append(their_turn["peak_mib"])
        found.peak_mib["ours"].append(our_turn["peak_mib"])
        say(f"{name}: round {number} of {count}")
    return found


def hopeless(variant: str, rates: dict[str, list[float]]) -> bool:
    """It cannot be the best (bfloat16 on a processor without instructions for it takes minutes per step)."""
    return rates[variant][0] * HOPELESS < max(each[0] for each in rates.values())


def conclusions(rounds: Rounds, flops: float) -> dict[str, Any]:
    """Spreads over rounds of rates and paired ratios; null where no variant of that kind was run."""
    medians = {variant: spread(rates)["median"] for variant, rates in rounds.theirs.items()}
    best = max(medians, key=medians.__getitem__)
    fp32 = {variant: rate for variant, rate in medians.items() if is_fp32(variant)}
    best_fp32 = max(fp32, key=fp32.__getitem__) if fp32 else None
    turns, fp32_turns = (by_round(rates, len(rounds.limit)) for rates in (rounds.ours, rounds.ours_fp32))
    gflops, fp32_gflops = ([statistics.mean(rates) * flops / 1e9 for rates in each] for each in (turns, fp32_turns))
    peaks = rounds.peak_mib
    return {
        "tokens_per_s": spread([rate for rates in turns for rate in rates]),
        "best_variant": best,
        "ratio_best": paired(rounds.ours[best], rounds.theirs[best]),
        "best_fp32_variant": best_fp32,
        "ratio_fp32": paired(rounds.ours_fp32[best_fp32], rounds.theirs[best_fp32]) if best_fp32 else None,
        "limit_gflops": spread(rounds.limit),
        "share_of_limit": paired(gflops, rounds.limit),
        "share_of_limit_fp32": paired(fp32_gflops, rounds.limit[: len(fp32_gflops)]) if best_fp32 else None,
        "peak_mib": {side: spread(values) for side, values in peaks.items()},
        "peak_mib_ratio": spread([peaks["ours"][-1] / peaks["eager"][-1]]) if "eager" in peaks else None,
        "variants": {
            variant: {"rounds": len(rates), "tokens_per_s": spread(rates), "ratio": paired(rounds.ours[variant], rates)}
            for variant, rates in rounds.theirs.items()
        },
    }


def by_round(rates: dict[str, list[float]], count: int) -> list[list[float]]:
    """What all variants' neighbours ran at in each of `count` rounds; none in a round that no variant was asked in."""
    return [found for n in range(count) if (found := [each[n] for each in rates.values() if n < len(each)])]


def show(report: dict[str, Any]) -> None:
    """One configuration as a table."""
    from looplm_cli.render import print_table

    def cells(found: dict[str, float] | None, digits: int) -> list[str]:
        return [f"{found[which]:,.{digits}f}" for which in ("median", "min", "max")] if found else ["–"] * 3

    rows = [["ours, tokens/s", *cells(report["tokens_per_s"], 0)]]
    for variant, found in report["variants"].items():
        rows.append([f"PyTorch {variant}, tokens/s", *cells(found["tokens_per_s"], 0)])
    for variant, found in report["variants"].items():
        rows.append([f"ours / {variant}", *cells(found["ratio"], 2)])
    rows += [
        [f"ours / the best ({report['best_variant']})", *cells(report["ratio_best"], 2)],
        [f"fp32: ours / the best ({report['best_fp32_variant']})", *cells(report["ratio_fp32"], 2)],
        ["limit, fp32 products, GFLOP/s", *cells(report["limit_gflops"], 0)],
        ["share of the limit", *cells(report["share_of_limit"], 2)],
        ["fp32: share of the limit", *cells(report["share_of_limit_fp32"], 2)],
        *([f"peak MiB, {side}", *cells(found, 0)] for side, found in report["peak_mib"].items()),
        ["peak memory: ours / eager", *cells(report["peak_mib_ratio"], 2)],
    ]
    title = "{config}: {kernel_path}, {precision}, {threads} threads, {rounds} rounds, PyTorch {torch}, {processor}"
    print_table(["", "median", "min", "max"], rows, title.format(**report))


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def arguments(given: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--torch-python", default=sys.executable, metavar="PATH", help="a python that has PyTorch")
    parser.add_argument("--config", action="append", choices=list(CONFIGS), metavar="|".join(SHOWN), dest="configs")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--round-seconds", type=float, default=2.0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--variants", type=lambda text: text.split(","), default=VARIANTS, help=f"default: {VARIANTS}")
    parser.add_argument("--precision", choices=["auto", "fp32", "bf16"], default="auto", help="of our side")
    parser.add_argument("--kernels", default="", help="which kernels our side takes")
    parser.add_argument("--json", action="store_true", help="one object per configuration, one per line")
    parser.add_argument("--peer", type=pathlib.Path, default=PEER, help=argparse.SUPPRESS)
    args = parser.parse_args(given)
    if args.rounds < 1:
        parser.error("--rounds must be at least 1")
    return args


def main(given: list[str] | None = None) -> int:
    args = arguments(given)
    for name in args.configs or SHOWN:
        report = compare(name, args)
        if args.json:
            print(json.dumps(report, allow_nan=False), flush=True)
        else:
            show(report)
    return 0


if __name__ == "__main__":
    sys.exit(report_errors(main))
