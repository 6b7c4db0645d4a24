"""One row (section 3.2 of the paper, batch 1): gate, threshold, and the surviving rows of up and down."""

import torch
import triton
import triton.language as tl

from cats_kernels import tuning
from cats_kernels.primitives import activate, add_rows, load_chunks, survives, times_x


@triton.jit
def _owned(j, p, programs, m, mask_ptr, R: tl.constexpr, MASKED: tl.constexpr):
    """Neurons number j of program p, which owns tiles p, p + P, ... of R, and which are to be computed."""
    rows = (j // R * programs + p) * R + j % R
    wanted = rows < m
    if MASKED:
        wanted = wanted & (tl.load(mask_ptr + rows, mask=wanted, other=0) != 0)
    return rows, wanted


@triton.jit
def _append(z, rows, wanted, count, threshold_ptr, index_ptr, value_ptr, t_stride, MASKED: tl.constexpr):
    """Append those of the neurons `rows` that survive, and their z, to a list of `count`; its new length."""
    keep = wanted
    if not MASKED:
        t = tl.load(threshold_ptr + rows * t_stride, mask=wanted, other=0.0).to(tl.float32)
        keep = wanted & survives(z, t)
    kept = keep.to(tl.int32)
    slot = count + tl.cumsum(kept, axis=0) - kept
    tl.store(index_ptr + slot, rows, mask=keep)
    tl.store(value_ptr + slot, z, mask=keep)
    return count + tl.sum(kept, axis=0)


@triton.jit
def _survivors(index_ptr, value_ptr, first, count, T: tl.constexpr):
    """Neurons and values of T survivors from number `first` of a list of `count`, and which there are."""
    at = first + tl.arange(0, T)
    here = at < count
    return tl.load(index_ptr + at, mask=here, other=0), tl.load(value_ptr + at, mask=here, other=0.0), here


@triton.jit
def gate_up_down(
    x_ptr, gate_ptr, up_ptr, down_ptr, threshold_ptr, mask_ptr, centre_ptr, shared_ptr,
    z_ptr, index_ptr, value_ptr, partial_ptr,
    m, capacity, t_stride,
    d: tl.constexpr, K: tl.constexpr, R: tl.constexpr, T: tl.constexpr, OWNED: tl.constexpr,
    AHEAD: tl.constexpr, AT_ONCE: tl.constexpr, KIND: tl.constexpr, MASKED: tl.constexpr,
    CENTRED: tl.constexpr, PDL: tl.constexpr, ATOMIC: tl.constexpr,
):  # fmt: skip
    """Program p owns tiles p, p + P, ... of R neurons: it lists its survivors, then sums them.

    Pointers: x [d], gate/up/down [m, d], threshold [] or [m], mask [m] of bytes or unused, all contiguous in
    d; z, value (float32) and index (int32) [P, capacity] are private lists; partial (float32) [P, d], or
    [1, d] of zeros where ATOMIC adds into it in an order that changes from run to run. CENTRED: z is taken
    around centre (float32) [m], and rows of shared [d, d] times x are added, each program its tiles of T.
    Rows are read in tiles of K columns, so that a width that is no power of two fills them. One tile of gate
    rows is in flight while another is reduced; survivors are read T at a time, up and down together, with
    AHEAD the next ones before these are reduced. AT_ONCE (up to OWNED neurons) compares all z when the gate
    is done, in place of each tile: up to 1.4 us faster on an H200 below 4096 columns, 2 us slower at 8192.
    With PDL the first gate tile is read before the kernel ahead has ended, which must not write weights.
    """
    p = tl.program_id(0)
    programs = tl.num_programs(0)
    k = tl.arange(0, R)
    z_ptr += p * capacity
    index_ptr += p * capacity
    value_ptr += p * capacity
    owned = tl.cdiv(tl.cdiv(m, R) - p, programs) * R
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        if MASKED:  # which gate rows to read is known only when the kernel ahead has ended
            tl.extra.cuda.gdc_wait()
    rows, wanted = _owned(k, p, programs, m, mask_ptr, R, MASKED)
    tiles = load_chunks(gate_ptr, rows, wanted, d, K)
    if PDL and not MASKED:
        tl.extra.cuda.gdc_wait()
    count = 0
    for first in range(0, owned, R):
        next_rows, next_wanted = _owned(first + R + k, p, programs, m, mask_ptr, R, MASKED)
        next_tiles = load_chunks(gate_ptr, next_rows, next_wanted, d, K)
        z = activate(times_x(tiles, x_ptr, d, K), KIND)
        if CENTRED:
            z -= tl.load(centre_ptr + rows, mask=wanted, other=0.0)
        if AT_ONCE:
            tl.store(z_ptr + first + k, z, mask=wanted)
        else:
            count = _append(z, rows, wanted, count, threshold_ptr, index_ptr, value_ptr, t_stride, MASKED)
        rows, wanted, tiles = next_rows, next_wanted, next_tiles
    tl.debug_barrier()  # z, and below the list, is read by other threads than wrote it
    if AT_ONCE:
        j = tl.arange(0, OWNED)
        every, there = _owned(j, p, programs, m, mask_ptr, R, MASKED)
        each = tl.load(z_ptr + j, mask=there, other=0.0)
        count = _append(each, every, there, 0, threshold_ptr, index_ptr, value_ptr, t_stride, MASKED)
        tl.debug_barrier()

    y = ()
    for _ in tl.static_range((d + K - 1) // K):
        y = y + (tl.zeros([K], dtype=tl.float32),)  # noqa: RUF005
    chosen, value, here = _survivors(index_ptr, value_ptr, 0, count, T)
    if AHEAD:
        up = load_chunks(up_ptr, chosen, here, d, K)
        down = load_chunks(down_ptr, chosen, here, d, K)
        chosen, next_value, next_here = _survivors(index_ptr, value_ptr, T, count, T)
    if CENTRED:
        for first in range(p * T, d, programs * T):
            at = first + tl.arange(0, T)
            by = tl.load(x_ptr + at, mask=at < d, other=0.0).to(tl.float32)
            y = add_rows(y, load_chunks(shared_ptr, at, at < d, d, K), by)
    for first in range(0, count, T):
        if AHEAD:
            next_up = load_chunks(up_ptr, chosen, next_here, d, K)
            next_down = load_chunks(down_ptr, chosen, next_here, d, K)
            chosen, later_value, later_here = _survivors(index_ptr, value_ptr, first + 2 * T, count, T)
        else:
            up = load_chunks(up_ptr, chosen, here, d, K)
            down = load_chunks(down_ptr, chosen, here, d, K)
            chosen, next_value, next_here = _survivors(index_ptr, value_ptr, first + T, count, T)
        y = add_rows(y, down, tl.where(here, value * times_x(up, x_ptr, d, K), 0.0))
        value, here = next_value, next_here
        if AHEAD:
            up, down, next_value, next_here = next_up, next_down, later_value, later_here
    for c in tl.static_range(len(y)):
        cols = c * K + tl.arange(0, K)
        if ATOMIC:
            tl.atomic_add(partial_ptr + cols, y[c], mask=cols < d, sem="relaxed")
        else:
            tl.store(partial_ptr + p * d + cols, y[c], mask=cols < d)


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


def launch(
    x, w_gate, w_up, w_down_t, threshold, activation, mask, out_dtype, config=None, centre=None, shared=None
):  # fmt: skip
    """y [1, d] for x [1, d]; two launches, of which the second touches no weights."""
    m, d = w_gate.shape
    c = config or tuning.decode_config(m, d, w_gate.element_size())
    rows = c["rows"]
    programs = min(c["programs"] * tuning.multiprocessors(x.device), triton.cdiv(m, rows))
    capacity = triton.cdiv(triton.cdiv(m, rows), programs) * rows
    index = torch.empty(programs * capacity, dtype=torch.int32, device=x.device)
    z, value = torch.empty(2, programs * capacity, dtype=torch.float32, device=x.device)
    atomic = c.get("atomic", False)
    partial = (torch.zeros if atomic else torch.empty)(
        1 if atomic else programs, d, dtype=torch.float32, device=x.device
    )
    y = torch.empty(1, d, dtype=out_dtype, device=x.device)
    pdl = c.get("pdl", tuning.has_pdl(x.device))
    gate_up_down[(programs,)](
        x, w_gate, w_up, w_down_t, threshold, x if mask is None else mask.view(torch.uint8),
        x if centre is None else centre, x if shared is None else shared, z, index, value, partial,
        m, capacity, threshold.stride(0) if threshold.dim() else 0,
        d=d, K=c["cols"], R=rows, T=c["take"], OWNED=triton.next_power_of_2(capacity), AHEAD=c["ahead"],
        AT_ONCE=c["at_once"], KIND=activation, MASKED=mask is not None, CENTRED=centre is not None, PDL=pdl,
        ATOMIC=atomic, num_warps=c["warps"], **tuning.launch_options(x.device, c, pdl),
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
