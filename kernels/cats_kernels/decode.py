"""One row (section 3.2 of the paper, batch 1): gate, threshold, and the surviving rows of up and down."""

import torch
import triton
import triton.language as tl

from cats_kernels import tuning
from cats_kernels.primitives import activate, load_rows, survives


@triton.jit
def _gate_rows(tile, tiles, p, programs, m, mask_ptr, R: tl.constexpr, MASKED: tl.constexpr):
    """Neurons [R] of a program's tile number `tile`, and which of them are to be computed."""
    rows = (tile * programs + p) * R + tl.arange(0, R)
    wanted = rows < tl.where(tile < tiles, m, 0)
    if MASKED:
        wanted = wanted & (tl.load(mask_ptr + rows, mask=wanted, other=0) != 0)
    return rows, wanted


@triton.jit
def gate_up_down(
    x_ptr, gate_ptr, up_ptr, down_ptr, threshold_ptr, mask_ptr,
    index_ptr, value_ptr, partial_ptr,
    m, capacity, t_stride,
    d: tl.constexpr, D: tl.constexpr, R: tl.constexpr,
    KIND: tl.constexpr, MASKED: tl.constexpr, PDL: tl.constexpr, ATOMIC: tl.constexpr,
):  # fmt: skip
    """Program p owns tiles p, p + P, ... of R neurons: it lists its survivors, then sums them.

    Pointers: x [d], gate/up/down [m, d], threshold [] or [m], mask [m] of bytes or unused, all contiguous
    in d; index (int32) and value (float32) [P, capacity] are private lists; partial (float32) [P, d], or
    [1, d] of zeros where ATOMIC adds into it in an order that changes from run to run.
    One gate tile is in flight while another is reduced; survivors are read R at a time, up and down together.
    x is read again for each tile: it stays in the L1 cache, and 16 registers fewer let two programs of eight
    warps share a multiprocessor (4096 columns of 16 bits), of which one computes while the other waits.
    With PDL the first gate tile is read before the kernel ahead has ended, which must not write weights.
    """
    p = tl.program_id(0)
    programs = tl.num_programs(0)
    cols = tl.arange(0, D)
    k = tl.arange(0, R)
    own = p * capacity
    tiles = tl.cdiv(tl.cdiv(m, R) - p, programs)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        if MASKED:  # which gate rows to read is known only when the kernel ahead has ended
            tl.extra.cuda.gdc_wait()
    rows, wanted = _gate_rows(0, tiles, p, programs, m, mask_ptr, R, MASKED)
    tile = load_rows(gate_ptr, rows, wanted, cols, d, D)
    if PDL and not MASKED:
        tl.extra.cuda.gdc_wait()
    t = tl.load(threshold_ptr + rows * t_stride, mask=wanted, other=0.0).to(tl.float32)
    y = tl.zeros([D], dtype=tl.float32)
    count = 0
    for i in range(0, tiles):
        next_rows, next_wanted = _gate_rows(i + 1, tiles, p, programs, m, mask_ptr, R, MASKED)
        next_tile = load_rows(gate_ptr, next_rows, next_wanted, cols, d, D)
        next_t = tl.load(threshold_ptr + next_rows * t_stride, mask=next_wanted, other=0.0).to(tl.float32)
        x = tl.load(x_ptr + cols, mask=cols < d, other=0.0).to(tl.float32)
        z = activate(tl.sum(tile.to(tl.float32) * x[None, :], axis=1), KIND)
        keep = wanted if MASKED else wanted & survives(z, t)
        kept = keep.to(tl.int32)
        slot = own + count + tl.cumsum(kept, axis=0) - kept
        tl.store(index_ptr + slot, rows, mask=keep)
        tl.store(value_ptr + slot, z, mask=keep)
        count += tl.sum(kept, axis=0)
        rows, wanted, tile, t = next_rows, next_wanted, next_tile, next_t
    tl.debug_barrier()  # the lists are read by other threads than wrote them

    chosen = tl.load(index_ptr + own + k, mask=k < count, other=0)
    z = tl.load(value_ptr + own + k, mask=k < count, other=0.0)
    for first in range(0, count, R):
        here = first + k
        later = here + R
        up = load_rows(up_ptr, chosen, here < count, cols, d, D)
        down = load_rows(down_ptr, chosen, here < count, cols, d, D)
        chosen = tl.load(index_ptr + own + later, mask=later < count, other=0)
        next_z = tl.load(value_ptr + own + later, mask=later < count, other=0.0)
        x = tl.load(x_ptr + cols, mask=cols < d, other=0.0).to(tl.float32)
        h = tl.where(here < count, z * tl.sum(up.to(tl.float32) * x[None, :], axis=1), 0.0)
        y += tl.sum(down.to(tl.float32) * h[:, None], axis=0)
        z = next_z
    if ATOMIC:
        tl.atomic_add(partial_ptr + cols, y, mask=cols < d, sem="relaxed")
    else:
        tl.store(partial_ptr + p * d + cols, y, mask=cols < d)


@triton.jit
def sum_partials(
    partial_ptr, y_ptr, programs,
    d: tl.constexpr, COLS: tl.constexpr, STEP: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """y [d] = sum over programs of partial [programs, d], always in the same order: bit-equal run to run."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    cols = tl.program_id(0) * COLS + tl.arange(0, COLS)
    total = tl.zeros([STEP, COLS], dtype=tl.float32)
    for first in range(0, programs, STEP):
        rows = first + tl.arange(0, STEP)
        inside = (rows < programs)[:, None] & (cols < d)[None, :]
        total += tl.load(
            partial_ptr + rows[:, None] * d + cols[None, :], mask=inside, other=0.0, cache_modifier=".cg"
        )
    tl.store(y_ptr + cols, tl.sum(total, axis=0).to(y_ptr.dtype.element_ty), mask=cols < d)


def launch(x, w_gate, w_up, w_down_t, threshold, activation, mask, out_dtype, config=None):
    """y [1, d] for x [1, d]; two launches, of which the second touches no weights."""
    m, d = w_gate.shape
    config = config or tuning.decode_config(x.device, d, w_gate.element_size())
    rows = config["rows"]
    programs = min(config["programs"], triton.cdiv(m, rows))
    capacity = triton.cdiv(triton.cdiv(m, rows), programs) * rows
    index = torch.empty(programs * capacity, dtype=torch.int32, device=x.device)
    value = torch.empty(programs * capacity, dtype=torch.float32, device=x.device)
    atomic = config.get("atomic", False)
    partial = (torch.zeros if atomic else torch.empty)(
        1 if atomic else programs, d, dtype=torch.float32, device=x.device
    )
    y = torch.empty(1, d, dtype=out_dtype, device=x.device)
    pdl = config.get("pdl", tuning.has_pdl(x.device))
    extra = {"launch_pdl": True} if pdl else {}
    gate_up_down[(programs,)](
        x, w_gate, w_up, w_down_t, threshold, x if mask is None else mask.view(torch.uint8),
        index, value, partial,
        m, capacity, threshold.stride(0) if threshold.dim() else 0,
        d=d, D=triton.next_power_of_2(d), R=rows, KIND=activation, MASKED=mask is not None, PDL=pdl,
        ATOMIC=atomic, num_warps=config["warps"], **extra,
    )  # fmt: skip
    if atomic:
        return partial.to(out_dtype)
    launch_sum(partial, y, pdl)
    return y


def launch_sum(partial, y, pdl: bool) -> None:
    """y (n numbers) = sum of partial [programs, n] over programs."""
    programs, n = partial.shape
    extra = {"launch_pdl": True} if pdl else {}
    sum_partials[(triton.cdiv(n, 16),)](
        partial, y, programs, d=n, COLS=16, STEP=512, PDL=pdl, num_warps=4, **extra
    )
