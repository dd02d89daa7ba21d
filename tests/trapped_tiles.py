"""A processor's tile registers (AMX) in software: machine code meets an instruction that is not there, and goes on.

    python tests/trapped_tiles.py [--model]        as a process of its own; prints one JSON object

The tile path is compiled as for a processor that has these instructions and otherwise is this one.  Where one of them
stops the program (SIGILL), a handler reads it from memory, does its work on registers of its own and moves on to the
next: the very machine code runs, with its addresses, strides and register numbers.  What hardware would refuse ends
the process.  Products are checked, by two threads at a time, or every gradient of whole models.

Linux on x86-64.  Source: Intel's Architecture Instruction Set Extensions reference, chapter 3.
"""

import collections
import concurrent.futures
import ctypes
import importlib
import importlib.util
import json
import os
import signal
import sys
import threading
import traceback
import types
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from looplm_reference.contract import Row

# Where struct ucontext keeps the general registers, and in which order: as instructions number them, then the next one.
GENERAL, ORDER, NEXT = 40, (13, 14, 12, 11, 15, 10, 9, 8, 0, 1, 2, 3, 4, 5, 6, 7), 16
SA_SIGINFO, SA_NODEFER = 4, 0x40000000
CALLS: "collections.Counter[str]" = collections.Counter()
NAMES = {  # (prefix, opcode, is its operand in memory) -> name
    (0, 0x49, True): "ldtilecfg",
    (0, 0x49, False): "tilerelease",
    (3, 0x49, False): "tilezero",
    (3, 0x4B, True): "tileloadd",
    (2, 0x4B, True): "tilestored",
    (2, 0x5C, False): "tdpbf16ps",
}


class Instruction:
    """A tile instruction as it lies in memory: VEX prefix of three bytes, opcode, operands."""

    def __init__(self, at: int, general: Any) -> None:
        code = ctypes.string_at(at, 16)
        if code[0] != 0xC4 or code[1] & 31 != 2 or code[2] & 0x84:
            raise ValueError(f"no tile instruction: {code.hex()}")
        mode, self.reg, self.rm = code[4] >> 6, code[4] >> 3 & 7, code[4] & 7
        self.third = ~code[2] >> 3 & 7
        self.name = NAMES[code[2] & 3, code[3], mode != 3]
        self.address = self.stride = 0
        self.length = 5
        if mode == 3:
            return
        high_base, high_index = (~code[1] >> 5 & 1) << 3, (~code[1] >> 6 & 1) << 3
        base: int | None = self.rm | high_base
        relative = self.rm == 5 and mode == 0
        if self.rm == 4:
            scale, index, base = code[5] >> 6, code[5] >> 3 & 7 | high_index, code[5] & 7 | high_base
            self.stride = general[ORDER[index]] << scale if index != 4 else 0
            relative, self.length = False, 6
            if code[5] & 7 == 5 and mode == 0:
                base = None
        size = {0: 0, 1: 1, 2: 4}[mode] or (4 if relative or base is None else 0)
        self.address = int.from_bytes(code[self.length : self.length + size], "little", signed=True)
        self.length += size
        if relative:
            self.address += at + self.length
        elif base is not None:
            self.address += general[ORDER[base]]


class Registers(threading.local):
    """One thread's: nothing until they are configured."""

    def __init__(self) -> None:
        self.rows: list[int] = []
        self.tiles = np.full((8, 16, 16), 0xFFFFFFFF, np.uint32)

    def do(self, it: Instruction) -> None:
        CALLS[it.name] += 1
        if it.name == "ldtilecfg":
            given = ctypes.string_at(it.address, 64)
            assert given[0] == 1, "palette"
            assert not any(given[1:16] + given[32:48] + given[56:]), "reserved bytes"
            assert all(given[17:32:2][i] == 0 and given[16:32:2][i] == 64 for i in range(8)), "bytes of a row"
            self.rows = list(given[48:56])
            assert self.rows == [16] * 8, "rows"
            return
        assert self.rows, f"{it.name} before ldtilecfg"
        if it.name == "tilerelease":
            self.rows = []
        elif it.name == "tilezero":
            self.tiles[it.reg] = 0
        elif it.name == "tileloadd":
            for row, words in enumerate(self.tiles[it.reg]):
                words[:] = np.frombuffer(ctypes.string_at(it.address + row * it.stride, 64), np.uint32)
        elif it.name == "tilestored":
            for row, words in enumerate(self.tiles[it.reg]):
                ctypes.memmove(it.address + row * it.stride, words.tobytes(), 64)
        else:
            assert len({it.reg, it.rm, it.third}) == 3, "a register twice"
            left, right = self.tiles[it.rm], self.tiles[it.third]
            total = self.tiles[it.reg].view(np.float32)
            for shift in (16, 0):
                halves = [(((tile << shift) >> 16) << 16).astype(np.uint32).view(np.float32) for tile in (left, right)]
                total += halves[0] @ halves[1]


REGISTERS = Registers()


@ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p)
def on_illegal_instruction(number: int, info: int, context: int) -> None:
    try:
        general = (ctypes.c_int64 * 23).from_address(context + GENERAL)
        found = Instruction(general[NEXT], general)
        REGISTERS.do(found)
        general[NEXT] += found.length
    except BaseException:  # returning would meet the same instruction again, for ever
        traceback.print_exc()
        os._exit(3)


def trap() -> None:
    class Action(ctypes.Structure):
        _fields_ = (
            ("handler", type(on_illegal_instruction)),
            ("mask", ctypes.c_byte * 128),
            ("flags", ctypes.c_int),
            ("restorer", ctypes.c_void_p),
        )

    action = Action(on_illegal_instruction, (ctypes.c_byte * 128)(), SA_SIGINFO | SA_NODEFER, None)
    if ctypes.CDLL(None, use_errno=True).sigaction(int(signal.SIGILL), ctypes.byref(action), None):
        raise OSError(ctypes.get_errno(), "sigaction")


def pretend(name: str = "", more: tuple[str, ...] = ()) -> None:
    """Import the kernels as if this processor (or one of another name, with more features) had tile registers."""
    spec = importlib.util.find_spec("looplm.kernels")
    assert spec is not None
    assert spec.loader is not None
    kernels = sys.modules["looplm.kernels"] = importlib.util.module_from_spec(spec)
    jit = importlib.import_module("looplm.kernels.jit")  # before anything that asks it
    has = jit.features() | jit.TILE_FEATURES | set(more)
    jit._CONFIG.CPU_NAME = name or jit.processor()["name"]
    jit._CONFIG.CPU_FEATURES = ",".join(f"+{feature}" for feature in sorted(has))
    jit.tiles_refused = lambda: ""
    jit.features.cache_clear()
    spec.loader.exec_module(kernels)


def main() -> None:
    pretend()
    trap()

    from looplm.kernels import amx

    assert amx.NATIVE
    rows = list(model_rows() if "--model" in sys.argv else product_rows())
    failures = [f"{row.name}: {row.error:.2g}" for row in rows if not row.ok]
    print(json.dumps({"comparisons": len(rows), "failures": failures, "instructions": CALLS}))


def product_rows() -> Iterator["Row"]:
    from looplm.kernels.linear import linear_on
    from looplm.kernels.product.select import PATHS
    from looplm_reference import bfloat16, contract
    from test_products import LARGE, SHAPES

    forward, backward = linear_on(PATHS["tiles"])
    candidate = types.SimpleNamespace(linear_forward=forward, linear_backward=backward)

    def check(dims: dict[str, int]) -> list["Row"]:
        return list(contract.check(candidate, "linear", dims, truth=bfloat16.products))

    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        for rows in pool.map(check, (*LARGE, *SHAPES)):
            yield from rows


def model_rows() -> Iterator["Row"]:
    from looplm.kernels.product.select import PATHS
    from looplm_cli.engine_candidate import EngineCandidate
    from looplm_reference import bfloat16, judge

    engine = EngineCandidate(threads=2, path=PATHS["tiles"], recompute="layer")
    return judge.compare_gradients(engine, bfloat16.TOLERANCE, bfloat16.Bfloat16LoopLM)


if __name__ == "__main__":
    main()
