"""The thresholds of `neuron` with W_down fitted anew to the neurons that survive, by least squares."""

from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from cats.activation import ACTIVATIONS, CatsMLP, cats, unrounded
from cats.criteria.neuron import Neuron
from cats.criteria.pruning import State, block_inputs, blocks
from cats.criteria.rule import Fit
from cats.errors import CatsError

_FLOOR = 1e-3  # of the mean square of an output
RIDGE = 0.3  # of the diagonal of the survivors' second moments, which pulls W_down to what it was


@dataclass
class RefitFit(Fit):
    """Thresholds, and for each sparsity a W_down that makes up for what they drop.

    Block by block, with the blocks before sparse and fitted already. `drift` in [0, 1]: the share of the
    error made before the block that its W_down is to take back as well.
    """

    batches: list = field(default_factory=list)
    ridge: float = RIDGE
    drift: float = 0.0
    progress: bool = True
    _kept: list = field(default_factory=list)

    @torch.no_grad()
    def apply(self, model: nn.Module, sparsity: float) -> nn.Module:
        if self._kept:
            raise CatsError("W_down is fitted already: undo that first.")
        layers = blocks(model)
        states, dense = (block_inputs(model, layers, self.batches) for _ in range(2))
        super().apply(model, sparsity)
        bar = tqdm(layers, desc="fitting W_down", unit="block", disable=None if self.progress else True)
        for number, block in enumerate(bar):
            modules = [module for module in block.modules() if isinstance(module, CatsMLP)]
            if self.drift:
                for module in modules:
                    module.combine = partial(_product, module, 0.0)
                for state in dense:
                    state.advance(block, number)
            for module in modules:
                weight = getattr(module, module.layout.down).weight
                self._kept.append((weight, weight.detach().to("cpu", copy=True)))
                weight.add_(self._change(block, number, module, states, dense))
            for state in states:
                state.advance(block, number)
        return model

    @torch.no_grad()
    def undo(self, model: nn.Module) -> nn.Module:
        for weight, kept in self._kept:
            weight.copy_(kept)
        self._kept.clear()
        return super().undo(model)

    def describe(self) -> dict:
        return super().describe() | {"w_down": "least squares on the survivors", "ridge": self.ridge}

    def _change(self, block: nn.Module, number: int, module: CatsMLP, states: list[State], dense) -> Tensor:
        """What to add to W_down [d, m]: the ridge regression of what the mask took from the output on h."""
        weight = getattr(module, module.layout.down).weight
        size = module.intermediate_size
        moments = torch.zeros(size, size, device=weight.device)
        cross = torch.zeros(len(weight), size, device=weight.device)
        seen: list[tuple[Tensor, Tensor]] = []

        def combine(gate: Tensor, up: Tensor) -> Tensor:
            seen.append((_product(module, 0.0, gate, up), _product(module, module.threshold, gate, up)))
            return seen[-1][1]

        module.combine = combine
        for state, whole in zip(states, dense, strict=True):
            out = state.output(block, number)
            valid = state.valid.reshape(-1)
            full, h = (part.reshape(-1, size)[valid] for part in seen.pop())
            lost = ((full - h) @ weight.t()).float()
            scale = (full @ weight.t()).float().pow(2).sum(1, keepdim=True)
            if self.drift:
                behind = (whole.hidden - out).reshape(-1, len(weight))[valid].float()
                lost += self.drift * (behind - lost)
            root = (scale + _FLOOR * scale.mean()).rsqrt()  # of tokens with an output of any size alike
            h = h.float() * root
            moments.addmm_(h.t(), h)
            cross.addmm_((lost * root).t(), h)
        module.combine = None
        return ridge(moments, cross, self.ridge).to(weight.dtype)


def _product(module: CatsMLP, threshold: Tensor | float, gate: Tensor, up: Tensor) -> Tensor:
    act = ACTIVATIONS[module.activation]
    z = act(gate)
    return cats(z, threshold, unrounded(act, gate, z)) * up


def ridge(moments: Tensor, cross: Tensor, strength: float) -> Tensor:
    """cross (moments + strength diag(moments))^-1, [d, m], with zero for neurons that never survive.

    moments [m, m]: sum of h h^T; cross [d, m]: sum of y h^T.
    """
    scale = moments.diagonal().sqrt()
    scale = torch.where(scale > 0, 1 / scale, 0)
    scaled = moments * scale[:, None] * scale
    scaled.diagonal().add_(strength + (scale == 0))
    return torch.cholesky_solve((cross * scale).t(), torch.linalg.cholesky(scaled)).t() * scale


class Refit(Neuron):
    """The rule `refit`: the masks of `neuron`, the rows of W_down moved so that the survivors stand in."""

    name = "refit"
    title = "CATS per neuron, W_down fitted"
    what = (
        "the thresholds of `neuron`, and W_down by ridge regression of the dense MLP's output on what "
        "survives: the kernel and the bytes of CATS, other values in W_down"
    )

    def check(self, model: nn.Module) -> None:
        super().check(model)
        blocks(model)

    def calibrate(self, model, batches, *, source=None, progress=True) -> Fit:
        fit = super().calibrate(model, batches, source=source, progress=progress)
        return RefitFit(self.name, fit.thresholds, fit.allocation, batches=list(batches), progress=progress)


RULE = Refit()
