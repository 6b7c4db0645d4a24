"""The CATS MLP on a CPU: the compiled kernel on PyTorch's own threads, or masked dense without numba."""

import ctypes
import logging
import math
import os
import struct
import threading
import time
from functools import cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from cats_kernels import reference

logger = logging.getLogger(__name__)

CHUNKS = 64  # most chunks a call: threads end within 1/64 of each other, partial sums stay below 1 % of bytes
CHUNK_ROWS = 64  # fewest neurons a chunk: with 32 the streams of SmolLM2-135M are so short that 10 % are lost
SCHEDULED = 200_000  # ns that a call may take longer before the cores count as busy; a time slice is 3 ms
FEWEST_ALONE, MOST_ALONE = 2, 256  # calls on one thread before all threads are tried again, doubled each time
DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}

_kernels = {}
_threads = threading.local()
_compiling = threading.Lock()
_forked = False


def _after_fork() -> None:
    global _forked
    _forked = True


# A forked child has no pool of threads, and the OpenMP library would wait for the parent's.
os.register_at_fork(after_in_child=_after_fork)


class Kernel:
    """Machine code, kept alive by `owner`, as a function of the address of its arguments."""

    def __init__(self, owner):
        self.owner = owner
        self.address = owner.address
        self.run = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(owner.address)


def cats_mlp(x, w_gate, w_up, w_down_t, threshold, activation, mask, out_dtype):
    """y [B, d] as `reference.cats_mlp`, for checked arguments; masked dense where there is no kernel."""
    kernel = compiled(w_gate.dtype) if x.numel() and w_gate.numel() else None
    if kernel is None:
        return masked_dense(x, w_gate, w_up, w_down_t, threshold, activation, mask, out_dtype)
    tokens, d = x.shape
    m = w_gate.shape[0]
    x32 = x.float().contiguous()
    y = torch.empty(tokens, d, dtype=torch.float32)
    if mask is None:
        threshold = threshold.float().contiguous()
        limits = (threshold.data_ptr(), threshold.dim(), 0, 0)
    else:
        mask = mask.contiguous()
        limits = (0, 0, mask.data_ptr(), m if mask.dim() == 2 else 0)
    kind = _cpu_kernel().ACTIVATIONS[activation]
    weights = (w_gate.data_ptr(), w_up.data_ptr(), w_down_t.data_ptr())
    _workspace(tokens, m, d).run(kernel, x32.data_ptr(), *weights, y.data_ptr(), kind, *limits)
    return y.to(x.dtype if out_dtype is None else out_dtype)


def masked_dense(x, w_gate, w_up, w_down_t, threshold, activation, mask, out_dtype):
    """The same by dense matrix products in the weights' dtype: every weight is read, none is copied."""
    z = reference.ACTIVATIONS[activation](F.linear(x, w_gate).float())
    keep = reference.survivors(z, threshold.float()) if mask is None else mask.expand_as(z)
    h = torch.where(keep, z * F.linear(x, w_up), 0.0).to(x.dtype)
    y = h @ w_down_t
    if not bool(y.isfinite().all()):  # zero times NaN or Inf of a dropped neuron is not nothing
        y = torch.stack([row[kept] @ w_down_t[kept] for row, kept in zip(h, keep, strict=True)])
    return y.to(x.dtype if out_dtype is None else out_dtype)


def compiled(dtype: torch.dtype) -> Kernel | None:
    """The kernel for weights of `dtype`; None where there is none. The first call of a process loads it.

    Compiling takes some seconds, once: `cpu_kernel` keeps the machine code on disk.
    """
    if dtype not in _kernels:
        with _compiling:
            module = _cpu_kernel() if dtype in DTYPES else None
            _kernels[dtype] = None if module is None else Kernel(module.compiled(DTYPES[dtype]))
    return _kernels[dtype]


@cache
def _cpu_kernel():
    """The module with the kernels, which needs numba; None, and one line in the log, without it."""
    try:
        from cats_kernels import cpu_kernel
    except (ImportError, OSError) as error:
        logger.warning("CATS decodes on this CPU by dense products, not faster: install numba (%s).", error)
        return None
    return cpu_kernel


@cache
def _parallel():
    """GOMP_parallel of the OpenMP library that PyTorch itself is linked to; None where it has another pool.

    A second pool would compete with PyTorch's threads, which spin for milliseconds after each operation.
    """
    try:
        start = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so")).GOMP_parallel
    except (OSError, AttributeError):
        return None
    start.restype = None
    start.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)
    return start


class _Workspace:
    """Arguments and scratch memory of one thread for calls of one shape."""

    def __init__(self, tokens: int, m: int, d: int):
        cpu_kernel = _cpu_kernel()
        rows = max(CHUNK_ROWS, -(-m // CHUNKS))
        lanes = cpu_kernel.MOST_LANES
        rows = -(-rows // lanes) * lanes
        chunks = -(-m // rows)
        sizes = {
            "arguments": 8 * len(cpu_kernel.ARGUMENTS),
            "zeros": 4 * d,
            "survivors": 8 * m,
            "kept": m * tokens,
            "z": 4 * m * tokens,
            "numbers": 8 * chunks * lanes,
            "sums": 4 * chunks * lanes * tokens,
            "partial": 4 * chunks * tokens * d,
        }
        ends = np.cumsum([-(-size // 64) * 64 for size in sizes.values()])
        self._memory = np.zeros(ends[-1] + 64, dtype=np.uint8)
        start = -self._memory.ctypes.data % 64
        self._view = self._memory[start:]
        self._address = self._memory.ctypes.data + start
        places = dict(zip(sizes, (self._address + np.concatenate(([0], ends[:-1]))).tolist(), strict=True))
        known = {"counters": self._address, "tokens": tokens, "m": m, "d": d, "chunks": chunks, "rows": rows}
        fixed = [{**places, **known}[name] for name in cpu_kernel.ARGUMENTS[len(cpu_kernel.CALL) :]]
        struct.pack_into(f"{len(fixed)}q", self._view, 8 * len(cpu_kernel.CALL), *fixed)
        self._pack = struct.Struct(f"{len(cpu_kernel.CALL)}q").pack_into
        self._chunks = chunks
        self._alone = self._patience = FEWEST_ALONE  # calls to make on one thread now, and after a slow call
        self._one_thread = math.inf  # shortest call on one thread, ns

    def run(self, kernel: Kernel, *call: int) -> None:
        """Run `kernel` on the arguments CALL, less its two counters, with as many threads as PyTorch has.

        Where other processes want the cores, waiting for a thread that is not scheduled costs a hundred
        calls: after a call on all threads that took longer than one thread needs, the next ones run on one.
        The number of threads does not change a bit of the result.
        """
        self._pack(self._view, 0, 0, 0, *call)
        threads = 1 if _forked else min(torch.get_num_threads(), self._chunks)
        if threads == 1 or _parallel() is None:
            kernel.run(self._address)
            return
        begin = time.perf_counter_ns()
        if self._alone > 0:
            kernel.run(self._address)
            self._alone -= 1
            self._one_thread = min(self._one_thread, time.perf_counter_ns() - begin)
            return
        _parallel()(kernel.address, self._address, threads, 0)
        if time.perf_counter_ns() - begin > 1.5 * self._one_thread + SCHEDULED:
            self._alone = self._patience
            self._patience = min(2 * self._patience, MOST_ALONE)
        else:
            self._patience = FEWEST_ALONE


def _workspace(tokens: int, m: int, d: int) -> _Workspace:
    known = _threads.__dict__
    if (tokens, m, d) not in known:
        known[tokens, m, d] = _Workspace(tokens, m, d)
    return known[tokens, m, d]
