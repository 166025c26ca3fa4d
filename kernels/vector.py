"""Exponentials and reductions over a row, compiled by numba into vector instructions.

numba's own exp stays scalar without Intel's SVML, so 2^x is a polynomial here, its integer part set
by the exponent's bits. A NaN reaches the maximum of its row, and through it every result.

No result may depend on where its arrays lie in memory. Where a loop stores, LLVM asks at run time
how far apart its arrays are, and goes one element at a time if they are near. Therefore

    a loop that stores   has no fastmath flag: one element or eight, each rounds as IEEE says;
                         `multiply_add` names what may be fused
    a loop that sums     may `reassociate`, and stores nothing

numba's cache of `cpu.py` does not notice a change here: touch `cpu.py` after one.
"""

from __future__ import annotations

import math

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

REASSOCIATE = {"reassoc"}
LOG2E = math.log2(math.e)
F32 = np.float32
I32 = np.int32
# From here down 2^x is 0: its exponent's bits are.
LEAST = -127.0


def _pointer_to(kind):
    """Makes an address the pointer that `numba.carray` wants."""

    @intrinsic
    def pointer(context, address):
        def code(context, builder, signature, args):
            return builder.inttoptr(args[0], context.get_value_type(signature.return_type))

        return types.CPointer(kind)(types.intp), code

    return pointer


floats_at = _pointer_to(types.float32)
integers_at = _pointer_to(types.int64)


@intrinsic
def _bits_as_float(context, bits):
    def code(context, builder, signature, args):
        return builder.bitcast(args[0], ir.FloatType())

    return types.float32(types.int32), code


@intrinsic
def _truncate(context, x):
    # numba's own int32(x) goes through int64, which halves the lanes.
    def code(context, builder, signature, args):
        return builder.fptosi(args[0], ir.IntType(32))

    return types.int32(types.float32), code


def _llvm(name, arity):
    """The types and the code of an LLVM intrinsic that takes and returns float32 numbers."""

    def code(context, builder, signature, args):
        kind = ir.FloatType()
        shape = ir.FunctionType(kind, [kind] * arity)
        return builder.call(builder.module.declare_intrinsic(name, [kind], shape), args)

    return types.float32(*[types.float32] * arity), code


@intrinsic
def maximum(context, a, b):
    # numba's own max makes a loop that LLVM vectorises only under the assumption of no NaNs.
    return _llvm("llvm.maximum", 2)


@intrinsic
def multiply_add(context, a, b, c):
    # Fused on every machine that can, whether LLVM makes the loop of vectors or of numbers.
    return _llvm("llvm.fmuladd", 3)


@njit(inline="always")
def _exp2_of(t, n):
    """2^(t + n) for |t| <= 1/2 to 2.2e-7; 0 for n = -127."""
    r = F32(1.5403530393381609954e-4)
    r = multiply_add(r, t, F32(1.3333558146428443423e-3))
    r = multiply_add(r, t, F32(9.6181291076284771619e-3))
    r = multiply_add(r, t, F32(5.5504108664821579953e-2))
    r = multiply_add(r, t, F32(2.4022650695910071233e-1))
    r = multiply_add(r, t, F32(6.9314718055994530942e-1))
    r = multiply_add(r, t, F32(1.0))
    # The exponent's bits of a float32: bias 127, above 23 bits of the significand.
    return r * _bits_as_float((n + I32(127)) << I32(23))


@njit(inline="always")
def exp2(x):
    """2^x for x <= 0; 0 below -126.5, for -inf and for NaN."""
    # This comparison makes LEAST of a NaN; callers look for NaN in the maximum.
    y = x if x > F32(LEAST) else F32(LEAST)
    # Rounds to the nearest for y <= 0, since truncation goes towards 0.
    n = _truncate(y - F32(0.5))
    return _exp2_of(y - F32(n), n)


@njit(inline="always")
def exp(x):
    """e^x of a float64 x <= 0, as a float32, without rounding x itself to float32."""
    y = x * LOG2E
    y = y if y > LEAST else LEAST
    n = math.floor(y + 0.5)
    return _exp2_of(F32(y - n), _truncate(F32(n)))


@njit
def largest(x):
    # No fastmath: the maximum has to keep a NaN, by which its row is recognised.
    top = F32(-np.inf)
    for j in range(x.size):
        top = maximum(top, x[j])
    return top


@njit
def exponentials(x, top, scale, out):
    """out = 2^((x - top) scale), and its sum."""
    for j in range(x.size):
        out[j] = exp2((x[j] - top) * scale)
    return total_of(out)


@njit(fastmath=REASSOCIATE)
def total_of(x):
    total = F32(0.0)
    for j in range(x.size):
        total += x[j]
    return total


@njit(fastmath=REASSOCIATE)
def cross_of(p, y, y_top, x, top):
    """The sum of p ((y - y_top) - (x - top)); a class without mass adds nothing."""
    cross = F32(0.0)
    for j in range(x.size):
        gap = (y[j] - y_top) - (x[j] - top)
        cross += p[j] * gap if p[j] > 0 else F32(0.0)
    return cross


@njit(fastmath=REASSOCIATE)
def _total_below_of(x, top):
    total = F32(0.0)
    for j in range(x.size):
        total += x[j] - top
    return total


@njit
def total_below(x, top):
    """The sum of x - top."""
    # In pieces: one float32 sum of 20,000 large terms loses more than the bounds allow.
    total = 0.0
    for start in range(0, x.size, 1024):
        total += _total_below_of(x[start : start + 1024], top)
    return total
