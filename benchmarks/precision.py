"""Do bfloat16 products cost a training anything?  The same model, seeds and steps in both precisions, to the end.

    python benchmarks/precision.py CORPUS --out-dir runs/precision

Prints the held-out loss after the last loop, all held-out tokens, by seed and precision, and how far bfloat16 is from
float32.  Exit code 0 if that is within 0.5 % for every seed.  Runs that the folder holds already are gone on with, not
trained again; --precision trains one side only, so that two processes may share the work.
"""

import argparse
import json
import pathlib
import subprocess
import sys
from typing import Any

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))
from benchmarks.side_by_side import BenchmarkError, environment, report_errors

TOLERANCE = 0.005
PRECISIONS = ("fp32", "bf16")


def train(args: argparse.Namespace, precision: str, seed: int) -> None:
    """Trains that run, or what is left of it."""
    folder = args.out_dir / f"{precision}-{seed}"
    command = [sys.executable, "-m", "looplm_cli", "train"]
    if (folder / "state.safetensors").exists():
        command += ["--resume", str(folder)]
    else:
        command += [str(args.corpus), "--preset", args.preset, "--steps", str(args.steps), "--seed", str(seed)]
        command += ["--precision", precision, "--threads", str(args.threads), "--out-dir", str(folder)]
        command += ["--set", f"train.batch_size={args.batch_size}"]
    ended = subprocess.run(command, env=environment(), stderr=subprocess.PIPE, text=True)
    if ended.returncode != 0:
        lines = ended.stderr.strip().splitlines()
        raise BenchmarkError(f"{' '.join(command)} ended with {ended.returncode}", " ".join(lines[-2:]))


def final_loss(folder: pathlib.Path) -> float | None:
    """The loss after the last loop on all held-out tokens, nats; None if the run has not ended."""
    try:
        lines = (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return None
    entries: list[dict[str, Any]] = [json.loads(line) for line in lines]
    return next((entry["val_loss"][-1] for entry in reversed(entries) if entry.get("final")), None)


def main(given: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("corpus", type=pathlib.Path, metavar="CORPUS")
    parser.add_argument("--out-dir", type=pathlib.Path, required=True)
    parser.add_argument("--preset", default="tiny")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--precision", choices=PRECISIONS, help="train this side only")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args(given)
    found: dict[int, dict[str, float]] = {}
    for seed in range(args.seeds):
        for precision in PRECISIONS:
            folder = args.out_dir / f"{precision}-{seed}"
            if final_loss(folder) is None and args.precision in (None, precision):
                train(args, precision, seed)
            if (loss := final_loss(folder)) is not None:
                found.setdefault(seed, {})[precision] = loss
    both = {seed: by["bf16"] / by["fp32"] - 1 for seed, by in found.items() if len(by) == len(PRECISIONS)}
    passed = len(both) == args.seeds and all(abs(off) <= TOLERANCE for off in both.values())
    if args.json:
        print(json.dumps({"loss": found, "relative_difference": both, "tolerance": TOLERANCE, "pass": passed}))
        return 0 if passed else 1
    for seed, by in found.items():
        print(f"seed {seed}: " + ", ".join(f"{name} {loss:.4f}" for name, loss in by.items()), end="")
        print(f", bf16 off by {both[seed]:+.2%}" if seed in both else "")
    print(f"{'pass' if passed else 'FAIL'}: {len(both)} of {args.seeds} seeds compared, {TOLERANCE:.1%} allowed")
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(report_errors(main))
