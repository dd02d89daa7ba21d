"""A model folder written once more with quantized weights: tensor by tensor, in memory for a few of its rows.

The new folder appears whole or not at all, and the old one is only read.
"""

import math
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from . import __version__
from .arrays import Array, Floats
from .atomic import Content, make_folder, replace_files
from .config import ModelConfig
from .errors import CheckpointError, UsageError
from .kernels.finite import count_not_finite
from .model_files import (
    CONFIG,
    EMBEDDING,
    GATE,
    PROVENANCE,
    WEIGHTS,
    ModelFiles,
    json_content,
    read_companions,
    read_json,
    stored_tensors,
)
from .quantization import CHUNK, KEY, ROWS, Quantization, Quantized, quantize_matrix, scale_name
from .safetensors_file import round_to_bfloat16, streamed_content
from .threads import run_all, shards
from .weights import Parameter, parameter_count, parameter_table


def quantize_folder(
    files: ModelFiles,
    out_dir: str | pathlib.Path,
    fmt: str,
    *,
    threads: int = 1,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> pathlib.Path:
    """Write a model in a quantized format into a new folder, in files of the same names but one file of weights.

    `progress(done, total)` is told the parameters written and to be written.

    Raises: UsageError if the model is quantized already or the folder exists; CheckpointError for weights that are not
    finite numbers, or if something cannot be written.  Then the folder does not exist.
    """
    folder, quantization = pathlib.Path(out_dir), Quantization(fmt)
    check_source(files)
    check_new_folder(folder)
    beside = read_companions(files.folder)
    contents: dict[pathlib.Path, Content] = {folder / name: text for name, text in beside.items()}
    contents[folder / WEIGHTS] = streamed_content(
        _layout(files.config, quantization), lambda: _pieces(files, quantization, threads, progress)
    )
    contents[folder / PROVENANCE] = json_content(_provenance(files, fmt))
    # Last: only a folder that has it counts as a model.
    contents[folder / CONFIG] = json_content(read_json(files.folder / CONFIG) | {KEY: quantization.json(files.config)})
    make_folder(folder)
    try:
        replace_files(contents)
    except BaseException:
        if not any(folder.iterdir()):
            folder.rmdir()
        raise
    return folder


def check_source(files: ModelFiles) -> None:
    """Raises: UsageError if the model is quantized already."""
    if files.quantization is not None:
        raise UsageError(
            f"{files.folder} is quantized already ({files.quantization.format})",
            "start from the model in floats: every rounding costs accuracy",
        )


def check_new_folder(folder: pathlib.Path) -> None:
    """Raises: UsageError if there is something already; what a killed conversion left behind does not count."""
    if folder.is_dir() and all(path.name.endswith(".unfinished") for path in folder.iterdir()):
        return
    if folder.exists():
        raise UsageError(f"{folder} exists already", "name a new folder: nothing is overwritten")


def _in_order(config: ModelConfig) -> list[Parameter]:
    """The gate, with its single bias, goes last: all codes then start on a cache line, whatever the width is."""
    return sorted(parameter_table(config), key=lambda parameter: parameter.name in GATE)


def _layout(config: ModelConfig, quantization: Quantization) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Type and shape of every tensor in the file, in order."""
    stored = stored_tensors(config, quantization)
    names = [name for p in _in_order(config) for name in (p.name, scale_name(p.name)) if name in stored]
    floats = {name: "BF16" if name == EMBEDDING else "F32" for name in names}
    return {name: (stored[name][0] or floats[name], stored[name][1]) for name in names}


def _pieces(
    files: ModelFiles, quantization: Quantization, threads: int, progress: Callable[[int, int], None]
) -> Iterator[Array]:
    """The data of all tensors in the order of the file; a matrix's scales wait until its codes are written."""
    done, total = 0, parameter_count(files.config)
    for parameter in _in_order(files.config):
        kind = quantization.format_of(parameter.name)
        scales = []
        for rows in _chunks(parameter.shape):
            values = _finite(files, parameter, rows)
            if kind is not None:
                for part in _quantized(values, kind, threads):
                    scales.append(part.scales)
                    yield part.codes
            else:
                yield round_to_bfloat16(values) if parameter.name == EMBEDDING else values
            files.stored_in[parameter.name].release(parameter.name, rows)
            done += values.size
            progress(done, total)
        files.stored_in[parameter.name].release(parameter.name)  # what lay between the pieces
        yield from scales


def _chunks(shape: tuple[int, ...]) -> Iterator[slice]:
    rows = max(1, CHUNK // math.prod(shape[1:]) // ROWS) * ROWS
    for begin in range(0, shape[0], rows):
        yield slice(begin, min(begin + rows, shape[0]))


def _finite(files: ModelFiles, parameter: Parameter, rows: slice) -> Floats:
    values = np.ascontiguousarray(files.stored_in[parameter.name].floats(parameter.name, rows=rows))
    wrong = count_not_finite(values)
    if wrong:
        raise CheckpointError(
            f"{parameter.name}: {wrong} weights in rows {rows.start + 1} to {rows.stop} are not finite numbers",
            "such a model cannot be quantized, and computes nothing: train or copy it again",
        )
    return values


def _quantized(values: Floats, kind: str, threads: int) -> list[Quantized]:
    def work(rows: slice) -> Quantized:
        return quantize_matrix(values[rows], kind)

    return run_all(work, shards(len(values), threads, ROWS))


def _provenance(files: ModelFiles, fmt: str) -> dict[str, Any]:
    """Where the floats come from, and how they were rounded."""
    made = {"format": fmt, "source": str(files.folder), "looplm": __version__}
    return {"looplm": __version__, **files.provenance, "quantized": made}
