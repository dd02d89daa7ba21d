"""Is a training that was killed and resumed the same as one that was not?  Bit for bit, at any moment?

Trains a small model twice with the same settings, each time as a real `looplm train` process: once in peace, once
killed (SIGKILL, which no program can answer) at random moments and resumed after each.  Then compares every number in
the two logs that does not measure time, and the bytes of the two final models.

    python benchmarks/kill_resume.py                  twenty kills, about two minutes
    python benchmarks/kill_resume.py --kills 100 --seed 7

Most kills come at a random time after the first new step is logged, every fourth at a random time after the start of
the process, when it may still be importing, preparing text or reading its checkpoint.  Exit code 0 if all is equal.
"""

import argparse
import dataclasses
import json
import pathlib
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from typing import Any

TRAIN = (sys.executable, "-m", "looplm_cli", "train")
TIMING = ("seconds", "tokens_per_s")  # what differs from run to run

# Steps of a few milliseconds and a checkpoint every fifth: kills meet every part of the work.
SMALL = (
    *("--tokenizer", "bytes", "--threads", "2", "--quiet"),
    *("--set", "model.hidden_size=32", "--set", "model.num_attention_heads=2", "--set", "model.num_hidden_layers=1"),
    *("--set", "model.intermediate_size=48", "--set", "train.seq_len=16", "--set", "train.batch_size=4"),
    *("--set", "train.checkpoint_every=5", "--set", "train.eval_tokens=256"),
)


@dataclasses.dataclass(frozen=True)
class Kill:
    """One SIGKILL: steps in the log when the process began, and when it died."""

    began: int
    died: int
    had_settings: bool  # False: killed before there was anything to resume


def last_step(folder: pathlib.Path) -> int:
    """The number of the last whole step in a run's log; 0 if there is none."""
    lines = [line for line in read_log(folder) if line["kind"] == "step"]
    return lines[-1]["step"] if lines else 0


def read_log(folder: pathlib.Path) -> list[dict[str, Any]]:
    """The whole lines of a run's log, without what measures time."""
    path = folder / "log.jsonl"
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    lines = [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]
    return [{key: value for key, value in line.items() if key not in TIMING} for line in lines]


def command(folder: pathlib.Path, arguments: Sequence[str]) -> list[str]:
    """What trains into a folder: resuming if a run has begun there."""
    if (folder / "config.yaml").exists():
        return [*TRAIN, "--resume", str(folder), "--quiet"]
    return [*TRAIN, *arguments, "--out-dir", str(folder)]


def train(folder: pathlib.Path, arguments: Sequence[str]) -> float:
    """Train, or go on, to the end.  Returns the seconds it took."""
    began = time.monotonic()
    subprocess.run(command(folder, arguments), check=True, stdout=subprocess.DEVNULL)
    return time.monotonic() - began


def kill_at_random(
    folder: pathlib.Path, arguments: Sequence[str], kills: int, seconds: float, seed: int
) -> Iterator[Kill]:
    """Start training `kills` times and kill each process within `seconds` of its first step (or of its start).

    Stops early if a process ends before its kill; raises CalledProcessError if it does so with an error.
    """
    rng = random.Random(seed)
    for number in range(kills):
        step, asleep = last_step(folder), rng.uniform(0.0, seconds)
        process = subprocess.Popen(command(folder, arguments), stdout=subprocess.DEVNULL)
        try:
            size = _size(folder / "log.jsonl")
            if number % 4 == 3:
                asleep = rng.uniform(0.0, seconds + 2.0)
            else:
                while process.poll() is None and _size(folder / "log.jsonl") <= size:
                    # a resumed run first cuts its log: then the new, shorter one is what has to grow
                    size = min(size, _size(folder / "log.jsonl"))
                    time.sleep(0.001)
            time.sleep(asleep)
        finally:
            process.kill()
        code = process.wait()
        if code == 0:
            return
        if code != -9:
            raise subprocess.CalledProcessError(code, process.args)
        yield Kill(step, last_step(folder), (folder / "config.yaml").exists())


def _size(path: pathlib.Path) -> int:
    return path.stat().st_size if path.exists() else 0


def differences(folder: pathlib.Path, other: pathlib.Path) -> list[str]:
    """What two runs do not have in common, time aside; nothing if they are equal bit for bit."""
    found = []
    first, second = read_log(folder), read_log(other)
    if len(first) != len(second):
        found.append(f"log.jsonl has {len(first)} and {len(second)} lines")
    unequal = [i for i, (a, b) in enumerate(zip(first, second, strict=False), 1) if a != b]
    if unequal:
        found.append(f"{len(unequal)} lines of log.jsonl differ, the first is line {unequal[0]}")
    names = ("model/model.safetensors", "model/config.json", "model/tokenizer.json", "data/train.npy", "data/val.npy")
    found += [f"{name} differs" for name in names if (folder / name).read_bytes() != (other / name).read_bytes()]
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0, help="of the moments of the kills")
    parser.add_argument("--steps", type=int, default=0, help="of the training (default: 40 per kill)")
    options = parser.parse_args()
    arguments = [*SMALL, "--steps", str(options.steps or 40 * options.kills)]

    with tempfile.TemporaryDirectory() as place:
        calm, killed = pathlib.Path(place, "calm"), pathlib.Path(place, "killed")
        train(pathlib.Path(place, "warm"), [*SMALL, "--steps", "1"])  # compiles kernels, once on a machine
        print(f"unkilled: {train(calm, arguments):.1f} s for {last_step(calm)} steps")
        stepping = json.loads((calm / "log.jsonl").read_text().splitlines()[-2])["seconds"]
        done = 0
        for kill in kill_at_random(killed, arguments, options.kills, stepping / options.kills, options.seed):
            done += 1
            what = f"{kill.died} steps" if kill.had_settings else "nothing to resume yet"
            print(f"kill {done:3d}: started with {kill.began} steps in the log, killed with {what}", flush=True)
        train(killed, arguments)
        found = differences(calm, killed)
        losses = [line["val_loss"] for line in (read_log(calm)[-1], read_log(killed)[-1])]

    print(f"{done} kills; final held-out losses by loop:")
    for name, loss in zip(("unkilled", "killed"), losses, strict=True):
        print(f"  {name:8s} {loss}")
    for difference in found:
        print(f"DIFFERENT: {difference}")
    if done < options.kills:
        print(f"only {done} of {options.kills} kills came before the end: give more --steps")
    if not found:
        print("equal: every loss of every step, every evaluation, and the bytes of the final model")
    return 0 if not found and done == options.kills else 1


if __name__ == "__main__":
    sys.exit(main())
