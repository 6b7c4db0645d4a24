"""The decode kernel of section 3.2 for a CPU, compiled by numba: gate, threshold, surviving rows."""

import math

import numpy as np
from llvmlite import ir
from numba import carray, cfunc, from_dtype, njit, types
from numba.core import cgutils
from numba.extending import intrinsic

LANES = 8  # weight rows in flight
BLOCK = 256  # columns of eight rows that stay in the L1 cache while every token of a batch uses them
ACTIVATIONS = {"silu": 0, "gelu": 1, "gelu_tanh": 2, "relu": 3}

# What a call passes, as int64: CALL changes from call to call, the rest belongs to the shapes and the thread.
# Addresses are of contiguous arrays; a step of 0 repeats one element or row. A chunk is `rows` neurons.
CALL = (
    *("taken", "finished"),  # chunks so far, counted by all threads; zero at the start
    *("x", "gate", "up", "down", "y"),  # float32 [tokens, d]; weights [m, d] three times; float32 [tokens, d]
    "activation",  # number in ACTIVATIONS
    *("threshold", "threshold_step"),  # float32 [m] and 1, or [] and 0
    *("mask", "mask_step"),  # bytes [tokens, m] and m, or [m] and 0; address 0 for none
)
ARGUMENTS = (
    *CALL,
    "counters",  # the address of `taken`
    *("tokens", "m", "d", "chunks", "rows"),
    "zeros",  # a row of weights [d], all zero
    *("survivors", "kept", "z"),  # scratch: int64 [m], bytes [m, tokens], float32 [m, tokens]
    *("numbers", "sums"),  # int64 [chunks, 2, LANES], float32 [chunks, 2, tokens, LANES], a cache line apart
    "partial",  # float32 [chunks, tokens, d]
)
_RECORD = from_dtype(np.dtype([(name, np.int64) for name in ARGUMENTS]))

# Sums may be reordered, so that they vectorise; NaN and Inf keep their meaning.
_OPTIONS = {"fastmath": {"reassoc", "contract", "nsz"}, "error_model": "numpy"}


def _pointer(element):
    @intrinsic
    def at(typingctx, address):
        def codegen(context, builder, signature, args):
            return builder.inttoptr(args[0], context.get_value_type(signature.return_type))

        return types.CPointer(element)(types.int64), codegen

    return at


_f32, _bf16, _i64, _u8 = map(_pointer, (types.float32, types.uint16, types.int64, types.uint8))


@intrinsic
def _step(typingctx, pointer, elements):
    """The pointer moved by so many elements."""

    def codegen(context, builder, signature, args):
        size = ir.Constant(ir.IntType(64), pointer.dtype.bitwidth // 8)
        return cgutils.pointer_add(builder, args[0], builder.mul(args[1], size))

    return pointer(pointer, types.int64), codegen


@intrinsic
def _wide(typingctx, value):
    """A weight in float32: itself, or the bfloat16 whose bits a uint16 holds, the upper half of a float32."""

    def codegen(context, builder, signature, args):
        if value == types.float32:
            return args[0]
        bits = builder.zext(args[0], ir.IntType(32))
        return builder.bitcast(builder.shl(bits, ir.Constant(ir.IntType(32), 16)), ir.FloatType())

    return types.float32(value), codegen


@intrinsic
def _fetch_add(typingctx, pointer, i):
    """Element i of an int64 array before one is added to it, as if one thread came after another."""

    def codegen(context, builder, signature, args):
        place = cgutils.pointer_add(builder, args[0], builder.mul(args[1], ir.Constant(ir.IntType(64), 8)))
        return builder.atomic_rmw("add", place, ir.Constant(ir.IntType(64), 1), "acq_rel")

    return types.int64(pointer, types.int64), codegen


@njit(**_OPTIONS)
def _activate(z, kind):
    """act(z) in float32; NaN stays NaN."""
    one = np.float32(1)
    if kind == 0:
        return z / (one + math.exp(-z))
    if kind == 1:
        return np.float32(0.5) * z * (one + math.erf(z * np.float32(0.7071067811865476)))
    if kind == 2:
        u = np.float32(0.7978845608028654) * (z + np.float32(0.044715) * z * z * z)
        return z / (one + math.exp(np.float32(-2) * u))
    return np.float32(0) if z <= 0 else z


@njit(**_OPTIONS)
def _row(base, zeros, i, offset, d):
    """Row i of weights [m, d] from column `offset`; zeros for i < 0, which fills a group of LANES up."""
    return _step(zeros, offset) if i < 0 else _step(base, i * d + offset)


@njit(**_OPTIONS)
def _rows(base, zeros, numbers, offset, d):
    """The LANES rows of these numbers."""
    return (
        _row(base, zeros, numbers[0], offset, d),
        _row(base, zeros, numbers[1], offset, d),
        _row(base, zeros, numbers[2], offset, d),
        _row(base, zeros, numbers[3], offset, d),
        _row(base, zeros, numbers[4], offset, d),
        _row(base, zeros, numbers[5], offset, d),
        _row(base, zeros, numbers[6], offset, d),
        _row(base, zeros, numbers[7], offset, d),
    )


@njit(**_OPTIONS)
def _add_dots(rows, x, n, sums):
    """sums [LANES] += LANES rows [n] times x [n]."""
    s0 = s1 = s2 = s3 = s4 = s5 = s6 = s7 = np.float32(0)
    for j in range(n):
        v = x[j]
        s0 += _wide(rows[0][j]) * v
        s1 += _wide(rows[1][j]) * v
        s2 += _wide(rows[2][j]) * v
        s3 += _wide(rows[3][j]) * v
        s4 += _wide(rows[4][j]) * v
        s5 += _wide(rows[5][j]) * v
        s6 += _wide(rows[6][j]) * v
        s7 += _wide(rows[7][j]) * v
    sums[0] += s0
    sums[1] += s1
    sums[2] += s2
    sums[3] += s3
    sums[4] += s4
    sums[5] += s5
    sums[6] += s6
    sums[7] += s7


@njit(**_OPTIONS)
def _add_rows(rows, scale, n, y):
    """y [n] += scale [LANES] times LANES rows [n]."""
    s0, s1, s2, s3, s4, s5, s6, s7 = (
        *(scale[0], scale[1], scale[2], scale[3]),
        *(scale[4], scale[5], scale[6], scale[7]),
    )
    for j in range(n):
        first = _wide(rows[0][j]) * s0 + _wide(rows[1][j]) * s1
        second = _wide(rows[2][j]) * s2 + _wide(rows[3][j]) * s3
        third = _wide(rows[4][j]) * s4 + _wide(rows[5][j]) * s5
        last = _wide(rows[6][j]) * s6 + _wide(rows[7][j]) * s7
        y[j] += (first + second) + (third + last)


@njit(**_OPTIONS)
def _dots(base, zeros, numbers, x, tokens, d, sums):
    """sums [tokens, LANES] = x [tokens, d] times the rows of these numbers [LANES]."""
    for k in range(tokens * LANES):
        sums[k] = np.float32(0)
    block = d if tokens == 1 else BLOCK
    for j in range(0, d, block):
        rows = _rows(base, zeros, numbers, j, d)
        for token in range(tokens):
            _add_dots(rows, _step(x, token * d + j), min(block, d - j), _step(sums, token * LANES))


@njit(**_OPTIONS)
def _gate(a, weights, zeros, first, last, survivors, numbers, sums):
    """z, kept and the list of survivors of neurons first ... last; returns how many some token keeps."""
    tokens, d = a.tokens, a.d
    z, kept, threshold, mask = _f32(a.z), _u8(a.kept), _f32(a.threshold), _u8(a.mask)
    count = 0
    for group in range(first, last, LANES):
        for k in range(LANES):
            numbers[k] = group + k if group + k < last else -1
        _dots(weights, zeros, numbers, _f32(a.x), tokens, d, sums)
        for i in range(group, min(group + LANES, last)):
            wanted = False
            for token in range(tokens):
                value = _activate(sums[token * LANES + i - group], a.activation)
                if a.mask != 0:
                    keep = mask[token * a.mask_step + i] != 0
                else:
                    keep = not (abs(value) < threshold[i * a.threshold_step])
                z[i * tokens + token] = value
                kept[i * tokens + token] = keep
                wanted = wanted or keep
            if wanted:
                survivors[count] = i
                count += 1
    return count


@njit(**_OPTIONS)
def _up_down(a, up, down, zeros, survivors, count, numbers, sums, y):
    """y [tokens, d] = what the listed survivors contribute, LANES of them at a time."""
    tokens, d = a.tokens, a.d
    z, kept = _f32(a.z), _u8(a.kept)
    for k in range(tokens * d):
        y[k] = np.float32(0)
    for group in range(0, count, LANES):
        for k in range(LANES):
            numbers[k] = survivors[group + k] if group + k < count else -1
        _dots(up, zeros, numbers, _f32(a.x), tokens, d, sums)
        for token in range(tokens):
            for k in range(LANES):
                i = numbers[k] * tokens + token
                keep = i >= 0 and kept[i] != 0
                sums[token * LANES + k] = sums[token * LANES + k] * z[i] if keep else np.float32(0)
        block = d if tokens == 1 else BLOCK
        for j in range(0, d, block):
            for token in range(tokens):
                chosen = _step(numbers, LANES)
                some = False
                for k in range(LANES):  # a dropped row is not multiplied by zero: it may hold NaN
                    keep = numbers[k] >= 0 and kept[numbers[k] * tokens + token] != 0
                    chosen[k] = numbers[k] if keep else -1
                    some = some or keep
                if some:
                    rows = _rows(down, zeros, chosen, j, d)
                    _add_rows(rows, _step(sums, token * LANES), min(block, d - j), _step(y, token * d + j))


@njit(**_OPTIONS)
def _work(a, gate, up, down, zeros):
    """Take chunks until none is left; who finishes the last adds up the partial sums, in the chunks' order."""
    tokens, d, m, chunks = a.tokens, a.d, a.m, a.chunks
    counters, partial, y = _i64(a.counters), _f32(a.partial), _f32(a.y)
    while True:
        chunk = _fetch_add(counters, 0)
        if chunk >= chunks:
            return
        first = chunk * a.rows
        last = min(first + a.rows, m)
        survivors = _step(_i64(a.survivors), first)
        numbers = _step(_i64(a.numbers), chunk * 2 * LANES)
        sums = _step(_f32(a.sums), chunk * 2 * tokens * LANES)
        count = _gate(a, gate, zeros, first, last, survivors, numbers, sums)
        _up_down(a, up, down, zeros, survivors, count, numbers, sums, _step(partial, chunk * tokens * d))
        if _fetch_add(counters, 1) == chunks - 1:
            for k in range(tokens * d):
                y[k] = np.float32(0)
            for c in range(chunks):
                part = _step(partial, c * tokens * d)
                for k in range(tokens * d):
                    y[k] += part[k]


def _mlp_float32(call):
    a = carray(call, 1)[0]
    _work(a, _f32(a.gate), _f32(a.up), _f32(a.down), _f32(a.zeros))


def _mlp_bfloat16(call):
    a = carray(call, 1)[0]
    _work(a, _bf16(a.gate), _bf16(a.up), _bf16(a.down), _bf16(a.zeros))


KERNELS = {"float32": _mlp_float32, "bfloat16": _mlp_bfloat16}


def compiled(dtype: str):
    """The kernel of KERNELS for weights of `dtype`, as a ctypes function of the address of its ARGUMENTS.

    Machine code is kept in numba's cache: beside this file, or in the user's where that is not writable.
    """
    signature = types.void(types.CPointer(_RECORD))
    try:
        return cfunc(signature, cache=True, **_OPTIONS)(KERNELS[dtype]).ctypes
    except (RuntimeError, OSError):  # no writable directory at all, or a full disk
        return cfunc(signature, **_OPTIONS)(KERNELS[dtype]).ctypes
