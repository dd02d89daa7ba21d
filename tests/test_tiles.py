"""Special instructions, proved on processors that lack them: compiled for one that has them; tile registers (AMX) also
emulated, and trapped."""

import json
import os
import pathlib
import platform
import subprocess
import sys
from collections.abc import Iterator

import numpy as np
import pytest

import trapped_tiles
from looplm.kernels import amx, jit
from looplm.kernels.product.tiles import TileProducts, packed_tiles
from looplm.kernels.vectors import bfloat_bits

TRAPS = sys.platform == "linux" and platform.machine() == "x86_64"
EVERY_FEATURE = {"avx512f": True, "amx-tile": True, "amx-bf16": True, "amx-int8": True}
SAPPHIRE_RAPIDS = ("avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl", "avx512bf16", "avx512vnni", "amx-int8")
COMPILE = f"""
import trapped_tiles
trapped_tiles.pretend("sapphirerapids", {SAPPHIRE_RAPIDS!r})
from looplm.kernels.product import tiles
matrix, words, line = "f4[:,::1]", "u4[::1]", "f4[::1]"
either = f"{{matrix}}, u2[:,::1]"
tiles._multiply.compile(f"void({{matrix}}, {{either}}, {{words}}, {{words}}, {{line}}, {{words}})")
tiles._outer.compile(f"void({{', '.join([matrix] + [either] * 2 + ['bool'] + [words] * 3 + [line, words])}})")
for kernel in (tiles._multiply, tiles._outer):
    (assembly,) = kernel.inspect_asm().values()
    print(assembly, end="=====")
"""

COMPILE_PAIRS = f"""
import trapped_tiles
trapped_tiles.pretend("sapphirerapids", {SAPPHIRE_RAPIDS!r})
from looplm.kernels.product import pairs
matrix, words, line = "f4[:,::1]", "u4[::1]", "f4[::1]"
either = f"{{matrix}}, u2[:,::1]"
pairs._multiply.compile(f"void({{matrix}}, {{either}}, {{words}}, {{words}}, {{line}})")
pairs._outer.compile(f"void({{matrix}}, {{either}}, {{either}}, bool, {{words}}, {{words}}, {{line}})")
for kernel in (pairs._multiply, pairs._outer):
    (assembly,) = kernel.inspect_asm().values()
    print(assembly, end="=====")
"""


def in_a_process(folder: pathlib.Path, *arguments: str) -> str:
    """Standard output of a Python process that sees the tests' modules; nothing that it compiles is kept."""
    path = os.pathsep.join([str(pathlib.Path(__file__).parent), os.environ["PYTHONPATH"]])
    left_out = ("NUMBA_CPU_NAME", "NUMBA_CPU_FEATURES", "NUMBA_DISABLE_JIT", "NUMBA_BOUNDSCHECK")
    environment = {name: value for name, value in os.environ.items() if name not in left_out}
    done = subprocess.run(
        [sys.executable, *arguments],
        env=environment | {"PYTHONPATH": path, "NUMBA_CACHE_DIR": str(folder)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


# ---- emulated


def words_of(numbers: np.ndarray) -> np.ndarray:
    bits = bfloat_bits(numbers)
    return np.ascontiguousarray(bits[:, ::2] | (bits[:, 1::2] << np.uint32(16)))


@pytest.mark.kernels
@pytest.mark.plain_python
@pytest.mark.skipif(amx.NATIVE, reason="this processor has the instructions: their number must be a literal")
def test_emulated_instructions_do_what_the_manual_says() -> None:
    rng, state = np.random.default_rng(0), amx.tile_state()
    left, right = rng.integers(-9, 9, (2, 16, 32)).astype(np.float32)  # whole numbers: every sum is exact
    lines = words_of(np.ascontiguousarray(right.reshape(16, 16, 2).reshape(16, 32)))
    result = np.full((17, 40), np.float32(3.0))
    amx.begin_tiles(state)
    amx.load_tile(state, 0, result, 41, 40)
    amx.load_tile(state, 4, words_of(left), 0, 16)
    amx.load_tile(state, 6, lines, 0, 16)
    amx.dot_tiles(state, 0, 4, 6)
    amx.store_tile(state, 0, result, 41, 40)
    amx.end_tiles(state)
    expected = np.full((17, 40), 3.0)
    expected[1:, 1:17] += left @ right.reshape(16, 16, 2).transpose(0, 2, 1).reshape(32, 16)
    np.testing.assert_array_equal(result, expected)


@pytest.mark.skipif(amx.NATIVE, reason="this processor would end the process, as it should")
def test_emulated_registers_hold_nothing_outside_their_time() -> None:
    state, result = amx.tile_state(), np.full((16, 16), np.float32(3.0))
    amx.begin_tiles(state)
    amx.zero_tile(state, 0)
    amx.end_tiles(state)
    amx.store_tile(state, 0, result, 0, 16)
    np.testing.assert_array_equal(result, 3.0)


def test_packed_memory_starts_on_cache_lines() -> None:
    packed, products = packed_tiles((45, 77)), TileProducts([(45, 77)])
    for memory in (packed.plain, packed.transposed, products._rows, products._left, products._panels, products._edge):
        assert memory.ctypes.data % 64 == 0
    assert packed.plain.size == 3 * 32 * 32  # 77 columns in panels of 32, 45 rows in words of two, 16 a register
    assert packed.transposed.size == 2 * 48 * 32


# ---- the real instructions


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="the compiler is that of another processor")
def test_compiled_for_a_processor_with_tiles_they_are_used(tmp_path: pathlib.Path) -> None:
    multiply, accumulate, _ = in_a_process(tmp_path, "-c", COMPILE).split("=====")
    for assembly in (multiply, accumulate):
        for instruction in ("ldtilecfg", "tilezero", "tileloadd", "tdpbf16ps", "tilestored", "tilerelease"):
            assert f"\t{instruction}" in assembly, instruction


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="the compiler is that of another processor")
def test_compiled_for_a_processor_with_dot_products_they_are_used(tmp_path: pathlib.Path) -> None:
    multiply, accumulate, _ = in_a_process(tmp_path, "-c", COMPILE_PAIRS).split("=====")
    for assembly in (multiply, accumulate):
        assert "\tvdpbf16ps" in assembly


@pytest.mark.skipif(not TRAPS, reason="instructions are trapped on Linux on x86-64")
def test_machine_code_multiplies_right_on_trapped_registers(tmp_path: pathlib.Path) -> None:
    report = json.loads(in_a_process(tmp_path, trapped_tiles.__file__))
    assert report["failures"] == []
    assert report["comparisons"] == 27
    calls = report["instructions"]
    if calls:  # a processor with tile registers traps nothing
        assert calls.keys() == set(trapped_tiles.NAMES.values())
        assert calls["ldtilecfg"] == calls["tilerelease"] >= 27
        assert calls["tdpbf16ps"] > 1000


# ---- permission


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, bool]]:
    """Features that the processor is said to have; what was known of the real one is forgotten before and after."""
    found = dict(EVERY_FEATURE)
    monkeypatch.setattr(jit.llvmlite.binding, "get_host_cpu_features", lambda: found)
    monkeypatch.setattr(jit._CONFIG, "CPU_NAME", None)
    monkeypatch.setattr(jit._CONFIG, "CPU_FEATURES", None)
    monkeypatch.setattr(jit.sys, "platform", "linux")
    monkeypatch.setattr(jit.platform, "machine", lambda: "x86_64")
    for function in (jit.features, jit.tiles_refused):
        function.cache_clear()
    yield found
    for function in (jit.features, jit.tiles_refused):
        function.cache_clear()


class Kernel:
    """Stands for the C library: answers the request for tile registers, and remembers it."""

    def __init__(self, error: int) -> None:
        self.error, self.asked = error, []

    def __call__(self, name: None, use_errno: bool) -> "Kernel":
        return self

    def syscall(self, *numbers: object) -> int:
        self.asked.append([number.value for number in numbers])
        jit.ctypes.set_errno(self.error)
        return -1 if self.error else 0


def test_permission_is_asked_once_and_makes_tiles_usable(
    host: dict[str, bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel = Kernel(0)
    monkeypatch.setattr(jit.ctypes, "CDLL", kernel)
    assert (jit.tiles_refused(), jit.tiles_refused()) == ("", "")
    assert jit.features() == set(EVERY_FEATURE)
    assert kernel.asked == [[158, 0x1023, 18]]


@pytest.mark.parametrize(("error", "said"), [(1, "Operation not permitted"), (28, "No space left"), (22, "Invalid")])
def test_without_permission_there_are_no_tiles(
    error: int, said: str, host: dict[str, bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jit.ctypes, "CDLL", Kernel(error))
    assert jit.tiles_refused().startswith(f"Linux gives no tile registers: {said}")
    assert jit.features() == {"avx512f"}


def test_another_system_or_processor_is_not_asked(host: dict[str, bool], monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = Kernel(0)
    monkeypatch.setattr(jit.ctypes, "CDLL", kernel)
    monkeypatch.setattr(jit.sys, "platform", "darwin")
    assert "is not known to give tile registers" in jit.tiles_refused()
    jit.tiles_refused.cache_clear()
    host["amx-bf16"] = False
    assert jit.tiles_refused() == "the processor lacks amx-bf16"
    monkeypatch.setattr(jit._CONFIG, "CPU_FEATURES", "+avx2,+amx-tile,+amx-bf16")
    assert jit.features() == {"avx2"}  # whatever is claimed
    assert kernel.asked == []
