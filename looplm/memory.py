"""How much memory a training will take, and how much there is; which recomputation fits.

The prediction asks the code that allocates: every buffer of a workspace is made as it will be, but without memory.
Knowingly not counted: the text's token ids (they are there, and so counted, before this is asked), and arrays of a few
numbers per position that live for a moment.
"""

import contextlib
import ctypes
import os
import pathlib
from collections.abc import Iterator
from typing import Any

import numpy as np

from .arrays import Array, aligned_empty, without_memory
from .config import ModelConfig
from .errors import ConfigError
from .gradient import Shard, packing_rooms
from .kernels.product.select import Path
from .model import LOGIT_CHUNK, Tape
from .settings import RECOMPUTE, TrainConfig
from .sizes import FLOAT_BYTES
from .threads import shards
from .weights import parameter_count

PROCESS = 148 << 20  # Python, NumPy and loaded kernels, as measured by benchmarks/memory.py (compiling them: 213 MiB)
SHARE = 0.8  # of the memory available that a training may take: other programs live too
GIB = 1 << 30


def predicted_peak(
    config: ModelConfig,
    batch: int,
    length: int,
    threads: int,
    recompute: str,
    path: Path,
    held: int = 0,
) -> dict[str, int]:
    """Bytes of a training by part; their sum is the most the process will hold.  `path` multiplies.

    `process` is what the process holds now, less `held` bytes of the other parts that exist already; but no less than
    a process takes that has done its first step.
    """
    weights = FLOAT_BYTES * parameter_count(config)
    with without_memory():
        parts = [part.stop - part.start for part in shards(batch, threads)]
        made = [Shard(config, rows, length, recompute, path) for rows in parts]
        tapes = [shard.tape for shard in made]
        activations = sum(FLOAT_BYTES * tape.activation_elements for tape in tapes)
        buffers = {
            "activations": activations,
            "gradients": nbytes([tape.memory for tape in tapes]) - activations,  # the part that lies behind them
            "layer outputs": nbytes([tape.outputs for tape in tapes]),
            "loop states": nbytes([[shard.dhidden, shard.tape.hidden] for shard in made]),
            "logits": nbytes([shard.logits for shard in made]),
        }
        scratch = nbytes(made) - sum(buffers.values())
        evaluation = sum(_evaluation(config, rows, length) for rows in parts)
        packed = nbytes(list(packing_rooms(config, path, recompute).values()))
    return {
        "process": max((resident() or 0) - held, PROCESS),
        "weights": weights,
        "moments": 2 * weights,
        "packed weights": packed,
        **buffers,
        "scratch": scratch,
        "evaluation": evaluation,
    }


def _evaluation(config: ModelConfig, batch: int, length: int) -> int:
    """One shard's pass over held-out text, while the workspace waits: tape with its states, and a chunk of logits."""
    hidden = aligned_empty((config.total_ut_steps, batch, length, config.hidden_size))
    logits = min(batch * length, max(1, LOGIT_CHUNK // config.vocab_size)) * config.vocab_size
    return nbytes(Tape(config, hidden)) + FLOAT_BYTES * logits


def nbytes(value: Any) -> int:
    """Bytes of all arrays that a value leads to; of those over the same memory, only the largest counts."""
    largest: dict[int, int] = {}
    for array in arrays_of(value):
        owner = id(array if array.base is None else array.base)
        largest[owner] = max(largest.get(owner, 0), array.nbytes)
    return sum(largest.values())


def arrays_of(value: Any) -> Iterator[Array]:
    """An array itself, or the arrays of a list's items or of an object's attributes, at any depth."""
    if isinstance(value, np.ndarray):
        yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from arrays_of(item)
    elif hasattr(value, "__dict__"):
        yield from arrays_of(list(vars(value).values()))


def choose_recompute(
    config: ModelConfig, train: TrainConfig, threads: int, path: Path, held: int = 0, sharing: int = 1
) -> str:
    """What `train.recompute` stands for on this machine now: none, loop or layer.

    `auto` is the first whose predicted peak fits into SHARE of the memory available; `none` where that is not known.
    `held` as in `predicted_peak`, `sharing` as in `available_memory`.

    Raises: ConfigError if `auto` finds none that fits.
    """
    if train.recompute != "auto":
        return train.recompute
    available = available_memory(sharing)
    peaks = {
        mode: sum(predicted_peak(config, train.batch_size, train.seq_len, threads, mode, path, held).values())
        for mode in RECOMPUTE
    }
    if (chosen := first_that_fits(peaks, available)) is None:
        assert available is not None
        raise ConfigError(
            f"training would take {min(peaks.values()) / GIB:.1f} GiB, more than {SHARE:.0%} of the "
            f"{available / GIB:.1f} GiB available",
            f"use a smaller train.batch_size (now {train.batch_size}) or train.seq_len (now {train.seq_len})",
        )
    return chosen


def first_that_fits(peaks: dict[str, int], available: int | None) -> str | None:
    """The first mode whose peak in bytes fits into SHARE of what is available; the first of all if that is unknown."""
    return next((mode for mode, peak in peaks.items() if available is None or peak <= SHARE * available), None)


def resident() -> int | None:
    """Bytes this process holds in memory; None where the system does not say (it is no Linux)."""
    try:
        pages = pathlib.Path("/proc/self/statm").read_text().split()[1]
    except OSError:
        return None
    return int(pages) * os.sysconf("SC_PAGE_SIZE")


def give_back() -> None:
    """Return to the system what this process holds in free pieces, where the allocator can.

    Reading a corpus of a megabyte and making its tokenizer leaves 39 MiB of them.
    """
    with contextlib.suppress(OSError, AttributeError):  # no such function but in the GNU library
        ctypes.CDLL(None).malloc_trim(0)


def available_memory(sharing: int = 1, root: str = "/") -> int | None:
    """Bytes this process could hold in all: what it holds, and what system and control groups would still give.

    None where the system does not say.  `sharing` processes, this one included, are to have equal parts of what is
    free.  `root` is where /proc and /sys begin.
    """
    held = resident()
    try:
        lines = pathlib.Path(root, "proc/meminfo").read_text().splitlines()
        free = [1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")]
    except (OSError, ValueError, IndexError):
        return None
    if held is None or not free:
        return None
    return held + max(0, min([*free, *_free_in_groups(root)])) // sharing


def _free_in_groups(root: str) -> Iterator[int]:
    """For every limit on this process, what is left of it; file contents that can be dropped count as free.

    Source: cgroup-v2 and cgroup-v1/memory in the kernel's documentation.
    """
    try:
        lines = pathlib.Path(root, "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, kinds, path = line.split(":", 2)
        if kinds and "memory" not in kinds.split(","):
            continue
        top, names = ("memory", _V1) if kinds else ("", _V2)
        base = pathlib.Path(root, "sys/fs/cgroup", top)
        group = base / path.lstrip("/")
        for folder in (group, *group.parents):
            yield from _free_in_group(folder, *names)
            if folder == base:
                break


_V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
_V2 = ("memory.max", "memory.current", "inactive_file")


def _free_in_group(folder: pathlib.Path, limit: str, usage: str, droppable: str) -> Iterator[int]:
    try:
        most, used = (int((folder / name).read_text()) for name in (limit, usage))
        stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        yield most - used + int(stat.get(droppable, 0))
    except (OSError, ValueError):  # no such group here, or its limit is `max`
        return
