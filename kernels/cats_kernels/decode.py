"""One row (section 3.2 of the paper, batch 1): gate, threshold, and the surviving rows of up and down."""

import torch
import triton
import triton.language as tl

from cats_kernels import tuning
from cats_kernels.primitives import activate, load_rows, survives


@triton.jit
def gate_up_down(
    x_ptr, gate_ptr, up_ptr, down_ptr, threshold_ptr, mask_ptr,
    index_ptr, value_ptr, partial_ptr,
    m, capacity, t_stride,
    d: tl.constexpr, D: tl.constexpr, GATE_ROWS: tl.constexpr, TAKE: tl.constexpr,
    KIND: tl.constexpr, MASKED: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Program p owns blocks p, p + P, ... of GATE_ROWS neurons; it lists its survivors, then sums them.

    Pointers: x [d], gate/up/down [m, d], threshold [] or [m], mask [m] of bytes or unused, all contiguous
    in d; index (int32) and value (float32) [P, capacity] are private lists; partial (float32) [P, d].
    """
    p = tl.program_id(0)
    programs = tl.num_programs(0)
    cols = tl.arange(0, D)
    r = tl.arange(0, GATE_ROWS)
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    x = tl.load(x_ptr + cols, mask=cols < d, other=0.0).to(tl.float32)

    rows = p * GATE_ROWS + r
    wanted = rows < m
    if MASKED:
        wanted = wanted & (tl.load(mask_ptr + rows, mask=wanted, other=0) != 0)
    tile = load_rows(gate_ptr, rows, wanted, cols, d, D)
    count = 0
    own = p * capacity
    for block in range(p, tl.cdiv(m, GATE_ROWS), programs):
        next_rows = (block + programs) * GATE_ROWS + r
        next_wanted = next_rows < m
        if MASKED:
            next_wanted = next_wanted & (tl.load(mask_ptr + next_rows, mask=next_wanted, other=0) != 0)
        next_tile = load_rows(gate_ptr, next_rows, next_wanted, cols, d, D)
        z = activate(tl.sum(tile.to(tl.float32) * x[None, :], axis=1), KIND)
        if MASKED:
            keep = wanted
        else:
            t = tl.load(threshold_ptr + rows * t_stride, mask=wanted, other=0.0).to(tl.float32)
            keep = wanted & survives(z, t)
        kept = keep.to(tl.int32)
        slot = own + count + tl.cumsum(kept, axis=0) - kept
        tl.store(index_ptr + slot, rows, mask=keep)
        tl.store(value_ptr + slot, z, mask=keep)
        count += tl.sum(kept, axis=0)
        rows, wanted, tile = next_rows, next_wanted, next_tile
    tl.debug_barrier()

    k = tl.arange(0, TAKE)
    chosen = tl.load(index_ptr + own + k, mask=k < count, other=0)
    up = load_rows(up_ptr, chosen, k < count, cols, d, D)
    down = load_rows(down_ptr, chosen, k < count, cols, d, D)
    y = tl.zeros([D], dtype=tl.float32)
    for first in range(0, count, TAKE):
        here = first + k
        later = here + TAKE
        z = tl.load(value_ptr + own + here, mask=here < count, other=0.0)
        chosen = tl.load(index_ptr + own + later, mask=later < count, other=0)
        next_up = load_rows(up_ptr, chosen, later < count, cols, d, D)
        next_down = load_rows(down_ptr, chosen, later < count, cols, d, D)
        h = tl.where(here < count, z * tl.sum(up.to(tl.float32) * x[None, :], axis=1), 0.0)
        y += tl.sum(down.to(tl.float32) * h[:, None], axis=0)
        up, down = next_up, next_down
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


def launch(x, w_gate, w_up, w_down_t, threshold, activation, mask, out_dtype):
    """y [1, d] for x [1, d]; two launches, of which the second touches no weights."""
    m, d = w_gate.shape
    config = tuning.decode_config(x.device, m, d)
    programs = min(config["programs"], triton.cdiv(m, config["gate_rows"]))
    capacity = triton.cdiv(triton.cdiv(m, config["gate_rows"]), programs) * config["gate_rows"]
    index = torch.empty(programs * capacity, dtype=torch.int32, device=x.device)
    value = torch.empty(programs * capacity, dtype=torch.float32, device=x.device)
    partial = torch.empty(programs * d, dtype=torch.float32, device=x.device)
    y = torch.empty(1, d, dtype=out_dtype, device=x.device)
    pdl = tuning.has_pdl(x.device)
    extra = {"launch_pdl": True} if pdl else {}
    gate_up_down[(programs,)](
        x, w_gate, w_up, w_down_t, threshold, x if mask is None else mask.view(torch.uint8),
        index, value, partial,
        m, capacity, threshold.stride(0) if threshold.dim() else 0,
        d=d, D=triton.next_power_of_2(d), GATE_ROWS=config["gate_rows"], TAKE=config["take"],
        KIND=activation, MASKED=mask is not None, PDL=pdl, num_warps=config["warps"], **extra,
    )  # fmt: skip
    sum_partials[(triton.cdiv(d, 32),)](
        partial, y, programs, d=d, COLS=32, STEP=64, PDL=pdl, num_warps=4, **extra
    )
    return y
