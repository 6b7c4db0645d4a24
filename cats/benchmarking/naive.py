"""CATS in obvious ways, as steps of the story: mask then dense, gather then multiply, one launch a stage."""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from cats_kernels.primitives import load_rows
from cats_kernels.reference import ACTIVATIONS, survivors


def mask_then_dense(x, w_gate, w_up, w_down_t, threshold, activation):
    """Everything is read and multiplied; zeros save nothing."""
    z = ACTIVATIONS[activation](F.linear(x, w_gate))
    z = z.masked_fill(~survivors(z.float(), threshold), 0)
    return (z * F.linear(x, w_up)) @ w_down_t


def gather_then_multiply(x, w_gate, w_up, w_down_t, threshold, activation):
    """Surviving neurons are copied, then multiplied: each is read, written and read again; the host waits."""
    z = ACTIVATIONS[activation](F.linear(x, w_gate))
    rows = survivors(z.float(), threshold).any(dim=0).nonzero().squeeze(1)
    up = F.linear(x, w_up.index_select(0, rows))
    z = z.index_select(1, rows)
    z = z.masked_fill(~survivors(z.float(), threshold), 0)
    return (z * up) @ w_down_t.index_select(0, rows)


@triton.jit
def _flagged_up(
    x_ptr, up_ptr, z_ptr, kept_ptr, h_ptr, m, d: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr
):
    """h [m] = z * (up x) for one block of neurons; a dropped neuron's row is masked off, its place is not."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    kept = tl.load(kept_ptr + rows, mask=rows < m, other=0) != 0
    total = tl.zeros([ROWS, COLS], dtype=tl.float32)
    for first in range(0, d, COLS):
        cols = first + tl.arange(0, COLS)
        x = tl.load(x_ptr + cols, mask=cols < d, other=0.0).to(tl.float32)
        total += load_rows(up_ptr, rows, kept, cols, d, COLS).to(tl.float32) * x[None, :]
    z = tl.load(z_ptr + rows, mask=kept, other=0.0).to(tl.float32)
    tl.store(h_ptr + rows, tl.where(kept, z * tl.sum(total, axis=1), 0.0), mask=rows < m)


@triton.jit
def _flagged_down(
    down_ptr, kept_ptr, h_ptr, y_ptr, m, d: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr
):
    """y [d] += h of one block of neurons times its rows of down, for one block of columns, by atomic adds."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    cols = tl.program_id(1) * COLS + tl.arange(0, COLS)
    kept = tl.load(kept_ptr + rows, mask=rows < m, other=0) != 0
    h = tl.load(h_ptr + rows, mask=kept, other=0.0)
    tile = load_rows(down_ptr, rows, kept, cols, d, COLS).to(tl.float32)
    tl.atomic_add(y_ptr + cols, tl.sum(tile * h[:, None], axis=0), mask=cols < d, sem="relaxed")


def separate_launches(x, w_gate, w_up, w_down_t, threshold, activation):
    """The stages of section 5 of the paper for one row: gate and flags by PyTorch, then one kernel each.

    Flags, z and h travel through memory between launches, and masked rows still occupy their tiles.
    """
    m, d = w_gate.shape
    z = ACTIVATIONS[activation](F.linear(x, w_gate))
    kept = survivors(z.float(), threshold)
    h = torch.empty(m, dtype=torch.float32, device=x.device)
    y = torch.zeros(d, dtype=torch.float32, device=x.device)
    rows, cols = 16, min(512, triton.next_power_of_2(d))
    grid = (triton.cdiv(m, rows),)
    _flagged_up[grid](x, w_up, z, kept.view(torch.uint8), h, m, d=d, ROWS=rows, COLS=cols, num_warps=8)
    _flagged_down[(*grid, triton.cdiv(d, cols))](
        w_down_t, kept.view(torch.uint8), h, y, m, d=d, ROWS=rows, COLS=cols, num_warps=8
    )
    return y[None].to(x.dtype)
