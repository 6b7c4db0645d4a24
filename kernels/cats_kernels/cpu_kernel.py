"""The decode kernel of section 3.2 for a CPU, compiled by numba: gate, threshold, surviving rows.

All in one file: numba's cache of machine code notices a change of the file that it was compiled from only.
"""

import math

import numpy as np
from llvmlite import ir
from numba import carray, cfunc, from_dtype, njit, types
from numba.core import cgutils
from numba.extending import intrinsic

# Weight rows in flight, by element. Each stream runs on through a chunk, and together they hide the latency
# of row starts: 16 read surviving float32 rows of 2304 bytes 15 % faster than 8 (one core of Zen 4). A uint16
# holds a bfloat16 and takes two more instructions: there 16 streams are slower than 8.
LANES = {types.float32: 16, types.uint16: 8}
MOST_LANES = max(LANES.values())
BLOCK = 256  # columns of LANES rows, which stay in the L1 cache while every token of a batch uses them
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
    *("numbers", "sums"),  # int64 [chunks, MOST_LANES], float32 [chunks, tokens, MOST_LANES]
    "partial",  # float32 [chunks, tokens, d]
)
_RECORD = from_dtype(np.dtype([(name, np.int64) for name in ARGUMENTS]))

# Sums may be reordered, so that they vectorise; NaN and Inf keep their meaning.
_FAST = ("reassoc", "contract", "nsz")
_OPTIONS = {"fastmath": set(_FAST), "error_model": "numpy"}
_I64, _F32 = ir.IntType(64), ir.FloatType()


def _pointer(element):
    @intrinsic
    def at(typingctx, address):
        def codegen(context, builder, signature, args):
            return builder.inttoptr(args[0], context.get_value_type(signature.return_type))

        return types.CPointer(element)(types.int64), codegen

    return at


_f32, _bf16, _i64, _u8 = map(_pointer, (types.float32, types.uint16, types.int64, types.uint8))


def _place(builder, element, pointer, i):
    """LLVM: the address of an element of this numba type."""
    return cgutils.pointer_add(builder, pointer, builder.mul(i, _I64(element.bitwidth // 8)))


def _load(builder, element, pointer, i):
    """LLVM: an element in float32; a uint16 holds a bfloat16, the upper half of a float32."""
    kind = _F32 if element == types.float32 else ir.IntType(element.bitwidth)
    value = builder.load(_place(builder, element, pointer, i), align=element.bitwidth // 8, typ=kind)
    if element != types.uint16:
        return value
    bits = builder.shl(builder.zext(value, ir.IntType(32)), ir.IntType(32)(16))
    return builder.bitcast(bits, _F32)


def _rows(builder, element, base, zeros, numbers, offset, d):
    """LLVM: addresses of LANES rows of a matrix [m, d] from column `offset`; of zeros for a number < 0."""
    rows = []
    for k in range(LANES[element]):
        i = _load(builder, types.int64, numbers, _I64(k))
        row = _place(builder, element, base, builder.add(builder.mul(i, d), offset))
        rows.append(builder.select(builder.icmp_signed("<", i, _I64(0)), zeros, row))
    return rows


@intrinsic
def _lanes(typingctx, base):
    """LANES of this matrix's element, a constant."""

    def codegen(context, builder, signature, args):
        return _I64(LANES[base.dtype])

    return types.int64(base), codegen


@intrinsic
def _step(typingctx, pointer, elements):
    """The pointer moved by so many elements."""

    def codegen(context, builder, signature, args):
        return _place(builder, pointer.dtype, *args)

    return pointer(pointer, types.int64), codegen


@intrinsic
def _fetch_add(typingctx, pointer, i):
    """Element i of an int64 array before one is added to it, as if one thread came after another."""

    def codegen(context, builder, signature, args):
        return builder.atomic_rmw("add", _place(builder, pointer.dtype, *args), _I64(1), "acq_rel")

    return types.int64(pointer, types.int64), codegen


@intrinsic
def _add_dots(typingctx, base, zeros, numbers, offset, d, x, n, sums):
    """sums [LANES] += rows `numbers` [LANES] of base [m, d], n columns from `offset`, times x [n]."""

    def codegen(context, builder, signature, args):
        base_, zeros_, numbers_, offset_, d_, x_, n_, sums_ = args
        rows = _rows(builder, base.dtype, base_, zeros_, numbers_, offset_, d_)
        totals = [cgutils.alloca_once_value(builder, _F32(0)) for _ in rows]
        for total in totals:
            builder.store(_F32(0), total)
        with cgutils.for_range(builder, n_) as loop:
            scale = _load(builder, types.float32, x_, loop.index)
            for row, total in zip(rows, totals, strict=True):
                product = builder.fmul(_load(builder, base.dtype, row, loop.index), scale, flags=_FAST)
                builder.store(builder.fadd(builder.load(total, typ=_F32), product, flags=_FAST), total)
        for k, total in enumerate(totals):
            before = _load(builder, types.float32, sums_, _I64(k))
            place = _place(builder, types.float32, sums_, _I64(k))
            builder.store(builder.fadd(before, builder.load(total, typ=_F32)), place, align=4)
        return context.get_dummy_value()

    return types.void(base, base, numbers, types.int64, types.int64, x, types.int64, sums), codegen


@intrinsic
def _add_rows(typingctx, base, zeros, numbers, offset, d, scales, n, y):
    """y [n] += scales [LANES] times rows `numbers` [LANES] of base [m, d], n columns from `offset`."""

    def codegen(context, builder, signature, args):
        base_, zeros_, numbers_, offset_, d_, scales_, n_, y_ = args
        rows = _rows(builder, base.dtype, base_, zeros_, numbers_, offset_, d_)
        factors = [_load(builder, types.float32, scales_, _I64(k)) for k in range(len(rows))]
        with cgutils.for_range(builder, n_) as loop:
            total = _load(builder, types.float32, y_, loop.index)
            for row, factor in zip(rows, factors, strict=True):
                product = builder.fmul(_load(builder, base.dtype, row, loop.index), factor, flags=_FAST)
                total = builder.fadd(total, product, flags=_FAST)
            builder.store(total, _place(builder, types.float32, y_, loop.index), align=4)
        return context.get_dummy_value()

    return types.void(base, base, numbers, types.int64, types.int64, scales, types.int64, y), codegen


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
def _dots(base, zeros, numbers, x, tokens, d, sums):
    """sums [tokens, LANES] = x [tokens, d] times the rows `numbers` [LANES]."""
    lanes = _lanes(base)
    for k in range(tokens * lanes):
        sums[k] = np.float32(0)
    block = d if tokens == 1 else BLOCK
    for j in range(0, d, block):
        n = min(block, d - j)
        for token in range(tokens):
            _add_dots(base, zeros, numbers, j, d, _step(x, token * d + j), n, _step(sums, token * lanes))


@njit(**_OPTIONS)
def _gate(a, weights, zeros, first, last, survivors, numbers, sums):
    """z and kept of neurons first ... last, and the list of those that a token keeps; returns its length."""
    tokens, lanes = a.tokens, _lanes(weights)
    z, kept, threshold, mask = _f32(a.z), _u8(a.kept), _f32(a.threshold), _u8(a.mask)
    length = (last - first + lanes - 1) // lanes
    for group in range(length):
        for k in range(lanes):
            i = first + k * length + group
            numbers[k] = i if i < last else -1
        _dots(weights, zeros, numbers, _f32(a.x), tokens, a.d, sums)
        for k in range(lanes):
            i = numbers[k]
            for token in range(tokens if i >= 0 else 0):
                value = _activate(sums[token * lanes + k], a.activation)
                if a.mask != 0:
                    keep = mask[token * a.mask_step + i] != 0
                else:
                    keep = not (abs(value) < threshold[i * a.threshold_step])
                z[i * tokens + token] = value
                kept[i * tokens + token] = keep
    count = 0
    for i in range(first, last):
        wanted = False
        for token in range(tokens):
            wanted = wanted or kept[i * tokens + token] != 0
        if wanted:
            survivors[count] = i
            count += 1
    return count


@njit(**_OPTIONS)
def _up(a, weights, zeros, survivors, count, numbers, sums):
    """z of the survivors becomes z * up, where a token keeps it."""
    tokens, lanes = a.tokens, _lanes(weights)
    z, kept = _f32(a.z), _u8(a.kept)
    length = (count + lanes - 1) // lanes
    for group in range(length):
        for k in range(lanes):
            i = k * length + group
            numbers[k] = survivors[i] if i < count else -1
        _dots(weights, zeros, numbers, _f32(a.x), tokens, a.d, sums)
        for k in range(lanes):
            i = numbers[k]
            for token in range(tokens if i >= 0 else 0):
                if kept[i * tokens + token] != 0:
                    z[i * tokens + token] *= sums[token * lanes + k]


@njit(**_OPTIONS)
def _down(a, weights, zeros, survivors, count, numbers, scales, y):
    """y [tokens, d] = z of the survivors, where a token keeps it, times their rows of W_down."""
    tokens, d, lanes = a.tokens, a.d, _lanes(weights)
    z, kept = _f32(a.z), _u8(a.kept)
    for k in range(tokens * d):
        y[k] = np.float32(0)
    length = (count + lanes - 1) // lanes
    block = d if tokens == 1 else BLOCK
    for group in range(length):
        for j in range(0, d, block):
            for token in range(tokens):
                some = False
                for k in range(lanes):  # a dropped row is not multiplied by zero: it may hold NaN
                    numbers[k] = -1
                    scales[k] = np.float32(0)
                    i = k * length + group
                    if i < count and kept[survivors[i] * tokens + token] != 0:
                        numbers[k] = survivors[i]
                        scales[k] = z[survivors[i] * tokens + token]
                        some = True
                if some:
                    n = min(block, d - j)
                    _add_rows(weights, zeros, numbers, j, d, scales, n, _step(y, token * d + j))


@njit(**_OPTIONS)
def _work(a, gate, up, down, zeros):
    """Take chunks until none is left; who finishes the last adds up the partial sums in the chunks' order."""
    size, chunks = a.tokens * a.d, a.chunks
    counters, partial, y = _i64(a.counters), _f32(a.partial), _f32(a.y)
    while True:
        chunk = _fetch_add(counters, 0)
        if chunk >= chunks:
            return
        first = chunk * a.rows
        survivors = _step(_i64(a.survivors), first)
        numbers = _step(_i64(a.numbers), chunk * MOST_LANES)
        sums = _step(_f32(a.sums), chunk * a.tokens * MOST_LANES)
        count = _gate(a, gate, zeros, first, min(first + a.rows, a.m), survivors, numbers, sums)
        _up(a, up, zeros, survivors, count, numbers, sums)
        _down(a, down, zeros, survivors, count, numbers, sums, _step(partial, chunk * size))
        if _fetch_add(counters, 1) == chunks - 1:
            for k in range(size):
                y[k] = np.float32(0)
            for c in range(chunks):
                part = _step(partial, c * size)
                for k in range(size):
                    y[k] += part[k]


def _mlp_float32(call):
    a = carray(call, 1)[0]
    _work(a, _f32(a.gate), _f32(a.up), _f32(a.down), _f32(a.zeros))


def _mlp_bfloat16(call):
    a = carray(call, 1)[0]
    _work(a, _bf16(a.gate), _bf16(a.up), _bf16(a.down), _bf16(a.zeros))


KERNELS = {"float32": _mlp_float32, "bfloat16": _mlp_bfloat16}


def compiled(dtype: str):
    """The kernel of KERNELS for weights of `dtype`: a numba CFunc that takes the address of its ARGUMENTS.

    Machine code is kept in numba's cache: beside this file, or in the user's where that is not writable.
    """
    signature = types.void(types.CPointer(_RECORD))
    try:
        return cfunc(signature, cache=True, **_OPTIONS)(KERNELS[dtype])
    except (RuntimeError, OSError):  # no writable directory at all, or a full disk
        return cfunc(signature, **_OPTIONS)(KERNELS[dtype])
