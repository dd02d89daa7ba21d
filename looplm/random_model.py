"""Model folders with random weights, of any size: written in a stream, so that memory stays small.

For measuring, and for trying what takes a folder of the published shape.  Nothing is learned here, and unlike the start
of a training (weights.py) nothing is chosen to make training work: the published scheme, N(0, initializer_range).
"""

import concurrent.futures
import contextlib
import itertools
import math
import pathlib
import shutil
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from . import __version__
from .atomic import Content, cannot_write, make_folder, replace_files
from .config import ModelConfig, model_config_from_json
from .errors import CheckpointError, UsageError
from .model_files import (
    CONFIG,
    INDEX,
    PROVENANCE,
    TOKENIZER,
    WEIGHTS,
    check_vocabulary,
    json_content,
    read_companions,
    read_json,
)
from .safetensors_file import ITEM_SIZES, STORABLE, encoded, streamed_content
from .text import Tokenizer
from .weights import Parameter, parameter_count, parameter_table

BLOCK = 1 << 18  # numbers made at a time: they stay in the cache until they are rounded and written


def write_random_model(
    folder: str | pathlib.Path,
    config_json: Mapping[str, Any],
    files: Mapping[str, bytes],
    *,
    seed: int,
    dtype: str,
    shard_size: int | None = None,
    threads: int = 1,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """Write a model folder with random weights, whole or not at all.

    Matrices and embeddings are N(0, initializer_range), norms 1, the gate's bias 0.  Every block of 2^18 numbers has a
    generator of its own, seeded by (seed, tensor, block): no two are alike, and the number of threads changes nothing.
    `config_json` is the content of `config.json`, `files` are written beside it (tokenizer, chat template).
    `shard_size` is the most bytes of one file; None writes a single one, as the published folders have.  `progress` is
    told how many numbers are written, of how many.

    Raises: CheckpointError if the folder exists, cannot be written, or would get a tokenizer with more tokens than the
    model; ConfigError for a config that is none; UsageError for an unknown dtype, or shards that a tensor does not fit.
    """
    if dtype not in STORABLE:
        raise UsageError(f"dtype {dtype!r} is not known", f"there are {', '.join(STORABLE)}")
    config = model_config_from_json(config_json, CONFIG)
    folder = pathlib.Path(folder)
    unfinished = folder.with_name(folder.name + ".unfinished")
    if folder.exists() or folder.is_symlink():
        raise CheckpointError(f"{folder} already exists", "name a new folder, or remove that one")
    if unfinished.exists():
        raise CheckpointError(f"{unfinished} is left from a writing that was cut short", "remove it")
    if TOKENIZER in files:
        check_vocabulary(folder / TOKENIZER, Tokenizer.from_json(files[TOKENIZER].decode(), TOKENIZER), config)
    spelled = [key for key in ("torch_dtype", "dtype") if key in config_json] or ["torch_dtype"]
    contents: dict[str, Content] = dict(files)
    with concurrent.futures.ThreadPoolExecutor(threads) as pool:
        stream = _Stream(config, seed, STORABLE[dtype], pool, threads, progress)
        contents |= _weight_files(parameter_table(config), STORABLE[dtype], shard_size, stream.stored)
        origin = {"looplm": __version__, "task": "text", "random_weights": True, "seed": seed}
        contents[PROVENANCE] = json_content(origin)
        # Last: only a folder that has it counts as a model.
        contents[CONFIG] = json_content({**config_json, **dict.fromkeys(spelled, dtype)})
        make_folder(unfinished)
        try:
            replace_files({unfinished / name: content for name, content in contents.items()})
            unfinished.rename(folder)
        except OSError as error:
            raise cannot_write(folder, error) from error
        finally:
            with contextlib.suppress(OSError):
                shutil.rmtree(unfinished)


def like_folder(folder: str | pathlib.Path) -> tuple[dict[str, Any], dict[str, bytes]]:
    """The content of a folder's `config.json`, and its tokenizer and chat template files as they are.

    The folder needs no weights.  Raises: CheckpointError if it has no config.json, or a file cannot be read.
    """
    folder = pathlib.Path(folder)
    return read_json(folder / CONFIG), read_companions(folder)


class _Stream:
    """The bytes of every tensor of a random model, made a little ahead of their writing."""

    def __init__(
        self,
        config: ModelConfig,
        seed: int,
        code: str,
        pool: concurrent.futures.Executor,
        threads: int,
        progress: Callable[[int, int], None],
    ) -> None:
        self._table = {parameter.name: (place, parameter) for place, parameter in enumerate(parameter_table(config))}
        self._std = np.float32(config.initializer_range)
        self._seed, self._code, self._progress = seed, code, progress
        self._pool, self._ahead = pool, 2 * threads
        self._written, self._total = 0, parameter_count(config)

    def stored(self, name: str) -> Iterator[memoryview]:
        """One tensor, block by block."""
        place, parameter = self._table[name]
        waiting: deque[concurrent.futures.Future[memoryview]] = deque()
        for block in range(math.ceil(parameter.size / BLOCK)):
            waiting.append(self._pool.submit(self._block, parameter, place, block))
            if len(waiting) > self._ahead:
                yield self._told(waiting.popleft().result())
        for future in waiting:
            yield self._told(future.result())

    def _block(self, parameter: Parameter, place: int, block: int) -> memoryview:
        size = min(BLOCK, parameter.size - block * BLOCK)
        if parameter.name.endswith("bias"):
            values = np.zeros(size, np.float32)
        elif len(parameter.shape) == 1:
            values = np.ones(size, np.float32)
        else:
            values = np.random.default_rng([self._seed, place, block]).standard_normal(size, np.float32)
            values *= self._std
        return encoded(values, self._code)

    def _told(self, part: memoryview) -> memoryview:
        self._written += part.nbytes // ITEM_SIZES[self._code]
        self._progress(self._written, self._total)
        return part


def _weight_files(
    table: tuple[Parameter, ...], code: str, shard_size: int | None, stored: Callable[[str], Iterator[memoryview]]
) -> dict[str, Content]:
    """One file, or shards of at most that size and their index, tensors in the order of the table."""
    if shard_size is None:
        return {WEIGHTS: _streamed(table, code, stored)}
    sizes = {p.name: p.size * ITEM_SIZES[code] for p in table}
    largest = max(table, key=lambda p: p.size)
    if sizes[largest.name] > shard_size:
        raise UsageError(
            f"a shard of {shard_size} bytes cannot hold {largest.name} of {sizes[largest.name]}",
            f"--shard-size {sizes[largest.name]} is the least",
        )
    shards: list[list[Parameter]] = [[]]
    for parameter in table:
        if sum(sizes[p.name] for p in shards[-1]) + sizes[parameter.name] > shard_size:
            shards.append([])
        shards[-1].append(parameter)
    names = [f"model-{number:05}-of-{len(shards):05}.safetensors" for number in range(1, len(shards) + 1)]
    where = dict(itertools.chain(*([(p.name, name) for p in shard] for shard, name in zip(shards, names, strict=True))))
    contents: dict[str, Content] = {
        name: _streamed(shard, code, stored) for name, shard in zip(names, shards, strict=True)
    }
    return {**contents, INDEX: json_content({"metadata": {"total_size": sum(sizes.values())}, "weight_map": where})}


def _streamed(table: Sequence[Parameter], code: str, stored: Callable[[str], Iterator[memoryview]]) -> Content:
    layout = {p.name: (code, p.shape) for p in table}
    return streamed_content(layout, lambda: itertools.chain.from_iterable(map(stored, layout)))
