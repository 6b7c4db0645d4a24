"""CATS around a centre (rule `centred`): kept neurons add act(gate) - c, dropped ones one product with A.

With z = act(x W_gate), y = x A + sum over neurons with |z_j - c_j| >= t_j of (z_j - c_j) (x W_up)_j W_down,j;
A [d, d] = sum_j c_j W_up,j W_down,j^T holds what all neurons would add at their centres. Rows of A are read
with those of the survivors, by the same programs. One row of x; more are dense products.
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from cats_kernels import decode, op, reference, tuning
from cats_kernels.primitives import activate, load_rows, survives


def centred_mlp(
    x: torch.Tensor,
    w_gate: torch.Tensor,
    w_up: torch.Tensor,
    w_down_t: torch.Tensor,
    shared: torch.Tensor,
    centre: torch.Tensor,
    threshold: torch.Tensor,
    activation: str = "silu",
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """y [B, d] of the centred gated MLP; for B = 1 on a GPU only surviving rows of W_up and W_down are read.

    x, the weights, `activation` and `out_dtype` as `cats_kernels.cats_mlp`; shared [d, d] is A, contiguous,
    of their dtype; centre [m] float32; threshold [] or [m], compared with |act(x W_gate) - centre| in float32
    (kept at equality; NaN kept). Bit-equal from run to run. Raises ValueError where shapes, dtypes, devices
    or layouts do not fit.
    """
    return torch.ops.cats.centred_mlp(
        x, w_gate, w_up, w_down_t, shared, centre, threshold, activation, out_dtype
    )


def at_centres(w_up: torch.Tensor, w_down_t: torch.Tensor, centre: torch.Tensor) -> torch.Tensor:
    """A [d, d] in float32, from w_up and w_down_t [m, d] of any dtype and centre [m]."""
    return (w_up.float() * centre[:, None]).t() @ w_down_t.float()


def dense(x, w_gate, w_up, w_down_t, shared, centre, threshold, activation, out_dtype=None, accumulate=None):
    """The same by dense products, in the dtype `accumulate` where given, else in that of the weights."""
    kind = accumulate or x.dtype
    exact = torch.float32 if accumulate is None else accumulate
    x, w_gate, w_up, w_down_t, shared = (part.to(kind) for part in (x, w_gate, w_up, w_down_t, shared))
    z = reference.ACTIVATIONS[activation](F.linear(x, w_gate).to(exact)) - centre.to(exact)
    keep = reference.survivors(z, threshold.to(exact))
    h = torch.where(keep, z * F.linear(x, w_up), 0.0)
    return (x @ shared + h.to(kind) @ w_down_t).to(kind if out_dtype is None else out_dtype)


@triton.jit
def rows(
    x_ptr, shared_ptr, gate_ptr, up_ptr, down_ptr, centre_ptr, threshold_ptr,
    index_ptr, value_ptr, partial_ptr,
    m, capacity, t_stride,
    d: tl.constexpr, D: tl.constexpr, R: tl.constexpr, KIND: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """As `decode.gate_up_down`, around centres; program p owns tiles p, p + P, ... of R rows of A as well.

    Pointers: x [d], shared [d, d], gate/up/down [m, d], centre [m], threshold [] or [m], all contiguous in d;
    index (int32) and value (float32) [P, capacity] are private lists; partial (float32) [P, d].
    """
    p = tl.program_id(0)
    programs = tl.num_programs(0)
    cols = tl.arange(0, D)
    k = tl.arange(0, R)
    own = p * capacity
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    at = p * R + k
    tile = load_rows(gate_ptr, at, at < m, cols, d, D)
    if PDL:
        tl.extra.cuda.gdc_wait()
    count = 0
    for first in range(p * R, m, programs * R):
        next_at = first + programs * R + k
        next_tile = load_rows(gate_ptr, next_at, next_at < m, cols, d, D)
        wanted = at < m
        c = tl.load(centre_ptr + at, mask=wanted, other=0.0).to(tl.float32)
        t = tl.load(threshold_ptr + at * t_stride, mask=wanted, other=0.0).to(tl.float32)
        x = tl.load(x_ptr + cols, mask=cols < d, other=0.0).to(tl.float32)
        z = activate(tl.sum(tile.to(tl.float32) * x[None, :], axis=1), KIND) - c
        keep = wanted & survives(z, t)
        kept = keep.to(tl.int32)
        slot = own + count + tl.cumsum(kept, axis=0) - kept
        tl.store(index_ptr + slot, at, mask=keep)
        tl.store(value_ptr + slot, z, mask=keep)
        count += tl.sum(kept, axis=0)
        at, tile = next_at, next_tile
    tl.debug_barrier()  # the lists are read by other threads than wrote them

    y = tl.zeros([D], dtype=tl.float32)
    for first in range(p * R, d, programs * R):
        here = first + k
        a = load_rows(shared_ptr, here, here < d, cols, d, D)
        by = tl.load(x_ptr + here, mask=here < d, other=0.0).to(tl.float32)
        y += tl.sum(a.to(tl.float32) * by[:, None], axis=0)
    chosen = tl.load(index_ptr + own + k, mask=k < count, other=0)
    for first in range(0, count, R):
        here = first + k
        up = load_rows(up_ptr, chosen, here < count, cols, d, D)
        down = load_rows(down_ptr, chosen, here < count, cols, d, D)
        z = tl.load(value_ptr + own + here, mask=here < count, other=0.0)
        chosen = tl.load(index_ptr + own + here + R, mask=here + R < count, other=0)
        x = tl.load(x_ptr + cols, mask=cols < d, other=0.0).to(tl.float32)
        h = tl.where(here < count, z * tl.sum(up.to(tl.float32) * x[None, :], axis=1), 0.0)
        y += tl.sum(down.to(tl.float32) * h[:, None], axis=0)
    tl.store(partial_ptr + p * d + cols, y, mask=cols < d)


def launch(x, w_gate, w_up, w_down_t, shared, centre, threshold, activation, out_dtype):
    """y [1, d] for x [1, d]; two launches, of which the second touches no weights."""
    m, d = w_gate.shape
    config = tuning.decode_config(x.device, d, w_gate.element_size())
    size = config["rows"]
    programs = min(config["programs"], triton.cdiv(m, size))
    capacity = triton.cdiv(triton.cdiv(m, size), programs) * size
    index = torch.empty(programs * capacity, dtype=torch.int32, device=x.device)
    value = torch.empty(programs * capacity, dtype=torch.float32, device=x.device)
    partial = torch.empty(programs, d, dtype=torch.float32, device=x.device)
    y = torch.empty(1, d, dtype=out_dtype, device=x.device)
    pdl = tuning.has_pdl(x.device)
    extra = {"launch_pdl": True} if pdl else {}
    rows[(programs,)](
        x, shared, w_gate, w_up, w_down_t, centre, threshold, index, value, partial,
        m, capacity, threshold.stride(0) if threshold.dim() else 0,
        d=d, D=triton.next_power_of_2(d), R=size, KIND=activation, PDL=pdl,
        num_warps=config["warps"], **extra,
    )  # fmt: skip
    decode.launch_sum(partial, y, pdl)
    return y


def _check(x, w_gate, w_up, w_down_t, shared, centre, threshold, activation) -> None:
    op._check(x, w_gate, w_up, w_down_t, threshold, activation, None)
    m, d = w_gate.shape
    if shared.shape != (d, d) or shared.dtype != x.dtype or not shared.is_contiguous():
        raise ValueError(f"shared must be contiguous [{d}, {d}] of {x.dtype}, not {list(shared.shape)}.")
    if centre.shape != (m,) or centre.dtype != torch.float32 or not centre.is_contiguous():
        raise ValueError(f"centre must be contiguous float32 [{m}], not {list(centre.shape)}.")
    if shared.device != x.device or centre.device != x.device:
        raise ValueError(f"shared and centre must be on {x.device}, where x is: move them.")


def _run(x, w_gate, w_up, w_down_t, shared, centre, threshold, activation, out_dtype=None):
    arguments = w_gate, w_up, w_down_t, shared, centre, threshold, activation
    _check(x, *arguments)
    out_dtype = x.dtype if out_dtype is None else out_dtype
    if x.shape[0] == 1 and (x.is_cuda or triton.knobs.runtime.interpret):
        return launch(x.contiguous(), *arguments, out_dtype)
    return dense(x, *arguments, out_dtype)


def _fake(x, w_gate, w_up, w_down_t, shared, centre, threshold, activation, out_dtype=None):
    return torch.empty(x.shape, dtype=x.dtype if out_dtype is None else out_dtype, device=x.device)


torch.library.define(
    "cats::centred_mlp",
    "(Tensor x, Tensor w_gate, Tensor w_up, Tensor w_down_t, Tensor shared, Tensor centre, Tensor threshold, "
    "str activation, ScalarType? out_dtype=None) -> Tensor",
    tags=torch.Tag.pt2_compliant_tag,
)
for _device in ("cuda", "cpu"):
    torch.library.impl("cats::centred_mlp", _device, _run)
torch.library.register_fake("cats::centred_mlp", _fake)
