"""A safetensors file: mapped without a copy, written in the order given, every lie in its header found.

The `safetensors` library copies what it reads and has no bfloat16 for NumPy; a model that is mapped costs no memory of
its own and opens in a millisecond.  A mapping is private: writing to such an array never reaches the file.
"""

import dataclasses
import json
import math
import mmap
import pathlib
import shutil
from collections.abc import Callable, Iterable, Mapping
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from .arrays import Array, Floats
from .atomic import Content, replace_files
from .errors import CheckpointError

ITEM_SIZES = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0"), 1),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 2),
    **dict.fromkeys(("U32", "I32", "F32"), 4),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 8),
}
READABLE: dict[str, np.dtype[Any]] = {  # NumPy has no bfloat16: its bits
    "F32": np.dtype("<f4"),
    "BF16": np.dtype("<u2"),
    "F16": np.dtype("<f2"),
    "F64": np.dtype("<f8"),
}
STORABLE = {"float32": "F32", "bfloat16": "BF16"}

LONGEST_HEADER = 100_000_000  # the format's own limit
ALIGNMENT = 64  # the header is padded so that the data starts on a cache line
AGAIN = "the file is damaged or incomplete: copy or download it again"


@dataclasses.dataclass(frozen=True)
class Entry:
    """What the header says about one tensor; `begin` and `end` are bytes from the start of the file."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


class TensorFile:
    """A safetensors file, checked and mapped: `entries` by name, and the texts of its `metadata`.

    Raises: CheckpointError naming the file, the tensor and what to do, if the file is anything but sound.
    """

    def __init__(self, path: str | pathlib.Path) -> None:
        self.path = pathlib.Path(path)
        self._mapped = _map(self.path)
        self._bytes = np.frombuffer(self._mapped, np.uint8)
        self.size = len(self._bytes)
        self.entries, self.metadata = _read_header(self.path, self._bytes)

    def stored(self, name: str) -> Array:
        """A tensor as it lies in the file, not copied; bfloat16 as its bits, in uint16.

        Raises: CheckpointError if its type holds no weights.
        """
        entry = self.entries[name]
        if entry.dtype not in READABLE:
            raise CheckpointError(
                f"{self.path}: tensor {name} is stored as {entry.dtype}", f"weights are read from {', '.join(READABLE)}"
            )
        return self._bytes[entry.begin : entry.end].view(READABLE[entry.dtype]).reshape(entry.shape)

    def codes(self, name: str) -> Array:
        """The bytes of a tensor of U8 as they lie in the file, not copied."""
        entry = self.entries[name]
        return self._bytes[entry.begin : entry.end].reshape(entry.shape)

    def floats(self, name: str, out: Floats | None = None, rows: slice | None = None) -> Floats:
        """A tensor, or some rows of it, as float32: mapped if it is that, widened exactly or (from F64) rounded if not.

        With `out`, its values are written there.
        """
        stored = self.stored(name) if rows is None else self.stored(name)[rows]
        if stored.dtype == np.uint16:
            return widen_bfloat16(stored, out)
        if out is not None:
            out[...] = stored
            return out
        if stored.dtype == np.float32 and stored.flags.aligned:
            return stored
        return stored.astype(np.float32)

    def release(self, name: str, rows: slice | None = None) -> None:
        """Give back the memory that reading a tensor, or some rows of it, took: mapped pages count as the process's.

        Who looks at it again reads it from the file again, so nobody may have written to its array.  Nothing happens
        where the system has no such request.
        """
        entry = self.entries[name]
        begin, end = entry.begin, entry.end
        if rows is not None:
            row = (end - begin) // entry.shape[0]
            begin, end = begin + rows.start * row, begin + rows.stop * row
        begin += -begin % mmap.PAGESIZE  # whole pages: those at the ends are others' too
        end -= end % mmap.PAGESIZE
        if begin < end and hasattr(mmap, "MADV_DONTNEED"):
            self._mapped.madvise(mmap.MADV_DONTNEED, begin, end - begin)

    def run_of_floats(self, begin: int, count: int) -> Floats:
        """`count` float32 numbers from byte `begin` on, mapped: several tensors that lie side by side."""
        return self._bytes[begin : begin + 4 * count].view(np.float32)

    def with_changes(self, changes: Mapping[str, Floats]) -> Content:
        """The content of this file with some tensors replaced; every other byte stays what it is."""

        def fill(file: BinaryIO) -> None:
            with self.path.open("rb") as source:
                shutil.copyfileobj(source, file, 1 << 22)
            for name, values in changes.items():
                entry = self.entries[name]
                file.seek(entry.begin)
                file.write(encoded(values, entry.dtype))

        return fill


def write_tensors(
    path: str | pathlib.Path,
    tensors: Mapping[str, Floats],
    metadata: Mapping[str, str] | None = None,
    dtype: str = "float32",
) -> None:
    """Write a safetensors file, whole or not at all, tensors in the order given.

    Raises: CheckpointError if it cannot be written; a file that was there is then unchanged.
    """
    replace_files({pathlib.Path(path): tensors_content(tensors, metadata, dtype)})


def tensors_content(
    tensors: Mapping[str, Floats], metadata: Mapping[str, str] | None = None, dtype: str = "float32"
) -> Content:
    """The content of a safetensors file, as `replace_files` writes it; `dtype` is float32 or bfloat16 (rounded)."""
    code = STORABLE[dtype]
    layout = {name: (code, values.shape) for name, values in tensors.items()}
    return streamed_content(layout, lambda: (encoded(values, code) for values in tensors.values()), metadata)


def streamed_content(
    layout: Mapping[str, tuple[str, tuple[int, ...]]],
    pieces: Callable[[], Iterable[memoryview | Array]],
    metadata: Mapping[str, str] | None = None,
) -> Content:
    """The same from types (the header's words) and shapes, and the data in pieces, each made when it is written.

    Raises: ValueError while it is written, if the pieces are not as many bytes as the layout says.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **(metadata or {})}}
    offset = 0
    for name, (code, shape) in layout.items():
        end = offset + math.prod(shape) * ITEM_SIZES[code]
        header[name] = {"dtype": code, "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT)

    def fill(file: BinaryIO) -> None:
        file.write(len(text).to_bytes(8, "little") + text)
        written = sum(file.write(piece if isinstance(piece, memoryview) else piece.data) for piece in pieces())
        if written != offset:
            raise ValueError(f"{written} bytes written, the header says {offset}")

    return fill


def widen_bfloat16(bits: npt.NDArray[np.uint16], out: Floats | None = None) -> Floats:
    """The float32 numbers that bfloat16 bits stand for: their upper half."""
    wide = np.empty(bits.shape, np.float32) if out is None else out
    np.left_shift(bits, np.uint32(16), out=wide.view(np.uint32))
    return wide


def round_to_bfloat16(values: Floats) -> npt.NDArray[np.uint16]:
    """The bits of the nearest bfloat16 numbers, ties to even; NaN stays NaN."""
    bits = values.view(np.uint32)
    rounded = (bits >> np.uint32(16)) & np.uint32(1)
    rounded += np.uint32(0x7FFF)
    rounded += bits  # in place, and NaN apart: a fifth of the time that choosing number by number takes
    nan = np.isnan(values)
    if nan.any():
        rounded[nan] = bits[nan] | np.uint32(0x40_0000)
    rounded >>= np.uint32(16)
    return rounded.astype(np.uint16)


def encoded(values: Floats, code: str) -> memoryview:
    """A tensor as a file holds it; `code` is its type there, one of READABLE, to which it is rounded."""
    whole = np.ascontiguousarray(values, np.float32)
    return (round_to_bfloat16(whole) if code == "BF16" else whole.astype(READABLE[code], copy=False)).data


def _map(path: pathlib.Path) -> mmap.mmap:
    try:
        with path.open("rb") as file:
            # Private and writable: arrays of a read-only mapping would be another type to the compiler, and every
            # kernel would be compiled a second time for them.
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    except ValueError:
        raise CheckpointError(f"{path} is empty", AGAIN) from None
    except OSError as error:
        cure = "check the path and its permissions"
        raise CheckpointError(f"cannot read {path}: {error.strerror or error}", cure) from error


def _read_header(path: pathlib.Path, data: npt.NDArray[np.uint8]) -> tuple[dict[str, Entry], dict[str, str]]:
    if len(data) < 8:
        raise CheckpointError(f"{path} is {len(data)} bytes long, too short for a safetensors file", AGAIN)
    length = int.from_bytes(data[:8].tobytes(), "little")
    start = 8 + length
    if length > LONGEST_HEADER or start > len(data):
        raise CheckpointError(
            f"{path}: the header claims to be {length} bytes long, the file has {len(data)}",
            f"{AGAIN} (if it is a safetensors file at all)",
        )
    try:
        header = json.loads(data[8:start].tobytes().decode("utf-8"), object_pairs_hook=_without_duplicates)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: the header is not JSON: {error}", AGAIN) from error
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}", error.hint) from error
    if not isinstance(header, dict):
        raise CheckpointError(f"{path}: the header is {type(header).__name__}, not a table of tensors", AGAIN)
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise CheckpointError(f"{path}: __metadata__ is not a table of texts", AGAIN)
    entries = {name: _entry(f"{path}: tensor {name}", values, start) for name, values in header.items()}
    _check_layout(path, entries, start, len(data))
    return entries, metadata


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise CheckpointError(f"{twice} is in the header twice", "write the file anew with each name once")
    return found


def _entry(where: str, values: Any, start: int) -> Entry:
    if not isinstance(values, dict) or not {"dtype", "shape", "data_offsets"} <= values.keys():
        raise CheckpointError(f"{where} lacks dtype, shape or data_offsets", AGAIN)
    dtype, shape, offsets = values["dtype"], values["shape"], values["data_offsets"]
    if not isinstance(dtype, str) or dtype not in ITEM_SIZES:
        raise CheckpointError(f"{where} has the unknown dtype {dtype!r}", f"known: {', '.join(ITEM_SIZES)}")
    if not _are_sizes(shape):
        raise CheckpointError(f"{where} has the impossible shape {shape!r}", AGAIN)
    if not _are_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise CheckpointError(f"{where} has the impossible data_offsets {offsets!r}", AGAIN)
    needed, given = math.prod(shape) * ITEM_SIZES[dtype], offsets[1] - offsets[0]
    if needed != given:
        raise CheckpointError(f"{where} has {given} bytes, its shape {shape} of {dtype} needs {needed}", AGAIN)
    return Entry(dtype, tuple(shape), start + offsets[0], start + offsets[1])


def _are_sizes(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is int and value >= 0 for value in values)


def _check_layout(path: pathlib.Path, entries: Mapping[str, Entry], start: int, size: int) -> None:
    """Tensors must fill the data without overlap, gap or rest, as the format demands."""
    reached, before = start, "the header"
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].begin, item[1].end)):
        if entry.begin < reached:
            raise CheckpointError(f"{path}: tensor {name} overlaps {before}", AGAIN)
        if entry.end > size:
            raise CheckpointError(
                f"{path} ends inside tensor {name}: it has {size} bytes, the tensor goes on to byte {entry.end}", AGAIN
            )
        if entry.begin > reached:
            raise CheckpointError(f"{path}: {entry.begin - reached} bytes between {before} and tensor {name}", AGAIN)
        reached, before = entry.end, f"tensor {name}"
    if reached < size:
        raise CheckpointError(f"{path}: {size - reached} bytes too many after {before}", AGAIN)
