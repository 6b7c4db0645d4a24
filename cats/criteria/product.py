"""The masked product of a gated MLP with its zeros counted, one fused kernel on a GPU."""

from collections.abc import Callable
from functools import lru_cache, partial

import torch
from torch import Tensor

from cats.core import compilation
from cats.core.activation import ACTIVATIONS, dropped, replaced, unrounded


def counted_product(
    activation: str,
    gate: Tensor,
    up: Tensor,
    threshold: Tensor,
    masked: Tensor | None,
    centre: Tensor | None = None,
):
    """(CATS_t(act(gate)) * up, zeros of each row) for gate, up [N, m], threshold [1] or [m].

    `masked` [N, 1], None for all: rows where it is False keep every activation. Zeros are counted after the
    mask, exact ones included. With a `centre` [m], activations nearer to it than the threshold become it, and
    are what is counted.
    """
    z = ACTIVATIONS[activation](gate)
    drop = dropped(unrounded(ACTIVATIONS[activation], gate, z), threshold, centre)
    if masked is not None:
        drop = drop & masked
    kept = replaced(z, drop, centre)
    return kept * up, ((kept == 0) if centre is None else drop).sum(-1)


@lru_cache
def product_for(activation: str, device: str) -> Callable:
    """`counted_product` of an activation; on a GPU one kernel: eager, z would be read and written 8 times."""
    product = partial(counted_product, activation)
    if device != "cuda":
        return product
    compilation.allow(64)  # one for each shape of threshold, policy and kind of call
    compiled = torch.compile(product)

    def fused(gate: Tensor, up: Tensor, threshold: Tensor, masked: Tensor | None, centre: Tensor | None):
        for tensor in (gate, up) if masked is None else (gate, up, masked):
            torch._dynamo.maybe_mark_dynamic(tensor, 0)  # the number of tokens differs from call to call
        return compiled(gate, up, threshold, masked, centre)

    return fused
