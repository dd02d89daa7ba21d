"""The one way this project compiles: cached per kernel-source hash, and with NaN and infinity kept visible.

Numba stamps a cached kernel by its own file only, so an edited helper in another file would leave stale machine code.
A hash of all kernel sources in the cache folder's name rules that out; where no folder is writable, kernels are
compiled anew in every process.
"""

import ctypes
import functools
import hashlib
import os
import pathlib
import platform
import sys
import tempfile
from collections.abc import Callable
from typing import Any, ClassVar

import llvmlite.binding
import numba
import numba.core.config

# nnan and ninf are left out on purpose: with them a NaN test on a NaN array answers False.
# The default error model checks every division for zero, which stops vectorisation (SwiGLU ran 7 times slower).
_OPTIONS: dict[str, Any] = {
    "nogil": True,
    "error_model": "numpy",
    "fastmath": {"nsz", "arcp", "contract", "afn", "reassoc"},
}


_CONFIG: Any = numba.core.config

TILE_FEATURES = frozenset({"amx-tile", "amx-bf16"})
# arch_prctl on x86-64, its request for an extended state, and the state's number.  Source: Linux,
# Documentation/arch/x86/xstate.rst.
_ARCH_PRCTL, _REQUEST_STATE, _TILE_DATA = 158, 0x1023, 18


@functools.cache
def tiles_refused() -> str:
    """Why compiled code may not use tile registers (AMX); empty if it may.

    Linux gives a process these registers only if it asks for them; it is asked once, and only on a processor that has
    them: on another one the compiler itself ends the process.
    """
    has = llvmlite.binding.get_host_cpu_features()
    lacking = sorted(name for name in TILE_FEATURES if not has.get(name))
    if lacking:
        return f"the processor lacks {', '.join(lacking)}"
    if sys.platform != "linux" or platform.machine() != "x86_64":
        return f"{platform.system()} on {platform.machine()} is not known to give tile registers"
    request = (ctypes.c_long(number) for number in (_ARCH_PRCTL, _REQUEST_STATE, _TILE_DATA))
    if ctypes.CDLL(None, use_errno=True).syscall(*request):
        return f"Linux gives no tile registers: {os.strerror(ctypes.get_errno())}"
    return ""


def _use_whole_registers() -> None:
    """Compile loops for vectors of 64 bytes wherever the processor has them.

    For those of Intel, LLVM prefers half of that: right for the first of them, which ran slower with such vectors.
    """
    if _CONFIG.CPU_FEATURES is None and _CONFIG.CPU_NAME is None and _CONFIG.ENABLE_AVX:
        found = llvmlite.binding.get_host_cpu_features()
        if found.get("avx512vnni"):
            _CONFIG.CPU_FEATURES = f"{found.flatten()},-prefer-256-bit"


_use_whole_registers()


@functools.cache
def features() -> frozenset[str]:
    """Instruction sets that compiled code may use: the processor's, or what NUMBA_CPU_FEATURES leaves of them.

    Without those of tile registers where the system does not give them.
    """
    given = _CONFIG.CPU_FEATURES
    if given is None and _CONFIG.CPU_NAME is None:
        found = frozenset(name for name, has in llvmlite.binding.get_host_cpu_features().items() if has)
    else:
        found = frozenset(part[1:] for part in (given or "").split(",") if part.startswith("+"))
    if found >= TILE_FEATURES and not tiles_refused():
        return found
    return frozenset(name for name in found if not name.startswith("amx-"))


def _source_hash() -> str:
    digest = hashlib.sha256()
    if features() >= TILE_FEATURES:  # code with tile instructions is not for a process that may not use them
        digest.update(b"tiles")
    for path in sorted(pathlib.Path(__file__).parent.rglob("*.py")):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def _candidate_folders() -> list[pathlib.Path]:
    given = os.environ.get("NUMBA_CACHE_DIR")
    if given:
        return [pathlib.Path(given)]
    user = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return [pathlib.Path(user), pathlib.Path(tempfile.gettempdir()) / f"looplm-cache-{os.getuid()}"]


def _writable_cache() -> str | None:
    for base in _candidate_folders():
        folder = base / "looplm" / f"kernels-{_source_hash()}"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder):
                return str(folder)
        except OSError:
            continue
    return None


_CACHE = _writable_cache()


def cache_folder() -> str | None:
    """Where compiled kernels are kept, or None if no folder is writable and every process compiles anew."""
    return _CACHE


def kernels_are_cached() -> bool:
    """Whether some kernel has been compiled on this machine before (the first run is slower, and should say so)."""
    return _CACHE is not None and any(pathlib.Path(_CACHE).rglob("*.nbi"))


def processor() -> dict[str, Any]:
    """Name and instruction-set features of this processor, as the compiler sees them."""
    return {"name": _CONFIG.CPU_NAME or llvmlite.binding.get_host_cpu_name(), "features": sorted(features())}


def njit(function: Callable[..., Any] | None = None, *, inline: Any = "never", forceinline: bool = False) -> Any:
    """`numba.njit` with this project's flags; the cache folder is ours only while decorating.

    What sums floats and is called by other kernels has to be inlined by force: the compiler makes a second one inside
    its caller, may add in another order there, and which of them is run depends on whether the caller came from the
    cache.  `forceinline` compiles it by itself, too; `inline="always"` does not, and so saves a cold start that time.
    """

    def decorate(target: Callable[..., Any]) -> Any:
        before = _CONFIG.CACHE_DIR
        _CONFIG.CACHE_DIR = _CACHE or before
        try:
            return numba.njit(**_OPTIONS, cache=_CACHE is not None, inline=inline, forceinline=forceinline)(target)
        finally:
            _CONFIG.CACHE_DIR = before

    return decorate if function is None else decorate(function)


class Routine:
    """A function of int64 numbers (addresses among them), compiled once and called through its address.

    A caller's compilation contains that of everything it calls, again: a chain of large functions would be compiled
    over and over (70 seconds instead of 15 for the loop of decoding).
    """

    uncompiled: ClassVar[dict[int, Callable[..., Any]]] = {}  # what stands for addresses if nothing is compiled

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function

    @functools.cached_property
    def address(self) -> int:
        """Where it is, in this process."""
        if JIT_DISABLED:
            self.uncompiled[id(self)] = self.function
            return id(self)
        number = numba.types.int64
        signature = number(*[number] * self.function.__code__.co_argcount)
        before = _CONFIG.CACHE_DIR
        _CONFIG.CACHE_DIR = _CACHE or before
        try:
            options = {name: value for name, value in _OPTIONS.items() if name != "nogil"}
            compiled = numba.cfunc(signature, cache=_CACHE is not None, **options)(self.function)
        finally:
            _CONFIG.CACHE_DIR = before
        self._compiled = compiled  # its code lives as long as it
        return int(compiled.address or 0)

    @functools.cached_property
    def call(self) -> Callable[..., int]:
        """It, for Python: other threads run meanwhile."""
        number = ctypes.c_int64
        count = self.function.__code__.co_argcount
        return self.function if JIT_DISABLED else ctypes.CFUNCTYPE(number, *[number] * count)(self.address)


JIT_DISABLED = bool(_CONFIG.DISABLE_JIT)
