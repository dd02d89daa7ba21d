"""Safetensors files: what the library and this project write, both read; every lie in a header is found and named."""

import errno
import json
import os
import pathlib
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import safetensors
import safetensors.numpy

from looplm.atomic import make_folder, replace_files
from looplm.errors import CheckpointError
from looplm.safetensors_file import TensorFile, round_to_bfloat16, tensors_content, widen_bfloat16, write_tensors

RNG = np.random.default_rng(5)
TENSORS = {
    "z.weight": RNG.standard_normal((3, 5), np.float32),
    "a.bias": RNG.standard_normal(7, np.float32),
    "empty": np.zeros((0, 4), np.float32),
}


def raw_file(path: pathlib.Path, header: Any, data: bytes = b"", length: int | None = None) -> pathlib.Path:
    """A file written byte by byte; `header` may be a text that is no JSON, `length` a lie."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)
    return path


def entry(begin: int, end: int, shape: list[Any] | None = None, dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": [(end - begin) // 4] if shape is None else shape, "data_offsets": [begin, end]}


# ---- reading and writing


def test_the_library_reads_what_we_write(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "x.safetensors"
    write_tensors(path, TENSORS, {"note": "ä"})
    loaded = safetensors.numpy.load_file(path)
    assert loaded.keys() == TENSORS.keys()
    for name, values in TENSORS.items():
        np.testing.assert_array_equal(loaded[name], values)
    with safetensors.safe_open(path, "np") as file:
        assert file.metadata() == {"format": "pt", "note": "ä"}


def test_the_library_reads_the_bfloat16_we_write(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "x.safetensors"
    write_tensors(path, TENSORS, dtype="bfloat16")
    for name, found in safetensors.deserialize(path.read_bytes()):
        assert found["dtype"] == "BF16"
        assert bytes(found["data"]) == round_to_bfloat16(TENSORS[name]).tobytes()


def test_we_read_what_the_library_writes(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "x.safetensors"
    stored = {**TENSORS, "half": np.array([1.5, -2.0], np.float16), "double": np.array([0.1], np.float64)}
    safetensors.numpy.save_file(stored, path, {"format": "pt"})
    file = TensorFile(path)
    assert file.metadata == {"format": "pt"}
    for name, values in stored.items():
        np.testing.assert_array_equal(file.floats(name), values.astype(np.float32))
        assert file.floats(name).dtype == np.float32
        assert file.floats(name).flags.aligned


def test_tensors_lie_in_the_order_given_and_start_on_a_cache_line(tmp_path: pathlib.Path) -> None:
    for extra in range(1, 70, 7):  # headers of many lengths
        path = tmp_path / "x.safetensors"
        write_tensors(path, TENSORS, {"note": "x" * extra})
        file = TensorFile(path)
        begins = [file.entries[name].begin for name in TENSORS]
        assert begins == sorted(begins)
        assert begins[0] % 64 == 0
        whole = file.run_of_floats(begins[0], 22)
        np.testing.assert_array_equal(whole, np.concatenate([v.reshape(-1) for v in TENSORS.values()]))


def test_a_mapped_tensor_is_not_copied_and_writing_to_it_does_not_reach_the_file(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "x.safetensors"
    write_tensors(path, TENSORS)
    before, file = path.read_bytes(), TensorFile(path)
    assert np.shares_memory(file.floats("z.weight"), file.floats("z.weight"))
    file.floats("z.weight")[...] = 0.0
    assert not file.floats("z.weight").any()
    assert path.read_bytes() == before


def test_float32_at_an_odd_address_is_copied_into_place(tmp_path: pathlib.Path) -> None:
    values = np.arange(3, dtype=np.float32)
    header = json.dumps({"flag": entry(0, 1, [1], "U8"), "x": entry(1, 13)}).encode()
    file = TensorFile(raw_file(tmp_path / "x", header, b"\1" + values.tobytes()))
    np.testing.assert_array_equal(file.floats("x"), values)
    assert file.floats("x").flags.aligned
    assert not file.stored("x").flags.aligned or file.entries["x"].begin % 4 == 0


def test_a_tensor_of_another_type_is_refused_by_name(tmp_path: pathlib.Path) -> None:
    safetensors.numpy.save_file({"ids": np.arange(4)}, tmp_path / "x")
    with pytest.raises(CheckpointError, match="tensor ids is stored as I64"):
        TensorFile(tmp_path / "x").floats("ids")


def test_changing_a_tensor_leaves_every_other_byte(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "x.safetensors"
    write_tensors(path, TENSORS, dtype="bfloat16")
    file, before = TensorFile(path), path.read_bytes()
    replace_files({path: file.with_changes({"a.bias": np.full(7, 0.5, np.float32)})})
    after, place = path.read_bytes(), file.entries["a.bias"]
    assert (TensorFile(path).floats("a.bias") == 0.5).all()
    assert after[: place.begin] == before[: place.begin]
    assert after[place.end :] == before[place.end :]


# ---- bfloat16


def test_every_bfloat16_survives_widening_and_rounding() -> None:
    bits = np.arange(1 << 16, dtype=np.uint16)
    wide = widen_bfloat16(bits)
    number = ~np.isnan(wide)
    np.testing.assert_array_equal(round_to_bfloat16(wide)[number], bits[number])
    assert np.isnan(widen_bfloat16(round_to_bfloat16(wide[~number]))).all()
    assert wide[0x3F80] == 1.0
    assert wide[0xC000] == -2.0
    out = np.empty(1 << 16, np.float32)
    assert widen_bfloat16(bits, out) is out
    np.testing.assert_array_equal(out.view(np.uint32), wide.view(np.uint32))


def test_rounding_to_bfloat16_is_to_the_nearest_ties_to_even() -> None:
    low = np.arange(0x3F00, 0x4100, dtype=np.uint16)
    below, above = (widen_bfloat16(low + n).astype(np.float64) for n in (0, 1))
    tie = ((below + above) / 2).astype(np.float32)  # exact: one bit more than bfloat16 has
    np.testing.assert_array_equal(round_to_bfloat16(tie), low + (low & 1))
    np.testing.assert_array_equal(round_to_bfloat16(np.nextafter(tie, np.float32(0))), low)
    np.testing.assert_array_equal(round_to_bfloat16(np.nextafter(tie, np.float32(9))), low + 1)
    signalling = np.array([0x7F800001, 0xFF800001], np.uint32).view(np.float32)  # payload only in the lower half
    assert np.isnan(widen_bfloat16(round_to_bfloat16(signalling))).all()
    assert np.isinf(widen_bfloat16(round_to_bfloat16(np.array([3.4e38], np.float32)))).all()


# ---- damaged files

DATA = np.arange(4, dtype=np.float32).tobytes()
A, B = entry(0, 8), entry(8, 16)
DAMAGED: dict[str, tuple[Any, bytes, int | None, str]] = {  # name -> header, data, length claimed, message
    "header longer than the file": ({"a": A, "b": B}, DATA, 5000, "header claims to be 5000 bytes long"),
    "header beyond the limit": ({"a": A, "b": B}, DATA, 1 << 62, "header claims to be"),
    "header shorter than it is": ({"a": A, "b": B}, DATA, 10, "header is not JSON"),
    "not JSON": (b'{"a": ', DATA, None, "header is not JSON"),
    "not UTF-8": (b'{"\xff": 1}', DATA, None, "header is not JSON"),
    "nested without end": (b"[" * 100_000, DATA, None, "header is not JSON"),
    "a list": ([1], b"", None, "header is list, not a table"),
    "metadata that is no text": ({"__metadata__": {"x": 1}, "a": entry(0, 16)}, DATA, None, "__metadata__ is not"),
    "no dtype": ({"a": {"shape": [4], "data_offsets": [0, 16]}}, DATA, None, "tensor a lacks dtype"),
    "an entry that is no table": ({"a": 3}, DATA, None, "tensor a lacks dtype"),
    "unknown dtype": ({"a": entry(0, 16, [4], "F33")}, DATA, None, "tensor a has the unknown dtype 'F33'"),
    "negative shape": ({"a": entry(0, 16, [-2, -2])}, DATA, None, r"tensor a has the impossible shape \[-2, -2\]"),
    "fractional shape": ({"a": entry(0, 16, [4.0])}, DATA, None, r"tensor a has the impossible shape \[4.0\]"),
    "shape is a number": ({"a": {"dtype": "F32", "shape": 4, "data_offsets": [0, 16]}}, DATA, None, "shape 4"),
    "negative offset": ({"a": entry(-4, 12)}, DATA, None, r"impossible data_offsets \[-4, 12\]"),
    "offsets backwards": ({"a": entry(16, 0, [4])}, DATA, None, r"impossible data_offsets \[16, 0\]"),
    "three offsets": (
        {"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 8, 16]}}, DATA, None, "impossible data_offsets"
    ),
    "shape larger than bytes": ({"a": entry(0, 16, [5])}, DATA, None, r"tensor a has 16 bytes, its shape \[5\]"),
    "shape beyond any memory": ({"a": entry(0, 16, [1 << 40, 1 << 40])}, DATA, None, "tensor a has 16 bytes"),
    "overlap": ({"a": entry(0, 12), "b": entry(8, 16)}, DATA, None, "tensor b overlaps tensor a"),
    "the same bytes twice": ({"a": entry(0, 16), "b": entry(0, 16)}, DATA, None, "tensor b overlaps tensor a"),
    "gap": ({"a": entry(0, 4), "b": B}, DATA, None, "4 bytes between tensor a and tensor b"),
    "gap at the start": ({"b": B}, DATA, None, "8 bytes between the header and tensor b"),
    "bytes after the end": ({"a": A}, DATA, None, "8 bytes too many after tensor a"),
    "truncated": ({"a": A, "b": B}, DATA[:-1], None, "ends inside tensor b"),
    "offsets out of the file": ({"a": A, "b": entry(1000, 1008)}, DATA, None, "ends inside tensor b"),
    "name twice": (b'{"a": %b, "a": %b}' % ((json.dumps(A).encode(),) * 2), DATA, None, "a is in the header twice"),
}  # fmt: skip
LIBRARY_IS_LENIENT = {"name twice"}


@pytest.mark.parametrize("case", DAMAGED)
def test_a_damaged_file_is_refused_in_two_lines(case: str, tmp_path: pathlib.Path) -> None:
    header, data, length, message = DAMAGED[case]
    path = raw_file(tmp_path / "x.safetensors", header, data, length)
    with pytest.raises(CheckpointError, match=message) as caught:
        TensorFile(path)
    assert str(path) in str(caught.value)
    assert caught.value.hint
    if case not in LIBRARY_IS_LENIENT:
        with pytest.raises(safetensors.SafetensorError):
            safetensors.deserialize(path.read_bytes())


def test_the_sound_file_beside_the_damaged_ones_is_read(tmp_path: pathlib.Path) -> None:
    for header in (
        {"a": A, "b": B},
        {"b": B, "a": A},
        {"a": entry(0, 16, [2, 2], "F32")},
        {"a": entry(0, 16, [2], "F64")},
    ):
        assert TensorFile(raw_file(tmp_path / "x", header, DATA)).entries.keys() == header.keys()


@pytest.mark.parametrize(("content", "message"), [(b"", "is empty"), (b"abc", "3 bytes long, too short")])
def test_a_file_too_short_for_a_header_is_refused(content: bytes, message: str, tmp_path: pathlib.Path) -> None:
    (tmp_path / "x").write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        TensorFile(tmp_path / "x")


def test_a_file_cut_anywhere_is_refused(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "x.safetensors"
    write_tensors(path, TENSORS)
    whole = path.read_bytes()
    for length in range(0, len(whole), 3):
        path.write_bytes(whole[:length])
        with pytest.raises(CheckpointError):
            TensorFile(path)


def test_what_is_no_file_is_refused(tmp_path: pathlib.Path) -> None:
    for path, message in ((tmp_path, "Is a directory"), (tmp_path / "none", "No such file")):
        with pytest.raises(CheckpointError, match=message):
            TensorFile(path)


# ---- writing that fails


@pytest.fixture
def no_room() -> Iterator[None]:
    """The system refuses to let a file grow beyond 64 KiB: a write stops half way, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def left_as_it_was(folder: pathlib.Path, names: set[str]) -> bool:
    return {path.name for path in folder.iterdir()} == names


def test_running_out_of_space_leaves_the_old_file(tmp_path: pathlib.Path, no_room: None) -> None:
    path = tmp_path / "x.safetensors"
    write_tensors(path, TENSORS)
    before = path.read_bytes()
    with pytest.raises(CheckpointError, match=f"cannot write {path}: File too large") as caught:
        write_tensors(path, {"large": np.zeros(1 << 16, np.float32)})
    assert caught.value.hint.startswith("free some space")
    assert path.read_bytes() == before
    assert left_as_it_was(tmp_path, {"x.safetensors"})


@pytest.mark.parametrize(("code", "cure"), [(errno.ENOSPC, "free some space"), (errno.EIO, "choose a folder")])
def test_a_failure_noticed_only_when_syncing_leaves_the_old_file(
    code: int, cure: str, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "x.safetensors"
    write_tensors(path, TENSORS)
    before = path.read_bytes()

    def fail(descriptor: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(CheckpointError, match=os.strerror(code)) as caught:
        write_tensors(path, {"other": TENSORS["a.bias"]})
    assert cure in caught.value.hint
    assert path.read_bytes() == before
    assert left_as_it_was(tmp_path, {"x.safetensors"})


def test_of_several_files_none_changes_when_the_last_does_not_fit(tmp_path: pathlib.Path, no_room: None) -> None:
    for name in ("a", "b"):
        (tmp_path / name).write_bytes(b"old")
    with pytest.raises(CheckpointError, match=r"cannot write .*b: "):
        replace_files({tmp_path / "a": b"new", tmp_path / "b": bytes(1 << 17)})
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes() == b"old"
    assert left_as_it_was(tmp_path, {"a", "b"})


def test_an_interrupt_while_writing_leaves_nothing_behind(tmp_path: pathlib.Path) -> None:
    def interrupted(file: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        replace_files({tmp_path / "a": b"new", tmp_path / "b": interrupted})
    assert left_as_it_was(tmp_path, set())


def test_a_place_that_cannot_be_written_is_refused(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(CheckpointError, match="Not a directory"):
        write_tensors(tmp_path / "file" / "x", TENSORS)
    with pytest.raises(CheckpointError, match=r"cannot write .*(File exists|Not a directory)"):
        make_folder(tmp_path / "file")

    def forbidden(*arguments: object, **options: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(pathlib.Path, "open", forbidden)
    with pytest.raises(CheckpointError, match="Permission denied") as caught:
        write_tensors(tmp_path / "x", TENSORS)
    assert "choose a folder you may write to" in caught.value.hint


WRITER = """
import itertools, sys
import numpy as np
from looplm.safetensors_file import write_tensors
for number in itertools.count():
    write_tensors(sys.argv[1], {"x": np.full(300_000, number, np.float32), "y": np.full(9, number, np.float32)})
    print(number, flush=True)
"""


def test_a_writer_killed_at_any_moment_leaves_a_whole_file(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "x.safetensors"
    for delay in (0.0, 0.003, 0.007, 0.011, 0.017):
        with subprocess.Popen([sys.executable, "-c", WRITER, str(path)], stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            written = [process.stdout.readline() for _ in range(2)]
            time.sleep(delay)
            process.send_signal(signal.SIGKILL)
        assert written == [b"0\n", b"1\n"]
        file = TensorFile(path)
        numbers = {*np.unique(file.floats("x")), *np.unique(file.floats("y"))}
        assert len(numbers) == 1
        assert max(numbers) >= 1


def test_an_in_place_writer_would_fail_that_test(tmp_path: pathlib.Path, no_room: None) -> None:
    """The check above is worth something only if a plain write does break the old file."""
    path = tmp_path / "x.safetensors"
    write_tensors(path, TENSORS)
    fill = tensors_content({"large": np.zeros(1 << 16, np.float32)})
    assert callable(fill)
    with pytest.raises(OSError, match="File too large"), path.open("wb") as file:
        fill(file)
    with pytest.raises(CheckpointError, match="ends inside tensor large"):
        TensorFile(path)
