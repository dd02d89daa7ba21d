"""Does a training hold as much memory as was predicted?

Starts a fresh process per size and way of recomputation.  It predicts its peak, then does two optimizer steps and an
evaluation of random tokens, and compares with the largest resident memory that the system saw.

    python benchmarks/memory.py                       presets tiny, small and medium, about a minute
    python benchmarks/memory.py tiny --threads 1 --set train.batch_size=32

The first row, a model of next to nothing, is what a process holds before any of it: looplm.memory.PROCESS.
Exit code 0 if every prediction is within 10 %.
"""

import argparse
import json
import pathlib
import subprocess
import sys
from typing import Any

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))
from benchmarks.side_by_side import peak_mib

MODES = ("none", "loop", "layer")
VOCABULARY = 512  # what a text of a megabyte gets
TOLERANCE = 0.1
MIB = 1 << 20

# Beside the process itself it takes 2 MiB, nearly all of it one chunk of logits.
LEAST = ("model.hidden_size=16", "model.num_attention_heads=1", "model.intermediate_size=16")
LEAST += ("model.num_hidden_layers=1", "train.batch_size=2", "train.seq_len=8")


def measure(preset: str, settings: list[str], threads: int, mode: str) -> dict[str, Any]:
    """Train and evaluate in this process: bytes by part as predicted, and what `peak` they became."""
    import numpy as np

    from looplm.analysis import evaluate
    from looplm.data import Batch
    from looplm.gradient import GradientWorkspace, gradient
    from looplm.kernels.product.select import PATHS
    from looplm.memory import predicted_peak
    from looplm.objectives import StageOne, log_prior
    from looplm.settings import parse_settings, run_config
    from looplm.training import Optimizer
    from looplm.weights import initialise

    config = run_config(preset, parse_settings(settings))
    model, how = config.model_config(vocab_size=VOCABULARY), config.train
    path = PATHS["panels"]
    parts = predicted_peak(model, how.batch_size, how.seq_len, threads, mode, path)
    weights = initialise(model, config.init, seed=0)
    optimizer = Optimizer(weights, how)
    workspace = GradientWorkspace(model, how.batch_size, how.seq_len, threads, mode, path)
    ids = np.random.default_rng(0).integers(0, VOCABULARY, (how.batch_size, how.seq_len))
    objective = StageOne(how.entropy_weight, log_prior(how.prior, model.total_ut_steps))
    for step in (1, 2):
        gradient(weights, workspace, ids, ids, objective)
        optimizer.update(workspace.total.contiguous(), step, how.learning_rate)
    evaluate(weights, [Batch(ids, ids)], threads=threads)
    return {"parts": parts, "peak": round(peak_mib() * MIB)}


def in_a_process(preset: str, settings: list[str], threads: int, mode: str) -> dict[str, Any]:
    """`measure` where nothing else has been."""
    options = [f"--set={setting}" for setting in settings]
    command = [sys.executable, __file__, preset, "--threads", str(threads), "--measure", mode, *options]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("presets", nargs="*", default=["tiny", "small", "medium"])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE")
    parser.add_argument("--measure", choices=MODES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(options.presets[0], options.set, options.threads, options.measure)))
        return 0

    in_a_process("nano", list(LEAST), options.threads, "none")  # compiles kernels, once on a machine
    worst = 0.0
    print(f"{'':8s} {'recompute':10s} {'predicted':>10s} {'measured':>10s} {'off by':>8s}")
    rows = [("nano", list(LEAST), "none", "least")]
    rows += [(preset, options.set, mode, preset) for preset in options.presets for mode in MODES]
    for preset, settings, mode, name in rows:
        found = in_a_process(preset, settings, options.threads, mode)
        predicted, peak = sum(found["parts"].values()), found["peak"]
        worst = max(worst, abs(predicted / peak - 1.0))
        sizes = f"{predicted / MIB:8.0f} M {peak / MIB:8.0f} M"
        print(f"{name:8s} {mode:10s} {sizes} {predicted / peak - 1.0:+8.1%}", flush=True)
    print("within 10 %" if worst <= TOLERANCE else f"OFF by {worst:.1%}")
    return 0 if worst <= TOLERANCE else 1


if __name__ == "__main__":
    sys.exit(main())
