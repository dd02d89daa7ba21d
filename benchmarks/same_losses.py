"""Do we train what PyTorch trains?  The float32 losses of the first steps from the same weights and batches.

    python benchmarks/same_losses.py --torch-python PATH

Both sides take the same constant learning rate, decay matrices only, and do not clip.  Exit code 0 if no loss of any
step differs by more than 1e-4 of itself.  For --torch-python see benchmarks/train.py.
"""

import argparse
import json
import pathlib
import sys
import tempfile
from typing import Any

import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))
from benchmarks.our_side import RandomBatches, initial_weights, train_config
from benchmarks.side_by_side import CONFIGS, ROOT, SHOWN, Side, report_errors
from looplm.training import Trainer

PEER = ROOT / "benchmarks" / "peers" / "torch_looplm_losses.py"
TOLERANCE = 1e-4


def relative_difference(ours: list[float], theirs: list[float]) -> list[float]:
    """By step; infinite where one of the two is no number."""
    expected = np.array(theirs)
    off = np.abs(np.array(ours) - expected) / np.abs(expected)
    return [float(value) for value in np.where(np.isfinite(off), off, np.inf)]


def our_losses(name: str, steps: int, threads: int, kernels: str) -> list[float]:
    source = RandomBatches.drawn(CONFIGS[name])
    trainer = Trainer(initial_weights(CONFIGS[name]), source, train_config(threads, "fp32", kernels))
    return [trainer.step().objective for _ in range(steps)]


def their_losses(name: str, steps: int, threads: int, python: str, peer: pathlib.Path) -> list[float]:
    """What PyTorch finds, from a file that holds where we start."""
    with tempfile.TemporaryDirectory() as place:
        start = pathlib.Path(place, "start.npz")
        arrays: dict[str, Any] = dict(initial_weights(CONFIGS[name]).tensors)
        arrays |= {"batches": RandomBatches.drawn(CONFIGS[name]).ids, "sizes": np.array(json.dumps(CONFIGS[name]))}
        np.savez(start, **arrays)
        command = [python, str(peer), str(start), "--steps", str(steps), "--threads", str(threads)]
        with Side("PyTorch", command) as side:
            losses: list[float] = side.round()["losses"]
            return losses


def main(given: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--torch-python", default=sys.executable, metavar="PATH", help="a python that has PyTorch")
    parser.add_argument("--config", choices=list(CONFIGS), default="tiny", metavar="|".join(SHOWN))
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--kernels", default="", help="which kernels our side takes")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--peer", type=pathlib.Path, default=PEER, help=argparse.SUPPRESS)
    args = parser.parse_args(given)
    theirs = their_losses(args.config, args.steps, args.threads, args.torch_python, args.peer)
    ours = our_losses(args.config, args.steps, args.threads, args.kernels)
    off = relative_difference(ours, theirs)
    worst = int(np.argmax(off))
    passed = off[worst] <= TOLERANCE
    if args.json:
        found = {"config": args.config, "steps": args.steps, "pass": passed, "step": worst + 1, "tolerance": TOLERANCE}
        print(json.dumps(found | {"max_relative_difference": off[worst] if np.isfinite(off[worst]) else None}))
    else:
        for step in (0, worst, args.steps - 1):
            print(f"{args.config}, step {step + 1}: ours {ours[step]:.7f}, PyTorch {theirs[step]:.7f}")
        print(f"{'pass' if passed else 'FAIL'}: relative difference at most {off[worst]:.2e}, {TOLERANCE:.0e} allowed")
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(report_errors(main))
