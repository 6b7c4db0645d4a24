"""The mask of a training step in one pass forward and one backward, with no more kept than gate and up."""

from collections.abc import Callable
from functools import lru_cache, partial

import torch
from torch import Tensor, nn

from cats.core.activation import ACTIVATIONS, CatsMLP, dropped, replaced, unrounded
from cats.core.structure import sparse_mlps

_aten = torch.ops.aten
# gradient of act(x) by x, from the gradient of act(x) and x
_SLOPES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "silu": _aten.silu_backward,
    "gelu": partial(_aten.gelu_backward, approximate="none"),
    "gelu_tanh": partial(_aten.gelu_backward, approximate="tanh"),
    "relu": lambda gradient, x: _aten.threshold_backward(gradient, x, 0),
}


class _MaskedProduct(torch.autograd.Function):
    """CATS_t(act(gate)) * up; z, its mask and its exact value are computed once more in the backward pass.

    Step by step, autograd keeps the mask, masked z and up beside gate, 5 bytes an activation in bf16; a dense
    MLP keeps z and up, 4. Here it is up alone, 2.
    """

    @staticmethod
    def forward(
        ctx, gate: Tensor, up: Tensor, threshold: Tensor, activation: str, centre: Tensor | None
    ) -> Tensor:
        ctx.save_for_backward(gate, up, threshold, centre)
        ctx.activation = activation
        return _fused(_forward, activation, gate, up, threshold, centre)

    @staticmethod
    def backward(ctx, gradient: Tensor):
        return *_fused(_backward, ctx.activation, *ctx.saved_tensors, gradient), None, None, None


def masked_product(
    gate: Tensor, up: Tensor, threshold: Tensor, activation: str, centre: Tensor | None = None
) -> Tensor:
    """CATS_t(act(gate)) * up, gate and up [..., m], as the sparse MLP computes it, to be trained through.

    threshold: fp32, [] or [m], which gets no gradient; `activation`: a key of `cats.activation.ACTIVATIONS`;
    `centre`: fp32 [m], a constant that what is nearer to it than the threshold becomes, in place of zero.
    On a CPU, value and gradients are those of `cats.activation.cats` bit for bit. On a GPU each is one
    kernel, in fp32 from the loads to the store; the comparison with t is the same.
    """
    return _MaskedProduct.apply(gate, up, threshold.reshape(-1), activation, centre)


def attach(model: nn.Module) -> None:
    """Let the sparse MLPs of `model` mask by `masked_product` until `detach`; a dense model has none."""
    for module in sparse_mlps(model):
        module.combine = partial(_combine, module)


def detach(model: nn.Module) -> None:
    """Let the sparse MLPs mask by themselves again, where they can be observed."""
    for module in sparse_mlps(model):
        module.combine = None


def _combine(module: CatsMLP, gate: Tensor, up: Tensor) -> Tensor:
    return masked_product(gate, up, module.threshold, module.activation, getattr(module, "centre", None))


def _forward(activation: str, gate: Tensor, up: Tensor, threshold: Tensor, centre: Tensor | None) -> Tensor:
    return _kept(activation, gate, threshold, centre)[0] * up


def _backward(
    activation: str, gate: Tensor, up: Tensor, threshold: Tensor, centre: Tensor | None, gradient: Tensor
):
    kept, drop = _kept(activation, gate, threshold, centre)
    by_z = (gradient * up).masked_fill(drop, 0)
    return _SLOPES[activation](by_z, gate), gradient * kept


def _kept(activation: str, gate: Tensor, threshold: Tensor, centre: Tensor | None) -> tuple[Tensor, Tensor]:
    """act(gate) with what is dropped set to zero or its centre, and which that is."""
    act = ACTIVATIONS[activation]
    z = act(gate)
    drop = dropped(unrounded(act, gate, z), threshold, centre)
    return replaced(z, drop, centre), drop


def _fused(function: Callable, *arguments):
    """One kernel on a GPU, by itself or as part of a layer that is compiled whole."""
    if arguments[1].is_cuda and not torch.compiler.is_compiling():
        function = _compiled(function)
    return function(*arguments)


_compiled = lru_cache(torch.compile)
