"""What reading a model holds in memory at its peak: the weights as they are kept, whatever they were stored as.

Measured in fresh processes, on a model large enough to tell its weights from the interpreter's own noise.
"""

import dataclasses
import mmap
import pathlib
import shutil
import subprocess
import sys

import numpy as np
import pytest

from looplm.checkpoint import load_model
from looplm.config import model_config_to_json
from looplm.model_files import EMBEDDING, open_model
from looplm.quantization import quantize_matrix
from looplm.random_model import write_random_model
from looplm.safetensors_file import TensorFile, round_to_bfloat16, write_tensors
from looplm.stored import FORMATS, Format, read_stored
from model_folders import random_weights, save
from random_models import CONFIG

LARGE = dataclasses.replace(
    CONFIG, vocab_size=12_000, hidden_size=768, intermediate_size=2_304, head_dim=64, num_hidden_layers=3
)
SLACK = 18 << 20  # pieces of both threads, and what Python itself takes; a quarter of the smallest source

# What is measured is the last line; before it everything has been used once, on a small model.
SCRIPT = """
import pathlib, sys
from looplm.checkpoint import finite_warnings, load_model
from looplm.conversion import quantize_folder
from looplm.model_files import open_model
from looplm.safetensors_file import TensorFile
from looplm.stored import read_stored

def status(name):
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(name))

def run(folder, what):
    if what == "load":
        weights = load_model(folder).weights
        return weights, sum(tensor.nbytes for tensor in weights.tensors.values())
    if what == "quantize":
        return quantize_folder(open_model(folder), folder + "-small", "int4", threads=2), 0
    weights = read_stored(open_model(folder), what, threads=2)
    finite_warnings(weights.float_arrays)  # which looks at what is only mapped, as every command does
    return weights, weights.nbytes

small, large, what, release = sys.argv[1:]
if release == "no":
    TensorFile.release = lambda self, name, rows=None: None
run(small, what)
pathlib.Path("/proc/self/clear_refs").write_text("5")
before = status("VmRSS")
kept, size = run(large, what)
print(status("VmHWM") - before, size)
"""


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """NAME-DTYPE: a small and a large random model in both float types."""
    made = tmp_path_factory.mktemp("models")
    for dtype in ("bfloat16", "float32"):
        for name, config in (("small", CONFIG), ("large", LARGE)):
            write_random_model(made / f"{name}-{dtype}", model_config_to_json(config), {}, seed=0, dtype=dtype)
    return made


def growth(folders: pathlib.Path, dtype: str, what: str, release: bool = True) -> tuple[int, int]:
    """Bytes by which the peak grows, and of the weights that are there afterwards."""
    paths = [str(folders / f"{name}-{dtype}") for name in ("small", "large")]
    command = [sys.executable, "-c", SCRIPT, *paths, what, "yes" if release else "no"]
    found = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    for path in paths:
        shutil.rmtree(f"{path}-small", ignore_errors=True)
    grown, size = found.splitlines()[-1].split()
    return int(grown), int(size)


linux = pytest.mark.skipif(not pathlib.Path("/proc/self/clear_refs").exists(), reason="the peak is Linux's to tell")
READINGS = [
    ("bfloat16", "int8"),
    ("bfloat16", "int4"),
    ("bfloat16", "float32"),
    ("float32", "bfloat16"),
    ("bfloat16", "load"),
    ("bfloat16", "quantize"),
]


@linux
@pytest.mark.parametrize(("dtype", "what"), READINGS)
def test_a_model_takes_the_memory_of_what_it_becomes(folders: pathlib.Path, dtype: str, what: str) -> None:
    grown, size = growth(folders, dtype, what)
    assert size < grown + SLACK  # what is there is counted
    assert grown < size + SLACK


@linux
@pytest.mark.parametrize("what", ["int8", "load", "quantize"])
def test_pages_that_are_not_given_back_are_noticed(folders: pathlib.Path, what: str) -> None:
    grown, size = growth(folders, "bfloat16", what, release=False)
    assert grown > size + 2 * SLACK


def test_a_tensor_that_was_given_back_reads_as_before(tmp_path: pathlib.Path) -> None:
    tensors = {name: np.random.default_rng(7).random((3000, 5), np.float32) for name in "abc"}
    write_tensors(tmp_path / "x.safetensors", tensors)
    before = (tmp_path / "x.safetensors").read_bytes()
    file = TensorFile(tmp_path / "x.safetensors")
    assert file.entries["b"].end - file.entries["b"].begin > 10 * mmap.PAGESIZE
    file.stored("a")[-1] = file.stored("c")[0] = 9.0  # the process's own, on pages that b shares
    for rows in (None, slice(0, 3000), slice(100, 2000), slice(7, 7), slice(8, 9)):
        file.release("b", rows)
        np.testing.assert_array_equal(file.stored("b"), tensors["b"])
    assert (file.stored("a")[-1] == 9.0).all()
    assert (file.stored("c")[0] == 9.0).all()
    assert (tmp_path / "x.safetensors").read_bytes() == before


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("wanted", FORMATS)
def test_pieces_and_threads_give_the_matrix_converted_whole(
    wanted: Format, dtype: str, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = open_model(save(tmp_path, random_weights(), dtype=dtype))
    floats = {name: files.stored_in[name].floats(name) for name in read_stored(files).matrices}
    whole = {(name, fmt): quantize_matrix(values, fmt) for name, values in floats.items() for fmt in ("int8", "int4")}
    monkeypatch.setattr("looplm.quantization.ROWS_OF", 13)
    for threads in (1, 3):
        found = read_stored(files, wanted, threads)
        loaded = load_model(tmp_path).weights
        for name, matrix in found.matrices.items():
            values = floats[name]
            np.testing.assert_array_equal(loaded.tensors[name], values)
            if matrix.scales is not None:
                np.testing.assert_array_equal(matrix.scales, whole[name, matrix.format].scales)
                np.testing.assert_array_equal(matrix.codes, whole[name, matrix.format].codes)
            elif matrix.format == "float32":
                np.testing.assert_array_equal(matrix.codes, values)
            else:
                assert matrix.format == ("bfloat16" if name == EMBEDDING else wanted)
                np.testing.assert_array_equal(matrix.codes, round_to_bfloat16(values))
