"""Our side of the training benchmarks: proved in a copy of the process that is timed, never less strictly."""

import os
import pathlib

import numpy as np
import pytest

from benchmarks import our_side
from benchmarks.side_by_side import CONFIGS, BenchmarkError, forget_peak, peak_mib
from looplm.kernels.product.select import PATHS


def test_what_proves_the_kernels_takes_no_memory_of_the_process_that_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a copy of it, where there are compiled kernels for both to load; all the same it must pass."""
    path, config, done = PATHS["panels"], our_side.model_config(CONFIGS["test"]), []
    monkeypatch.setattr(our_side, "require_contract", lambda threads: done.append(np.ones(1 << 25)))
    monkeypatch.setattr(our_side, "kernel_files", lambda: {"kernel.nbc": (1, 1)})
    forget_peak()
    before = peak_mib()
    our_side.require_all(1, path, config)
    assert not done
    assert peak_mib() < before + 200.0  # of the 256 that the copy took
    monkeypatch.setattr(our_side, "kernel_files", dict)  # each process compiles its own: this one is checked
    our_side.require_all(1, path, config)
    assert len(done) == 1


def test_a_check_that_fails_in_the_copy_fails_here(monkeypatch: pytest.MonkeyPatch) -> None:
    path, config = PATHS["panels"], our_side.model_config(CONFIGS["test"])

    def fails(threads: int) -> None:
        raise BenchmarkError("nothing is timed: seen", "cure")

    monkeypatch.setattr(our_side, "kernel_files", lambda: {"kernel.nbc": (1, 1)})
    monkeypatch.setattr(our_side, "require_contract", fails)
    with pytest.raises(BenchmarkError, match="nothing is timed: seen") as caught:
        our_side.require_all(1, path, config)
    assert caught.value.hint == "cure"
    monkeypatch.setattr(our_side, "require_contract", lambda threads: os._exit(0))
    with pytest.raises(BenchmarkError, match="ended without a verdict"):
        our_side.require_all(1, path, config)
    monkeypatch.setattr(our_side, "require_contract", lambda threads: None)
    monkeypatch.setattr(our_side, "require_products", lambda path, config: fails(1))
    with pytest.raises(BenchmarkError, match="nothing is timed: seen"):
        our_side.require_all(1, path, config)


def test_a_file_of_kernels_that_changed_is_noticed(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(our_side, "cache_folder", lambda: str(tmp_path))
    assert our_side.kernel_files() == {}
    kernel = tmp_path / "folder" / "kernel.nbc"
    kernel.parent.mkdir()
    kernel.write_bytes(b"code")
    before = our_side.kernel_files()
    kernel.write_bytes(b"other code")
    assert before.keys() == our_side.kernel_files().keys() == {str(kernel)}
    assert our_side.kernel_files() != before
