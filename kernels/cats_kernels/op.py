"""The public op `cats::mlp`: checks, registration with `torch.library`, and the choice of kernel."""

import torch
import triton

from cats_kernels import cpu, reference, registry
from cats_kernels.registry import DTYPES, MAX_ROWS


def cats_mlp(
    x: torch.Tensor,
    w_gate: torch.Tensor,
    w_up: torch.Tensor,
    w_down_t: torch.Tensor,
    threshold: torch.Tensor,
    activation: str = "silu",
    mask: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """y [B, d] = (CATS_t(act(x W_gate)) * (x W_up)) W_down, reading only surviving rows of W_up and W_down.

    x [B, d] with 1 <= B <= 16; w_gate, w_up, w_down_t [m, d], contiguous in d; threshold a scalar tensor or
    [m], compared with |act(x W_gate)| in float32 (kept at equality; NaN kept); activation "silu", "gelu",
    "gelu_tanh" or "relu"; mask [m] or [B, m] of bool replaces the threshold. Sums are float32 and rounded
    once, to out_dtype (default: x.dtype). The result is bit-equal from run to run. On a GPU a neuron that
    one of several rows keeps is multiplied for all of them: NaN in its weights shows in every row.
    Raises ValueError where shapes, dtypes, devices or layouts do not fit.
    """
    return torch.ops.cats.mlp(x, w_gate, w_up, w_down_t, threshold, activation, mask, out_dtype)


def check(x, w_gate, w_up, w_down_t, threshold, activation, mask, out_dtype) -> None:
    """Raise ValueError, as `cats_mlp` says."""
    for name, dtype in (("x", x.dtype), ("threshold", threshold.dtype), ("out_dtype", out_dtype or x.dtype)):
        if dtype not in DTYPES:
            raise ValueError(f"{name} is {dtype}: choose float32, float64, bfloat16 or float16.")
    if x.dim() != 2 or x.shape[0] > MAX_ROWS:
        raise ValueError(
            f"cats_mlp takes x [B, d] with B <= {MAX_ROWS}, not {list(x.shape)}: reshape or split."
        )
    d = x.shape[1]
    m = w_gate.shape[0]
    for name, weight in (("w_gate", w_gate), ("w_up", w_up), ("w_down_t", w_down_t)):
        if weight.shape != (m, d):
            raise ValueError(f"{name} is {list(weight.shape)}, but x and w_gate ask for [{m}, {d}].")
        if not weight.is_contiguous():
            raise ValueError(
                f"{name} must be contiguous [m, d] (W_down is stored transposed): .contiguous()."
            )
        if weight.dtype != x.dtype or weight.device != x.device:
            raise ValueError(
                f"{name} is {weight.dtype} on {weight.device}, x is {x.dtype} on {x.device}: move one."
            )
    if threshold.shape not in ((), (m,)) or threshold.device != x.device:
        raise ValueError(f"threshold must be a scalar tensor or [{m}] on {x.device}.")
    if activation not in reference.ACTIVATIONS:
        raise ValueError(f"activation is {activation!r}; choose one of {sorted(reference.ACTIVATIONS)}.")
    masks = ((m,), (x.shape[0], m))
    if mask is not None and (mask.shape not in masks or mask.dtype != torch.bool or mask.device != x.device):
        raise ValueError(f"mask must be bool [{m}] or [{x.shape[0]}, {m}] on {x.device}.")


def _on_device(x, w_gate, w_up, w_down_t, threshold, activation, mask=None, out_dtype=None):
    check(x, w_gate, w_up, w_down_t, threshold, activation, mask, out_dtype)
    x = x.contiguous()
    if mask is not None:
        mask = mask.contiguous()
    out_dtype = x.dtype if out_dtype is None else out_dtype
    kernel = registry.choose(x.shape[0], w_gate.dtype)
    if kernel is None:
        exact = {"out_dtype": out_dtype, "accumulate": x.dtype}
        return reference.cats_mlp(x, w_gate, w_up, w_down_t, threshold, activation, mask, **exact)
    if mask is not None and x.shape[0] == 1:
        mask = mask.view(-1)
    return kernel.module.launch(x, w_gate, w_up, w_down_t, threshold, activation, mask, out_dtype)


def _on_cpu(x, w_gate, w_up, w_down_t, threshold, activation, mask=None, out_dtype=None):
    if triton.knobs.runtime.interpret:
        return _on_device(x, w_gate, w_up, w_down_t, threshold, activation, mask, out_dtype)
    check(x, w_gate, w_up, w_down_t, threshold, activation, mask, out_dtype)
    return cpu.cats_mlp(x, w_gate, w_up, w_down_t, threshold, activation, mask, out_dtype)


def _fake(x, w_gate, w_up, w_down_t, threshold, activation, mask=None, out_dtype=None):
    return torch.empty(x.shape, dtype=x.dtype if out_dtype is None else out_dtype, device=x.device)


torch.library.define(
    "cats::mlp",
    "(Tensor x, Tensor w_gate, Tensor w_up, Tensor w_down_t, Tensor threshold, str activation, "
    "Tensor? mask=None, ScalarType? out_dtype=None) -> Tensor",
    tags=torch.Tag.pt2_compliant_tag,
)
torch.library.impl("cats::mlp", "cuda", _on_device)
torch.library.impl("cats::mlp", "cpu", _on_cpu)
torch.library.register_fake("cats::mlp", _fake)
