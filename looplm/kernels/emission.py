# mypy: ignore-errors
"""Words for the instructions that kernels write: vectors, what lies at an address, products, asking for a line."""

import llvmlite.ir as ir

from .jit import features

# The processor rounds to bfloat16 and multiplies such pairs by itself; numbers below 2**-126 are 0 to it.
NATIVE_BFLOAT = "avx512bf16" in features()

_I8, _I32, _I64 = ir.IntType(8), ir.IntType(32), ir.IntType(64)


class Bfloat(ir.Type):
    """LLVM's type of that name, which llvmlite does not spell.  (Its own float types are one instance each.)"""

    def _to_string(self):
        return "bfloat"

    def __eq__(self, other):
        return isinstance(other, Bfloat)

    def __hash__(self):
        return hash(Bfloat)


def vector(kind, count):
    return ir.VectorType(kind, count)


def constant(kind, value):
    return ir.Constant(kind, [value] * kind.count)


def bfloat_bits_of(builder, floats):
    """A float32, or many -> 32 bits whose upper half is the nearest bfloat16, ties to even; a NaN stays one."""
    several = isinstance(floats.type, ir.VectorType)
    bits = builder.bitcast(floats, vector(_I32, floats.type.count) if several else _I32)

    def number(value):
        return constant(bits.type, value) if several else _I32(value)

    odd = builder.and_(builder.lshr(bits, number(16)), number(1))
    rounded = builder.add(bits, builder.add(odd, number(0x7FFF)))
    quiet = builder.or_(bits, number(0x400000))
    return builder.select(builder.fcmp_unordered("uno", floats, floats), quiet, rounded)


def load(builder, address, kind):
    """What lies at an address, aligned or not."""
    loaded = builder.load(builder.inttoptr(address, kind.as_pointer()))
    loaded.align = 1
    return loaded


def plus(builder, address, offset):
    return builder.add(address, _I64(offset)) if offset else address


def declared(builder, name, result, arguments):
    existing = builder.module.globals.get(name)
    return existing or ir.Function(builder.module, ir.FunctionType(result, arguments), name)


def fetch(builder, address, written=False):
    """Ask for the line there, to read it or to write it, too; an address of nothing is asked for in vain."""
    place = _I8.as_pointer()
    function = declared(builder, "llvm.prefetch.p0", ir.VoidType(), [place, _I32, _I32, _I32])
    use, level, data = _I32(1 if written else 0), _I32(3 if written else 2), _I32(1)  # 3 is the first level
    builder.call(function, [builder.inttoptr(address, place), use, level, data])


def multiply_add(builder, left, right, total):
    """One rounding where the processor has it, two where not: never the compiler's choice, nor is the order of sums."""
    kind, fused = total.type, features() & {"fma", "neon"}
    name = f"llvm.{'fma' if fused else 'fmuladd'}.v{kind.count}f32"  # an addition would be in its hands
    return builder.call(declared(builder, name, kind, [kind] * 3), [left, right, total])
