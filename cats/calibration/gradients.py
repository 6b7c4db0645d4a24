"""Run a model over calibration batches while something watches what its MLPs contribute to the loss."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cats.calibration.stream import read, watched
from cats.core.activation import CatsMLP
from cats.core.structure import cats_mlps


def stream_gradients(
    model: nn.Module, batches, see: Callable[[int, Tensor, Tensor], None], *, progress: bool = True
) -> int:
    """Call `see(layer, up, gradient)` with x W_up and the gradient of the loss to z (x W_up), each [N, m].

    The loss is the negative log-likelihood of the text itself, summed; padding has gradient zero. Returns the
    number of valid tokens.
    """
    tokens = 0
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    with watched(model):
        modules = cats_mlps(model)
        for parameter in trainable:
            parameter.requires_grad_(False)
        try:
            for layer, module in enumerate(modules):
                module.combine = _watching(layer, module, see)
            for ids, mask in read(batches, model.device, label="observing gradients", progress=progress):
                with torch.enable_grad():
                    inputs = model.get_input_embeddings()(ids).detach().requires_grad_()
                    logits = model(inputs_embeds=inputs, attention_mask=mask, use_cache=False).logits
                    targets = ids[:, 1:].masked_fill(mask[:, 1:] == 0, -100)
                    F.cross_entropy(
                        logits[:, :-1].flatten(0, 1).float(), targets.flatten(), reduction="sum"
                    ).backward()
                tokens += int(mask.sum())
        finally:
            for module in modules:
                module.combine = None
            for parameter in trainable:
                parameter.requires_grad_(True)
    return tokens


def _watching(layer: int, module: CatsMLP, see) -> Callable[[Tensor, Tensor], Tensor]:
    def combine(gate: Tensor, up: Tensor) -> Tensor:
        product = module.gate_act(gate) * up
        kept = up.detach().flatten(0, -2)
        product.register_hook(lambda gradient: see(layer, kept, gradient.flatten(0, -2)))
        return product

    return combine
