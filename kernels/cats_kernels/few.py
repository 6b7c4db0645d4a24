"""Two to four rows: weights stream through registers, as for one row; gate and up of four on tensor cores."""

import torch
import triton
import triton.language as tl

from cats_kernels import batch, decode, tuning
from cats_kernels.primitives import activate, keeps, load_rows

MOST_ROWS = 4


@triton.jit
def _rows_times_x(tile, x_ptr, cols, b, d: tl.constexpr, B: tl.constexpr):
    """[R, PAD] float32: a tile [R, D] of weights times every row of x [B, d]."""
    weights = tile.to(tl.float32)
    z = tl.zeros([tile.shape[0], b.shape[0]], dtype=tl.float32)
    for i in tl.static_range(B):
        x = tl.load(x_ptr + i * d + cols, mask=cols < d, other=0.0).to(tl.float32)
        z = tl.where(b[None, :] == i, tl.sum(weights * x[None, :], axis=1)[:, None], z)
    return z


@triton.jit
def gate_up(
    x_ptr, gate_ptr, up_ptr, threshold_ptr, mask_ptr,
    index_ptr, count_ptr, h_ptr,
    m, capacity, t_stride, mask_stride,
    d: tl.constexpr, D: tl.constexpr, R: tl.constexpr, B: tl.constexpr, PAD: tl.constexpr,
    KIND: tl.constexpr, MASKED: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """h = CATS(act(x W_gate)) * (x W_up) where any row survives, B <= 4 rows of x.

    Program p owns tiles p, p + P, ... of R neurons. Pointers: x [B, d], gate/up [m, d], threshold [] or [m],
    mask [m] or [B, m] of bytes, or unused; index (int32) [P, capacity], private lists, and count (int32) [P],
    their lengths; h (float32) [B, m], written for the neurons in the lists. PAD >= B is a power of two.
    One tile is in flight while another is reduced; with PDL the first is read before the kernel ahead has
    ended, which must not write weights.
    """
    p = tl.program_id(0)
    programs = tl.num_programs(0)
    cols = tl.arange(0, D)
    k = tl.arange(0, R)
    b = tl.arange(0, PAD)
    own = p * capacity
    tiles = tl.cdiv(tl.cdiv(m, R) - p, programs)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    rows = p * R + k
    tile = load_rows(gate_ptr, rows, rows < m, cols, d, D)
    if PDL:
        tl.extra.cuda.gdc_wait()
    count = 0
    for i in range(0, tiles):
        next_rows = ((i + 1) * programs + p) * R + k
        next_tile = load_rows(gate_ptr, next_rows, next_rows < m, cols, d, D)
        inside = (rows < m)[:, None] & (b < B)[None, :]
        z = activate(_rows_times_x(tile, x_ptr, cols, b, d, B), KIND)
        keep = keeps(z, rows, b, inside, threshold_ptr, mask_ptr, t_stride, mask_stride, MASKED)
        kept = tl.max(keep.to(tl.int32), axis=1)
        tl.store(h_ptr + b[None, :] * m + rows[:, None], z, mask=inside)
        tl.store(index_ptr + own + count + tl.cumsum(kept, axis=0) - kept, rows, mask=kept != 0)
        count += tl.sum(kept, axis=0)
        rows, tile = next_rows, next_tile
    tl.store(count_ptr + p, count)
    tl.debug_barrier()  # the list is read by other threads than wrote it

    chosen = tl.load(index_ptr + own + k, mask=k < count, other=0)
    up_tile = load_rows(up_ptr, chosen, k < count, cols, d, D)
    for first in range(0, count, R):
        here = first + k
        later = here + R
        next_chosen = tl.load(index_ptr + own + later, mask=later < count, other=0)
        next_tile = load_rows(up_ptr, next_chosen, later < count, cols, d, D)
        up = _rows_times_x(up_tile, x_ptr, cols, b, d, B)
        inside = (here < count)[:, None] & (b < B)[None, :]
        at = h_ptr + b[None, :] * m + chosen[:, None]
        z = tl.load(at, mask=inside, other=0.0)
        keep = keeps(z, chosen, b, inside, threshold_ptr, mask_ptr, t_stride, mask_stride, MASKED)
        tl.store(at, tl.where(keep, z * up, 0.0), mask=inside)
        chosen, up_tile = next_chosen, next_tile


@triton.jit
def _add_row(y, weights, h_ptr, rows, here):
    """y [COLS] += one row of h at these neurons times their weights [R, COLS]."""
    h = tl.load(h_ptr + rows, mask=here, other=0.0)
    return y + tl.sum(weights * h[:, None], axis=0)


@triton.jit
def down(
    down_ptr, index_ptr, count_ptr, h_ptr, partial_ptr,
    m, capacity, lists,
    d: tl.constexpr, COLS: tl.constexpr, R: tl.constexpr, B: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """h W_down for B <= 4 rows: program (split, tile) sums lists split, split + splits, ... for COLS columns.

    Pointers: down [m, d]; index, count and h from `gate_up` (`lists` of them); partial (float32)
    [splits, B, d], summed by `decode.sum_partials`.
    """
    tiles = tl.cdiv(d, COLS)
    split = tl.program_id(0) // tiles
    splits = tl.num_programs(0) // tiles
    cols = tl.program_id(0) % tiles * COLS + tl.arange(0, COLS)
    k = tl.arange(0, R)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    y0 = tl.zeros([COLS], dtype=tl.float32)
    y1 = tl.zeros([COLS], dtype=tl.float32)
    y2 = tl.zeros([COLS], dtype=tl.float32)
    y3 = tl.zeros([COLS], dtype=tl.float32)
    for i in range(split, lists, splits):
        count = tl.load(count_ptr + i)
        own = i * capacity
        rows = tl.load(index_ptr + own + k, mask=k < count, other=0)
        tile = load_rows(down_ptr, rows, k < count, cols, d, D=COLS)
        for first in range(0, count, R):
            here = first + k < count
            later = first + R + k
            next_rows = tl.load(index_ptr + own + later, mask=later < count, other=0)
            next_tile = load_rows(down_ptr, next_rows, later < count, cols, d, D=COLS)
            weights = tile.to(tl.float32)
            y0 = _add_row(y0, weights, h_ptr, rows, here)
            if B > 1:
                y1 = _add_row(y1, weights, h_ptr + m, rows, here)
            if B > 2:
                y2 = _add_row(y2, weights, h_ptr + 2 * m, rows, here)
            if B > 3:
                y3 = _add_row(y3, weights, h_ptr + 3 * m, rows, here)
            rows, tile = next_rows, next_tile
    at = partial_ptr + split * B * d + cols
    tl.store(at, y0, mask=cols < d)
    if B > 1:
        tl.store(at + d, y1, mask=cols < d)
    if B > 2:
        tl.store(at + 2 * d, y2, mask=cols < d)
    if B > 3:
        tl.store(at + 3 * d, y3, mask=cols < d)


def launch(x, w_gate, w_up, w_down_t, threshold, activation, mask, out_dtype, config=None):
    """y [B, d] for x [B, d], B <= 4; three launches, of which the third touches no weights."""
    arguments = x, w_gate, w_up, threshold, activation, mask
    c = config or tuning.few_config(x.device, x.shape[1], x.element_size())
    if len(x) >= c["tensor_rows"]:
        other = tuning.batch_config(x.device, x.element_size())
        arrivals = torch.empty(0, dtype=torch.int32, device=x.device)
        _, h, lists = batch.launch_gate_up(*arguments, arrivals, other)
    else:
        h, lists = launch_gate_up(*arguments, c)
    return launch_down(h, lists, w_down_t, out_dtype, c)


def launch_gate_up(x, w_gate, w_up, threshold, activation, mask, c):
    """h [B, m] float32, written for the neurons in the lists; the lists: index [P, capacity], count [P]."""
    rows, d = x.shape
    m, device = len(w_gate), x.device
    programs = min(c["programs"], triton.cdiv(m, c["rows"]))
    capacity = triton.cdiv(triton.cdiv(m, c["rows"]), programs) * c["rows"]
    index = torch.empty(programs, capacity, dtype=torch.int32, device=device)
    count = torch.empty(programs, dtype=torch.int32, device=device)
    h = torch.empty(rows, m, dtype=torch.float32, device=device)
    pdl = tuning.has_pdl(device)
    extra = {"launch_pdl": True, "maxnreg": c["registers"]} if pdl else {}
    gate_up[(programs,)](
        x, w_gate, w_up, threshold, x if mask is None else mask.view(torch.uint8), index, count, h,
        m, capacity, threshold.stride(0) if threshold.dim() else 0,
        mask.stride(0) if mask is not None and mask.dim() == 2 else 0,
        d=d, D=triton.next_power_of_2(d), R=c["rows"], B=rows, PAD=triton.next_power_of_2(rows),
        KIND=activation, MASKED=mask is not None, PDL=pdl, num_warps=c["warps"], **extra,
    )  # fmt: skip
    return h, (index, count)


def launch_down(h, lists, w_down_t, out_dtype, c):
    """y [B, d] = h W_down over the neurons in the lists."""
    index, count = lists
    rows, (m, d), device = len(h), w_down_t.shape, h.device
    tiles = triton.cdiv(d, c["cols"])
    splits = max(1, min(c["programs"] // tiles, len(index)))
    partial = torch.empty(splits, rows, d, dtype=torch.float32, device=device)
    y = torch.empty(rows, d, dtype=out_dtype, device=device)
    pdl = tuning.has_pdl(device)
    extra = {"launch_pdl": True, "maxnreg": c["registers"]} if pdl else {}
    down[(splits * tiles,)](
        w_down_t, index, count, h, partial, m, index.shape[1], len(index),
        d=d, COLS=c["cols"], R=c["take"], B=rows, PDL=pdl, num_warps=c["warps"], **extra,
    )  # fmt: skip
    decode.launch_sum(partial.view(splits, rows * d), y, pdl)
    return y
