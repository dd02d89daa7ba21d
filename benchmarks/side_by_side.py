"""How rivals are timed: each in a process of its own, one at work at a time, by turns, and only neighbours compared.

A side is a program that prints one JSON object once it is warmed up, and one more for every line it reads; in between
it sleeps.  An object that holds `error` and `hint` ends the benchmark.  Shared machines drift by tens of percent within
minutes, so a ratio is taken between two rounds that followed each other, and given as median, min and max.

Standard library only: the peers' environments import this file too.
"""

import contextlib
import ctypes
import gc
import json
import os
import pathlib
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from typing import Any

ROOT = pathlib.Path(__file__).parents[1]
ROOMS = (".", "cli", "reference", "fixtures")  # where this tree's packages are
TORCH_HINT = "in any environment: pip install torch==2.13.0, then give --torch-python PATH to its python"

# width, layers, heads, feed-forward, vocabulary, positions, sequences
CONFIGS: dict[str, dict[str, int]] = {
    "tiny": {"d": 128, "L": 4, "heads": 4, "ff": 352, "vocab": 512, "S": 128, "B": 16},
    "small": {"d": 256, "L": 6, "heads": 8, "ff": 704, "vocab": 4096, "S": 256, "B": 8},
    "medium": {"d": 512, "L": 8, "heads": 8, "ff": 1408, "vocab": 8192, "S": 256, "B": 4},
    "test": {"d": 16, "L": 1, "heads": 2, "ff": 24, "vocab": 31, "S": 8, "B": 2},  # of the benchmarks themselves
}
SHOWN = ("tiny", "small", "medium")
DECODE_CONFIGS: dict[str, dict[str, int]] = {
    "ouro1.4b": {"d": 2048, "L": 24, "heads": 16, "ff": 5632, "vocab": 49152},
    "small512": {"d": 512, "L": 8, "heads": 8, "ff": 1408, "vocab": 8192},
    "small": {"d": 256, "L": 6, "heads": 8, "ff": 704, "vocab": 4096},
    "test": {"d": 16, "L": 1, "heads": 2, "ff": 24, "vocab": 32},
}
LOOPS = 4  # R

Answer = dict[str, Any]


class BenchmarkError(Exception):
    """Nothing was measured: `message` is what was seen, `hint` the cure."""

    def __init__(self, message: str, hint: str) -> None:
        super().__init__(message)
        self.hint = hint


def gemm_flops_per_token(*, d: int, L: int, ff: int, vocab: int, S: int, R: int = LOOPS, **_: int) -> float:
    """Useful floating-point operations of all matrix products, forward and backward; attention sees S/2 keys."""
    layer = 2 * (4 * d * d + 3 * d * ff) + 2 * 2 * d * (S / 2)
    return 3 * R * (L * layer + 2 * d * vocab)


def serve(prepare: Callable[[], tuple[Answer, Callable[[], Answer]]]) -> None:
    """Be a side.  `prepare` gives what to say when ready, and the function that answers each line read.

    What else is written to standard output on the way (compilers do) goes to standard error.
    """
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as channel:
        os.dup2(2, 1)
        try:
            ready, answer = prepare()
            print(json.dumps(ready), file=channel, flush=True)
            for _ in sys.stdin:
                print(json.dumps(answer()), file=channel, flush=True)
        except BenchmarkError as error:
            print(json.dumps({"error": str(error), "hint": error.hint}), file=channel, flush=True)
            sys.exit(1)


class Side:
    """A running side; `ready` is the first thing it said."""

    def __init__(self, name: str, command: Sequence[str]) -> None:
        self.name = name
        self._running = contextlib.ExitStack()
        try:
            place = self._running.enter_context(tempfile.TemporaryDirectory())
            self._errors = pathlib.Path(place, "stderr")
            with self._errors.open("w") as errors:
                self._process = subprocess.Popen(
                    command,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=errors,
                    text=True,
                    env=environment(),
                )
            self._running.enter_context(self._process)
            self._running.callback(self._process.kill)  # it has nothing to save
            self.ready = self._read()
        except OSError as error:
            self.close()
            raise BenchmarkError(f"{command[0]} cannot be run: {error.strerror}", TORCH_HINT) from error
        except BaseException:
            self.close()
            raise

    def round(self) -> Answer:
        """Let it work once.  Raises: BenchmarkError if it ends instead."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # what it said last tells why
            self._process.stdin.write("round\n")
            self._process.stdin.flush()
        return self._read()

    def _read(self) -> Answer:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self._process.wait()
            said = self._errors.read_text(encoding="utf-8", errors="replace").strip()
            last = said.splitlines()[-1] if said else f"exit code {self._process.returncode}"
            missing = "No module named 'torch'" in last
            raise BenchmarkError(f"{self.name} ended: {last}", TORCH_HINT if missing else "all it said:\n" + said)
        found: Answer = json.loads(line)
        if "error" in found:
            raise BenchmarkError(f"{self.name}: {found['error']}", found["hint"])
        return found

    def close(self) -> None:
        """End it, at once."""
        self._running.close()

    def __enter__(self) -> "Side":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def environment(**more: str) -> dict[str, str]:
    """For child processes: they import this tree, whatever is installed."""
    paths = [str(ROOT / room) for room in ROOMS]
    given = os.environ.get("PYTHONPATH")
    return {**os.environ, "PYTHONPATH": os.pathsep.join([*paths, *([given] if given else [])]), **more}


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, min and max, to four digits."""
    found = {"median": statistics.median(values), "min": min(values), "max": max(values)}
    return {name: float(f"{value:.4g}") for name, value in found.items()}


def paired(ours: Sequence[float], theirs: Sequence[float]) -> dict[str, float]:
    """Spread of the ratios ours / theirs, round by round."""
    return spread([a / b for a, b in zip(ours, theirs, strict=True)])


def forget_peak() -> None:
    """Give back what is free, and count the peak from here on, where the system can: for what came before timing."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
        pathlib.Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def peak_mib() -> float:
    """The most memory this process has had resident since it runs this program, or since `forget_peak`.

    What getrusage says would include the most its parent had before starting it.
    """
    try:
        lines = pathlib.Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) / 2**10
    except (OSError, StopIteration):
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # KiB, on macOS bytes
        return peak / (2**20 if sys.platform == "darwin" else 2**10)


def processor_name() -> str:
    """As the operating system calls it, with family and model, since virtual machines often hide the rest."""
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    pairs = (line.split(":", 1) for line in lines if ":" in line)
    said = {key.strip(): value.strip() for key, value in pairs}
    if "model name" not in said:
        return platform.processor() or platform.machine()
    return f"{said['model name']} (family {said.get('cpu family', '?')}, model {said.get('model', '?')})"


def report_errors(main: Callable[[], int]) -> int:
    """Run a benchmark; what stopped it goes to standard error in two lines, with exit code 1."""
    try:
        return main()
    except BenchmarkError as error:
        print(f"error: {error}\nhint: {error.hint}", file=sys.stderr)
        return 1
