"""What a training is predicted to hold is what it holds, and `auto` chooses by it."""

import json
import pathlib
import platform
import subprocess
import sys
from typing import Any

import numpy as np
import pytest

from looplm import memory
from looplm.arrays import aligned_empty, without_memory
from looplm.errors import ConfigError
from looplm.gradient import GradientWorkspace
from looplm.kernels.product.select import PATHS, Path
from looplm.memory import (
    PROCESS,
    SHARE,
    arrays_of,
    available_memory,
    choose_recompute,
    first_that_fits,
    nbytes,
    predicted_peak,
    resident,
)
from looplm.settings import RECOMPUTE, TrainConfig
from looplm.weights import parameter_count
from random_models import CONFIG

BENCHMARK = pathlib.Path(__file__).parents[1] / "benchmarks" / "memory.py"
TRAIN = TrainConfig(batch_size=5, seq_len=9)
THREADS = 2
PATH = PATHS["panels"]


def peak_of(recompute: str) -> int:
    return sum(predicted_peak(CONFIG, TRAIN.batch_size, TRAIN.seq_len, THREADS, recompute, PATH).values())


# ---- the prediction


def test_arrays_without_memory_tell_their_size() -> None:
    with without_memory():
        large = aligned_empty((1 << 40, 1 << 10))
    assert large.nbytes == 1 << 52
    assert not large.flags.writeable
    assert aligned_empty((2, 3)).flags.writeable


def test_bytes_of_whatever_holds_arrays() -> None:
    class Holder:
        def __init__(self) -> None:
            self.first, self.number = np.zeros(3, np.float32), 7
            self.more = [self.first, (np.zeros(2, np.float64), "text")]

    holder = Holder()
    assert nbytes(holder) == nbytes([holder, holder]) == 12 + 16
    assert nbytes([np.zeros(1, np.int64), None]) == 8
    memory = np.zeros(9, np.float32)
    assert nbytes([memory[:2], memory[1:7], np.zeros(3, np.float32)]) == 24 + 12


@pytest.mark.parametrize("recompute", RECOMPUTE)
@pytest.mark.parametrize(("batch", "threads"), [(5, 1), (5, 2), (1, 2), (5, 8)])
def test_the_prediction_is_what_a_workspace_has(batch: int, threads: int, recompute: str) -> None:
    """Made for real, buffer by buffer; shards of different sizes, and more threads than rows."""
    workspace = GradientWorkspace(CONFIG, batch, 9, threads, recompute)
    parts = predicted_peak(CONFIG, batch, 9, threads, recompute, PATH)
    names = ("activations", "gradients", "layer outputs", "loop states", "logits", "scratch")
    buffers = {name: parts[name] for name in names}
    assert sum(buffers.values()) == nbytes(workspace.shards)
    kept = [array for shard in workspace.shards for array in arrays_of(shard.tape.activations)]
    assert sum(array.nbytes for array in kept) == pytest.approx(buffers["activations"], abs=64 * len(kept))
    assert buffers["activations"] >= sum(array.nbytes for array in kept)
    assert buffers["loop states"] == 2 * CONFIG.total_ut_steps * batch * 9 * CONFIG.hidden_size * 4
    assert min(buffers.values()) > 0
    whole = sum(part.contiguous().nbytes for part in workspace.gradients)
    assert parts["gradients"] < whole if recompute == "none" else parts["gradients"] == whole
    assert parts["weights"] == 4 * parameter_count(CONFIG)
    assert parts["moments"] == 2 * parts["weights"]
    assert parts["packed weights"] == nbytes(list(workspace.rooms.values())) > 0


@pytest.mark.parametrize("path", PATHS.values(), ids=lambda path: path.name)
def test_the_prediction_knows_what_a_path_multiplies_and_attends_with(path: Path) -> None:
    workspace = GradientWorkspace(CONFIG, 5, 9, THREADS, "none", path)
    parts = predicted_peak(CONFIG, 5, 9, THREADS, "none", path)
    names = ("activations", "gradients", "layer outputs", "loop states", "logits", "scratch")
    assert sum(parts[name] for name in names) == nbytes(workspace.shards)


def test_each_mode_keeps_less() -> None:
    assert peak_of("none") > peak_of("loop") > peak_of("layer")


def test_predicting_takes_no_memory() -> None:
    before = resident()
    assert before is not None
    assert sum(predicted_peak(CONFIG, 1 << 20, 1 << 10, 2, "none", PATH).values()) > 1 << 40
    assert resident() - before < 1 << 22  # a poor guess of the interpreter's own noise, far below the terabyte


def test_what_exists_already_is_not_counted_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "resident", lambda: PROCESS + 1000)
    assert predicted_peak(CONFIG, 2, 3, 1, "none", PATH)["process"] == PROCESS + 1000
    assert predicted_peak(CONFIG, 2, 3, 1, "none", PATH, held=600)["process"] == PROCESS + 400
    monkeypatch.setattr(memory, "resident", lambda: 1000)  # kernels are still to be loaded
    assert predicted_peak(CONFIG, 2, 3, 1, "none", PATH)["process"] == PROCESS
    monkeypatch.setattr(memory, "resident", lambda: None)
    assert predicted_peak(CONFIG, 2, 3, 1, "none", PATH)["process"] == PROCESS


def test_a_real_training_holds_what_was_predicted() -> None:
    """In fresh processes, the first only to compile kernels: that takes memory which later runs do not."""
    for size in ("train.batch_size=2", "train.batch_size=8"):
        command = [sys.executable, str(BENCHMARK), "nano", "--threads", "2", "--measure", "none", "--set", size]
        found = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
    assert sum(found["parts"].values()) > 1.4 * PROCESS
    assert sum(found["parts"].values()) == pytest.approx(found["peak"], rel=0.1)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only the GNU library can give memory back when asked")
def test_what_is_free_is_given_back() -> None:
    pieces = [bytearray(100_000) for _ in range(1000)]
    last = bytearray(100_000)  # behind them: as long as it lives, the pieces stay where they are
    before = resident()
    pieces.clear()
    memory.give_back()
    after = resident()
    assert before is not None
    assert after is not None
    assert after < before - 80_000_000
    assert len(last) == 100_000


# ---- the choice


def test_the_first_that_fits() -> None:
    peaks = {"none": 1000, "loop": 500, "layer": 400}
    fits = [first_that_fits(peaks, round(peak / SHARE) + extra) for peak in peaks.values() for extra in (1, -1)]
    assert fits == ["none", "loop", "loop", "layer", "layer", None]
    assert first_that_fits(peaks, None) == "none"


@pytest.mark.parametrize("recompute", RECOMPUTE)
def test_auto_takes_what_fits(recompute: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "available_memory", lambda sharing: round(peak_of(recompute) / SHARE) + 2000)
    monkeypatch.setattr(memory, "resident", lambda: None)
    assert choose_recompute(CONFIG, TRAIN, THREADS, PATH) == recompute


def test_auto_leaves_to_others_what_they_need(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "available_memory", lambda sharing: round(2.5 * peak_of("none") / SHARE) // sharing)
    assert choose_recompute(CONFIG, TRAIN, THREADS, PATH, sharing=2) == "none"
    with pytest.raises(ConfigError):
        choose_recompute(CONFIG, TRAIN, THREADS, PATH, sharing=3)


def test_auto_knows_what_is_held_already(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "resident", lambda: PROCESS + (1 << 20))
    monkeypatch.setattr(memory, "available_memory", lambda sharing: round((peak_of("none") - 1000) / SHARE))
    assert choose_recompute(CONFIG, TRAIN, THREADS, PATH) == "loop"
    assert choose_recompute(CONFIG, TRAIN, THREADS, PATH, held=2000) == "none"


def test_what_is_asked_for_is_not_questioned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "available_memory", lambda sharing: 0)
    for recompute in RECOMPUTE:
        assert choose_recompute(CONFIG, TrainConfig(recompute=recompute), THREADS, PATH) == recompute


def test_what_does_not_fit_is_refused_with_its_cure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "available_memory", lambda sharing: 2 << 30)
    with pytest.raises(ConfigError) as caught:
        choose_recompute(CONFIG, TrainConfig(batch_size=1 << 16, seq_len=512), 1, PATH)
    least = min(sum(predicted_peak(CONFIG, 1 << 16, 512, 1, mode, PATH).values()) for mode in RECOMPUTE)
    assert f"would take {least / (1 << 30):.1f} GiB, more than 80% of the 2.0 GiB available" in str(caught.value)
    assert caught.value.hint == "use a smaller train.batch_size (now 65536) or train.seq_len (now 512)"


# ---- what there is


def system(root: pathlib.Path, files: dict[str, Any]) -> str:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(str(text))
    return str(root)


MEMINFO = {"proc/meminfo": "MemTotal: 900 kB\nMemFree: 1 kB\nMemAvailable:     800 kB\n"}


def group(folder: str, most: object, used: int, droppable: int, names: tuple[str, str, str]) -> dict[str, Any]:
    limit, usage, stat = (f"sys/fs/cgroup/{folder}/{name}" for name in (*names[:2], "memory.stat"))
    return {limit: most, usage: used, stat: f"anon 7\ninactive_file 3\n{names[2]} {droppable}\n"}


V2 = ("memory.max", "memory.current", "inactive_file")
V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")


@pytest.mark.parametrize(
    ("files", "free"),
    [
        ({}, 800 * 1024),
        ({"proc/self/cgroup": "0::/a/b\n"}, 800 * 1024),
        ({"proc/self/cgroup": "0::/a/b\n", **group("a/b", 5000, 2000, 500, V2)}, 3500),
        ({"proc/self/cgroup": "0::/a/b\n", **group("a/b", "max", 2000, 500, V2)}, 800 * 1024),
        ({"proc/self/cgroup": "0::/a/b\n", **group("a", 5000, 2000, 0, V2), **group("a/b", "max", 1, 0, V2)}, 3000),
        ({"proc/self/cgroup": "0::/\n", **group("", 5000, 2000, 0, V2)}, 3000),
        ({"proc/self/cgroup": "0::/\n", **group("", 5000, 6000, 0, V2)}, 0),
        ({"proc/self/cgroup": "0::/\n", **group("", 5000, 2000, 0, V2), "sys/fs/cgroup/memory.stat": "?"}, 800 * 1024),
        ({"proc/self/cgroup": "5:cpu:/a\n4:memory:/a\n0::/\n", **group("memory/a", 5000, 2000, 500, V1)}, 3500),
        ({"proc/self/cgroup": "5:cpu,memory:/a\n", **group("memory", 2**63 - 4096, 2000, 500, V1)}, 800 * 1024),
        ({"proc/self/cgroup": "5:cpu:/a\n", **group("memory/a", 5000, 2000, 500, V1)}, 800 * 1024),
    ],
)
def test_the_tightest_limit_counts(
    files: dict[str, Any], free: int, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "resident", lambda: 10_000)
    root = system(tmp_path, {**MEMINFO, **files})
    assert available_memory(root=root) == 10_000 + free
    assert available_memory(sharing=3, root=root) == 10_000 + free // 3


@pytest.mark.parametrize("text", [None, "", "MemTotal: 900 kB\n", "MemAvailable:\n", "MemAvailable: many kB\n"])
def test_a_system_that_does_not_say(text: str | None, tmp_path: pathlib.Path) -> None:
    assert available_memory(root=system(tmp_path, {} if text is None else {"proc/meminfo": text})) is None


def test_this_process_holds_something() -> None:
    held, available = resident(), available_memory()
    assert held is not None
    assert available is not None
    assert 1 << 24 < held < available
