"""The ground truth in plain PyTorch: the CATS MLP of equation 5 for a few rows, in float32 or float64."""

import torch
import torch.nn.functional as F

ACTIVATIONS = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda z: F.gelu(z, approximate="tanh"),
    "relu": F.relu,
}


def survivors(z: torch.Tensor, threshold: torch.Tensor) -> torch.Tensor:
    """Boolean keep-mask of activations z [..., m]: True where |z| >= threshold, and where z is NaN."""
    return ~(z.abs() < threshold)


def cats_mlp(
    x: torch.Tensor,
    w_gate: torch.Tensor,
    w_up: torch.Tensor,
    w_down_t: torch.Tensor,
    threshold: torch.Tensor,
    activation: str = "silu",
    mask: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    accumulate: torch.dtype = torch.float32,
) -> torch.Tensor:
    """y [B, d] of the sparse gated MLP, every step in the dtype `accumulate`.

    x [B, d]; w_gate, w_up and w_down_t [m, d]; threshold [] or [m] for |act(x W_gate)|; mask [m] or [B, m],
    where given, replaces the threshold. The result is rounded once, to `out_dtype` (default: x.dtype).
    A neuron that a row drops contributes nothing to it, even where its weights up or down hold NaN.
    """
    x32 = x.to(accumulate)
    z = ACTIVATIONS[activation](x32 @ w_gate.to(accumulate).t())
    keep = survivors(z, threshold.to(accumulate)) if mask is None else mask.bool().expand_as(z)
    up = x32 @ w_up.to(accumulate).t()
    down = w_down_t.to(accumulate)
    y = torch.stack([(z * up)[i, kept] @ down[kept] for i, kept in enumerate(keep)]) if len(x) else x32
    return y.to(x.dtype if out_dtype is None else out_dtype)
