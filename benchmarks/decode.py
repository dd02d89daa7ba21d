"""Tokens per second of decoding, against this machine's memory, PyTorch, and llama.cpp where it is installed.

    python benchmarks/decode.py --torch-python PATH --llama-python PATH

For each shape and weight format: our side by turns with each rival, every one in a process of its own (only one works
at a time), and the machine's reading of as many bytes as our weights take.  PyTorch runs in float32 and bfloat16, the
better one counts; llama.cpp runs a dense model of the same per-loop shape in the format of about the same bits, counted
as its looped equivalent.  Ratios are of neighbouring rounds: median, min and max.
"""

import argparse
import json
import pathlib
import statistics
import sys
from typing import Any

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))
from benchmarks.side_by_side import (
    DECODE_CONFIGS,
    ROOT,
    TORCH_HINT,
    BenchmarkError,
    Side,
    paired,
    processor_name,
    report_errors,
    spread,
)

HERE = ROOT / "benchmarks"
OUR_SIDE = HERE / "our_decode.py"
PEERS = HERE / "peers"
SHAPES = ("ouro1.4b", "small512", "small")
FORMATS = ("bfloat16", "int8", "int4")
LLAMA_TYPES = {"float32": "f32", "bfloat16": "bf16", "int8": "q8_0", "int4": "q4_0"}


def compare(shape: str, chosen: str, args: argparse.Namespace) -> dict[str, Any]:
    """Our side in one format against everything else at one shape."""
    shared = ["--config", shape, "--threads", str(args.threads), "--round-seconds", str(args.round_seconds)]
    command = [sys.executable, str(args.our_side), *shared, "--format", chosen, "--prompt", str(args.prompt)]
    with Side("ours", command) as ours:
        ready = ours.ready
        reading = [*command, "--read-bytes", str(ready["weight_bytes"])]
        limit = against(ours, Side("reading", reading), args.rounds, "gb_per_s")
        rivals: dict[str, dict[str, Any]] = {}
        for name, rival in peers(shape, chosen, shared, args).items():
            if name.startswith("llama") and any(done.startswith("llama") for done in rivals):
                continue
            try:
                found = against(ours, Side(name, rival), args.rounds, "tokens_per_s")
            except BenchmarkError as error:
                if not name.startswith("llama"):
                    raise
                say(f"{name}: {error}")
                continue
            rivals[name] = found
            say(f"{shape} {chosen}: {name} done")
    torch = {name: found for name, found in rivals.items() if name.startswith("PyTorch")}
    best = max(torch, key=lambda name: statistics.median(torch[name]["theirs"]), default=None)
    llama = next((found for name, found in rivals.items() if name.startswith("llama")), None)
    own = [rate for found in (limit, *rivals.values()) for rate in found["tokens_per_s"]]
    return {
        "config": shape,
        "format": chosen,
        "processor": processor_name(),
        "kernel_path": ready["kernel_path"],
        "threads": args.threads,
        "rounds": args.rounds,
        "bytes_per_token": ready["bytes_per_token"],
        "tokens_per_s": spread(own),
        "read_gb_per_s": spread(limit["theirs"]),
        "share_of_bandwidth": paired(limit["gb_per_s"], limit["theirs"]),
        "best_torch": best,
        "ratio_torch": paired(torch[best]["tokens_per_s"], torch[best]["theirs"]) if best else None,
        "ratio_llama_cpp": paired(llama["tokens_per_s"], llama["theirs"]) if llama else None,
        "prefill_tokens_per_s_per_pass": {
            **{f"ours, {kind}": round(rate, 1) for kind, rate in ready["prefill_tokens_per_s_per_pass"].items()},
            **{name: round(found["prefill"], 1) for name, found in rivals.items()},
        },
        "rivals": {name: spread(found["theirs"]) for name, found in rivals.items()},
        "peak_mib": limit["peak_mib"],
    }


def peers(shape: str, chosen: str, shared: list[str], args: argparse.Namespace) -> dict[str, list[str]]:
    """Name -> command; without a python for llama.cpp, none of it.

    Of llama.cpp the first that runs counts: on processors with AMX its own layout of weights ends some builds.
    """
    found = {}
    for dtype in args.torch_dtypes:
        command = [args.torch_python, str(args.torch_peer), "--serve", *shared, "--dtype", dtype]
        found[f"PyTorch {dtype}"] = [*command, "--prompt", str(args.prompt)]
    if args.llama_python:
        command = [args.llama_python, str(args.llama_peer), "--serve", *shared, "--type", LLAMA_TYPES[chosen]]
        command += ["--prompt", str(args.prompt), "--dir", str(args.dir)]
        found[f"llama.cpp {LLAMA_TYPES[chosen]}"] = command
        found[f"llama.cpp {LLAMA_TYPES[chosen]} --no-repack"] = [*command, "--no-repack"]
    return found


def against(ours: Side, other: Side, rounds: int, measure: str) -> dict[str, Any]:
    """Our rounds and the other side's, by turns."""
    found: dict[str, Any] = {"tokens_per_s": [], "gb_per_s": [], "theirs": []}
    with other:
        for _ in range(rounds):
            mine = ours.round()
            found["theirs"].append(other.round()[measure])
            for name in ("tokens_per_s", "gb_per_s"):
                found[name].append(mine[name])
        found["prefill"] = other.ready.get("prefill_tokens_per_s_per_pass", 0.0)
    return found | {"peak_mib": round(mine["peak_mib"], 1)}


def show(report: dict[str, Any]) -> None:
    """One shape and format as a table."""
    from looplm_cli.render import print_table

    def cells(found: dict[str, float] | None, digits: int) -> list[str]:
        return [f"{found[which]:,.{digits}f}" for which in ("median", "min", "max")] if found else ["–"] * 3

    rows = [
        ["ours, tokens/s", *cells(report["tokens_per_s"], 2)],
        ["reading, GB/s", *cells(report["read_gb_per_s"], 1)],
        ["share of it", *cells(report["share_of_bandwidth"], 2)],
        *([f"{name}, tokens/s", *cells(found, 2)] for name, found in report["rivals"].items()),
        [f"ours / {report['best_torch'] or 'PyTorch'}", *cells(report["ratio_torch"], 2)],
        ["ours / llama.cpp", *cells(report["ratio_llama_cpp"], 2)],
        *(
            [f"prompt, {name}, tokens/s per pass", f"{rate:,.0f}", "", ""]
            for name, rate in report["prefill_tokens_per_s_per_pass"].items()
        ),
        ["our peak MiB", f"{report['peak_mib']:,.0f}", "", ""],
    ]
    title = "{config}, {format}: {threads} threads, {rounds} rounds, {processor}"
    print_table(["", "median", "min", "max"], rows, title.format(**report))


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def arguments(given: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--torch-python", default=sys.executable, metavar="PATH", help=TORCH_HINT)
    parser.add_argument(
        "--llama-python", default="", metavar="PATH", help="a python that has llama-cpp-python and gguf"
    )
    parser.add_argument("--config", action="append", choices=list(DECODE_CONFIGS), dest="configs")
    parser.add_argument("--format", action="append", choices=list(LLAMA_TYPES), dest="formats")
    parser.add_argument("--torch-dtypes", type=lambda text: [d for d in text.split(",") if d], default="fp32,bf16")
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--round-seconds", type=float, default=2.0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--dir", type=pathlib.Path, default=pathlib.Path("."), help="for llama.cpp's random models")
    parser.add_argument("--json", action="store_true", help="one object per shape and format, one per line")
    parser.add_argument("--our-side", type=pathlib.Path, default=OUR_SIDE, help=argparse.SUPPRESS)
    parser.add_argument(
        "--torch-peer", type=pathlib.Path, default=PEERS / "torch_looplm_decode.py", help=argparse.SUPPRESS
    )
    parser.add_argument(
        "--llama-peer", type=pathlib.Path, default=PEERS / "llama_cpp_decode.py", help=argparse.SUPPRESS
    )
    args = parser.parse_args(given)
    if args.rounds < 1:
        parser.error("--rounds must be at least 1")
    return args


def main(given: list[str] | None = None) -> int:
    args = arguments(given)
    for shape in args.configs or SHAPES:
        for chosen in args.formats or FORMATS:
            report = compare(shape, chosen, args)
            if args.json:
                print(json.dumps(report, allow_nan=False), flush=True)
            else:
                show(report)
    return 0


if __name__ == "__main__":
    sys.exit(report_errors(main))
