"""Run a model over calibration batches while something watches what its MLPs contribute to the loss."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm.auto import tqdm

from cats.calibration.stream import watched
from cats.core.activation import CatsMLP
from cats.core.structure import cats_mlps


def stream_gradients(
    model: nn.Module, batches, see: Callable[[int, Tensor, Tensor], None], *, progress: bool = True
) -> int:
    """Call `see(layer, up, gradient)` with x W_up and the gradient of the summed loss to z (x W_up), [N,
    m].

    The loss is the negative log-likelihood of the text itself; padding has gradient zero. Returns valid
    tokens.
    """
    tokens = 0
    frozen = [parameter for parameter in model.parameters() if parameter.requires_grad]
    with watched(model):
        modules = cats_mlps(model)
        for parameter in frozen:
            parameter.requires_grad_(False)
        try:
            for layer, module in enumerate(modules):
                module.combine = _watching(layer, module, see)
            for batch in tqdm(
                batches, desc="observing gradients", unit="batch", disable=None if progress else True
            ):
                ids, mask = batch["input_ids"].to(model.device), batch["attention_mask"].to(model.device)
                with torch.enable_grad():
                    inputs = model.get_input_embeddings()(ids).detach().requires_grad_()
                    logits = model(inputs_embeds=inputs, attention_mask=mask, use_cache=False).logits
                    targets = ids[:, 1:].masked_fill(mask[:, 1:] == 0, -100)
                    F.cross_entropy(
                        logits[:, :-1].flatten(0, 1).float(), targets.flatten(), reduction="sum"
                    ).backward()
                tokens += int(batch["attention_mask"].sum())
        finally:
            for module in modules:
                module.combine = None
            for parameter in frozen:
                parameter.requires_grad_(True)
    return tokens


def _watching(layer: int, module: CatsMLP, see) -> Callable[[Tensor, Tensor], Tensor]:
    def combine(gate: Tensor, up: Tensor) -> Tensor:
        product = module.gate_act(gate) * up
        kept = up.detach().flatten(0, -2)
        product.register_hook(lambda gradient: see(layer, kept, gradient.flatten(0, -2)))
        return product

    return combine
