"""CATS around a centre (rule `centred`): kept neurons add act(gate) - c, dropped ones one product with A.

With z = act(x W_gate), y = x A + sum over neurons with |z_j - c_j| >= t_j of (z_j - c_j) (x W_up)_j W_down,j;
A [d, d] = sum_j c_j W_up,j W_down,j^T holds what all neurons would add at their centres. Rows of A are read
with those of the survivors, by the same programs. One row of x; more are dense products.
"""

import torch
import torch.nn.functional as F
import triton

from cats_kernels import decode, op, reference


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


def launch(x, w_gate, w_up, w_down_t, shared, centre, threshold, activation, out_dtype):
    """y [1, d] for x [1, d], by the kernel of one row."""
    around = {"centre": centre, "shared": shared}
    return decode.launch(x, w_gate, w_up, w_down_t, threshold, activation, None, out_dtype, **around)


def _check(x, w_gate, w_up, w_down_t, shared, centre, threshold, activation, out_dtype) -> None:
    op.check(x, w_gate, w_up, w_down_t, threshold, activation, None, out_dtype)
    m, d = w_gate.shape
    if shared.shape != (d, d) or shared.dtype != x.dtype or not shared.is_contiguous():
        raise ValueError(f"shared must be contiguous [{d}, {d}] of {x.dtype}, not {list(shared.shape)}.")
    if centre.shape != (m,) or centre.dtype != torch.float32 or not centre.is_contiguous():
        raise ValueError(f"centre must be contiguous float32 [{m}], not {list(centre.shape)}.")
    if shared.device != x.device or centre.device != x.device:
        raise ValueError(f"shared and centre must be on {x.device}, where x is: move them.")


def _run(x, w_gate, w_up, w_down_t, shared, centre, threshold, activation, out_dtype=None):
    arguments = w_gate, w_up, w_down_t, shared, centre, threshold, activation
    _check(x, *arguments, out_dtype)
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
