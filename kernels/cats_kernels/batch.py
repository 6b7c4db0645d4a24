"""Up to 16 rows, of several sequences or tokens of one: the union of their survivors, on tensor cores."""

import torch
import triton
import triton.language as tl

from cats_kernels import tuning
from cats_kernels.primitives import activate, keeps, load_rows

# Triton's interpreter multiplies the bit patterns of bfloat16 (3.6, 3.7): there, operands are widened first.
_WIDEN = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def _dot(a, b):
    """a b in float32, operands in their own dtype (no tf32).

    The caller adds tiles up: a tensor core that adds to what it holds truncates, 1e-5 after 4096 columns. The
    limit on imprecise sums says so to Triton, which else makes the addition part of the product again.
    """
    if _WIDEN:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, input_precision="ieee", max_num_imprecise_acc=a.shape[1])


@triton.jit
def _rows_times_x(
    base, rows, wanted, x_ptr, b, batch,
    d: tl.constexpr, COLS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """[R, PAD] float32: rows [R] of a weight matrix [m, d] times x [batch, d], padded with zeros."""
    acc = tl.zeros([rows.shape[0], b.shape[0]], dtype=tl.float32)
    for first in tl.range(0, d, COLS, num_stages=STAGES):
        cols = first + tl.arange(0, COLS)
        tile = load_rows(base, rows, wanted, cols, d, COLS)
        inside = (cols < d)[:, None] & (b < batch)[None, :]
        x = tl.load(x_ptr + b[None, :] * d + cols[:, None], mask=inside, other=0.0)
        acc += _dot(tile, x)
    return acc


@triton.jit(do_not_specialize=["m", "batch", "capacity", "mask_stride", "arrivals"])
def gate_up(
    x_ptr, gate_ptr, up_ptr, threshold_ptr, mask_ptr,
    index_ptr, count_ptr, needed_ptr, h_ptr, arrivals_ptr,
    m, batch, capacity, t_stride, mask_stride, arrivals,
    d: tl.constexpr, PAD: tl.constexpr,
    GATE_ROWS: tl.constexpr, GATE_COLS: tl.constexpr, GATE_STAGES: tl.constexpr,
    UP_ROWS: tl.constexpr, UP_COLS: tl.constexpr, UP_STAGES: tl.constexpr,
    KIND: tl.constexpr, MASKED: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """h = CATS(act(x W_gate)) * (x W_up) where any row survives; program p owns neurons p, p + P, p + 2P, ...

    Pointers: x [batch, d], gate/up [m, d], threshold [] or [m], mask [m] or [batch, m] of bytes, or unused;
    index (int32) [P, capacity], private lists, and count (int32) [P], their lengths; needed (bytes) [m], the
    union; h (float32) [batch, m], written where needed; arrivals (int32), set to zero for `down`.
    Neighbouring neurons go to different programs, so that clustered survivors are shared out.
    """
    p = tl.program_id(0)
    programs = tl.num_programs(0)
    b = tl.arange(0, PAD)
    own = p * capacity
    owned = tl.cdiv(m - p, programs)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    if p == 0:
        for i in range(arrivals):
            tl.store(arrivals_ptr + i, 0)

    count = 0
    for first in range(0, owned, GATE_ROWS):
        place = first + tl.arange(0, GATE_ROWS)
        rows = p + place * programs
        inside = (place < owned)[:, None] & (b < batch)[None, :]
        wanted = place < owned
        if MASKED:
            given = keeps(b, rows, b, inside, threshold_ptr, mask_ptr, t_stride, mask_stride, MASKED)
            wanted = tl.max(given.to(tl.int32), axis=1) != 0
        z = _rows_times_x(gate_ptr, rows, wanted, x_ptr, b, batch, d, GATE_COLS, GATE_STAGES)
        z = activate(z, KIND)
        keep = keeps(z, rows, b, inside, threshold_ptr, mask_ptr, t_stride, mask_stride, MASKED)
        kept = tl.max(keep.to(tl.int32), axis=1)
        tl.store(needed_ptr + rows, kept.to(tl.uint8), mask=place < owned)
        tl.store(h_ptr + b[None, :] * m + rows[:, None], z, mask=inside)
        tl.store(index_ptr + own + count + tl.cumsum(kept, axis=0) - kept, rows, mask=kept != 0)
        count += tl.sum(kept, axis=0)
    tl.store(count_ptr + p, count)
    tl.debug_barrier()

    for first in range(0, count, UP_ROWS):
        place = first + tl.arange(0, UP_ROWS)
        rows = tl.load(index_ptr + own + place, mask=place < count, other=0)
        up = _rows_times_x(up_ptr, rows, place < count, x_ptr, b, batch, d, UP_COLS, UP_STAGES)
        inside = (place < count)[:, None] & (b < batch)[None, :]
        at = h_ptr + b[None, :] * m + rows[:, None]
        z = tl.load(at, mask=inside, other=0.0)
        keep = keeps(z, rows, b, inside, threshold_ptr, mask_ptr, t_stride, mask_stride, MASKED)
        tl.store(at, tl.where(keep, z * up, 0.0), mask=inside)


@triton.jit(do_not_specialize=["m", "batch", "capacity"])
def down(
    down_ptr, needed_ptr, h_ptr, list_ptr, partial_ptr, arrivals_ptr, y_ptr,
    m, batch, capacity,
    d: tl.constexpr, PAD: tl.constexpr, COLS: tl.constexpr, TAKE: tl.constexpr, SCAN: tl.constexpr,
    SPLITS: tl.constexpr, STAGES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """y [batch, d] = h W_down over the needed neurons; program (tile, split) sums its share for COLS columns.

    A split owns every SPLITS-th run of 32 neurons. Pointers: down [m, d]; needed (bytes) [m] and h (float32)
    [batch, m] from `gate_up`; list (int32) [programs, capacity]; partial (float32) [SPLITS, batch, d]. The
    last split of a column tile to arrive adds up the partial sums in their order: who is last is no matter.
    """
    tiles = tl.cdiv(d, COLS)
    tile = tl.program_id(0) % tiles
    split = tl.program_id(0) // tiles
    cols = tile * COLS + tl.arange(0, COLS)
    b = tl.arange(0, PAD)
    own = tl.program_id(0) * capacity
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()

    count = 0
    for first in range(0, capacity, SCAN):
        i = first + tl.arange(0, SCAN)
        rows = (i // 32 * SPLITS + split) * 32 + i % 32
        kept = tl.load(needed_ptr + rows, mask=(i < capacity) & (rows < m), other=0).to(tl.int32)
        tl.store(list_ptr + own + count + tl.cumsum(kept, axis=0) - kept, rows, mask=kept != 0)
        count += tl.sum(kept, axis=0)
    tl.debug_barrier()

    kind = down_ptr.dtype.element_ty
    acc = tl.zeros([PAD, COLS], dtype=tl.float32)
    for first in tl.range(0, count, TAKE, num_stages=STAGES):
        place = first + tl.arange(0, TAKE)
        rows = tl.load(list_ptr + own + place, mask=place < count, other=0)
        weights = load_rows(down_ptr, rows, place < count, cols, d, COLS)
        inside = (b < batch)[:, None] & (place < count)[None, :]
        h = tl.load(h_ptr + b[:, None] * m + rows[None, :], mask=inside, other=0.0)
        # three 16-bit numbers add up to h in float32; rounding it to one would cost 2e-3 of the result
        for _ in tl.static_range(1 if kind == tl.float32 else 3):
            part = h.to(kind)
            acc += _dot(part, weights)
            h = tl.where(part.to(tl.float32) == h, 0.0, h - part.to(tl.float32))

    place = b[:, None] * d + cols[None, :]
    inside = (b < batch)[:, None] & (cols < d)[None, :]
    if SPLITS > 1:
        tl.store(partial_ptr + split * batch * d + place, acc, mask=inside)
        tl.debug_barrier()  # all threads have stored before one of them says so
        before = tl.atomic_add(arrivals_ptr + tile, 1, sem="acq_rel", scope="gpu")
        if before == SPLITS - 1:
            total = tl.zeros([PAD, COLS], dtype=tl.float32)
            for i in tl.static_range(SPLITS):
                total += tl.load(
                    partial_ptr + i * batch * d + place, mask=inside, other=0.0, cache_modifier=".cg"
                )
            tl.store(y_ptr + place, total.to(y_ptr.dtype.element_ty), mask=inside)
    else:
        tl.store(y_ptr + place, acc.to(y_ptr.dtype.element_ty), mask=inside)


def launch(x, w_gate, w_up, w_down_t, threshold, activation, mask, out_dtype, config=None):
    """y [B, d] for x [B, d], 2 <= B <= 16; two launches, weights of a neuron read once for all rows."""
    c = config or tuning.batch_config(x.device, x.element_size())
    arrivals = torch.empty(triton.cdiv(x.shape[1], c["cols"]), dtype=torch.int32, device=x.device)
    needed, h, _ = launch_gate_up(x, w_gate, w_up, threshold, activation, mask, arrivals, c)
    return launch_down(h, needed, w_down_t, arrivals, out_dtype, c)


def launch_gate_up(x, w_gate, w_up, threshold, activation, mask, arrivals, c):
    """needed [m] bytes; h [B, m] float32, written where needed; (index, count). Sets arrivals to zero."""
    batch, d = x.shape
    m, device = len(w_gate), x.device
    programs = min(c["programs"], triton.cdiv(m, 8))
    capacity = triton.cdiv(m, programs)
    index = torch.empty(programs, capacity, dtype=torch.int32, device=device)
    count = torch.empty(programs, dtype=torch.int32, device=device)
    needed = torch.empty(m, dtype=torch.uint8, device=device)
    h = torch.empty(batch, m, dtype=torch.float32, device=device)
    pdl = tuning.has_pdl(device)
    extra = {"launch_pdl": True} if pdl else {}
    gate_up[(programs,)](
        x, w_gate, w_up, threshold, x if mask is None else mask.view(torch.uint8),
        index, count, needed, h, arrivals, m, batch, capacity, threshold.stride(0) if threshold.dim() else 0,
        mask.stride(0) if mask is not None and mask.dim() == 2 else 0, len(arrivals),
        d=d, PAD=16, GATE_ROWS=c["gate_rows"], GATE_COLS=c["gate_cols"], GATE_STAGES=c["gate_stages"],
        UP_ROWS=c["up_rows"], UP_COLS=c["up_cols"], UP_STAGES=c["up_stages"],
        KIND=activation, MASKED=mask is not None, PDL=pdl, num_warps=c["warps"], **extra,
    )  # fmt: skip
    return needed, h, (index, count)


def launch_down(h, needed, w_down_t, arrivals, out_dtype, c):
    """y [B, d] = h W_down over the needed neurons; arrivals must hold zeros."""
    batch, (m, d), device = len(h), w_down_t.shape, h.device
    tiles = triton.cdiv(d, c["cols"])
    runs = triton.cdiv(m, 32)
    splits = max(1, min(c["down_programs"] // tiles, runs))
    capacity = triton.cdiv(runs, splits) * 32
    lists = torch.empty(tiles * splits * capacity, dtype=torch.int32, device=device)
    partial = torch.empty(splits * batch * d if splits > 1 else 1, dtype=torch.float32, device=device)
    y = torch.empty(batch, d, dtype=out_dtype, device=device)
    pdl = tuning.has_pdl(device)
    extra = {"launch_pdl": True} if pdl else {}
    down[(tiles * splits,)](
        w_down_t, needed, h, lists, partial, arrivals, y, m, batch, capacity,
        d=d, PAD=16, COLS=c["cols"], TAKE=c["take"], SCAN=min(4096, triton.next_power_of_2(capacity)),
        SPLITS=splits, STAGES=c["down_stages"], PDL=pdl, num_warps=c["down_warps"], **extra,
    )  # fmt: skip
    return y
