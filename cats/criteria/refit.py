"""The masks of another rule, with W_down fitted anew to the neurons that survive, by least squares."""

from dataclasses import dataclass, field
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from cats.calibration.blocks import BatchState, block_inputs, blocks
from cats.calibration.centred import root_size
from cats.core.activation import CatsMLP
from cats.core.structure import sparse_mlps
from cats.criteria.neuron import Combined, Neuron
from cats.criteria.product import counted_product
from cats.criteria.rule import ThresholdFit, register
from cats.errors import CatsError

RIDGE = 3.0  # of the diagonal of the survivors' second moments: how hard W_down is pulled to what it was


@dataclass
class RefitFit(ThresholdFit):
    """Thresholds, and for each sparsity a W_down that makes up for what they drop.

    Block by block, with the blocks before sparse and fitted already; what is fitted to is what the dense MLP
    makes of the same input.
    """

    batches: list = field(kw_only=True)
    progress: bool = field(default=True, kw_only=True)
    _dense: list[tuple[nn.Parameter, Tensor]] = field(default_factory=list, init=False)
    runs_model: ClassVar[bool] = True

    @torch.no_grad()
    def apply(self, model: nn.Module, sparsity: float) -> nn.Module:
        if self._dense:
            raise CatsError("W_down is fitted already: undo that first.")
        layers = blocks(model)
        states = block_inputs(model, layers, self.batches)
        super().apply(model, sparsity)
        bar = tqdm(layers, desc="fitting W_down", unit="block", disable=None if self.progress else True)
        for number, block in enumerate(bar):
            for module in sparse_mlps(block):
                weight = getattr(module, module.layout.down).weight
                self._dense.append((weight, weight.detach().to("cpu", copy=True)))
                weight.add_(self._change(block, number, module, states))
            for state in states:
                state.advance(block, number)
        return model

    def to_train(self, model: nn.Module, sparsity: float) -> nn.Module:
        super().to_train(model, sparsity)
        self._dense.clear()
        return model

    @torch.no_grad()
    def undo(self, model: nn.Module) -> nn.Module:
        for weight, dense in self._dense:
            weight.copy_(dense)
        self._dense.clear()
        return super().undo(model)

    def describe(self) -> dict:
        return super().describe() | {"w_down": "ridge regression on the survivors", "ridge": RIDGE}

    def _change(self, block: nn.Module, number: int, module: CatsMLP, states: list[BatchState]) -> Tensor:
        """What to add to W_down [d, m]: the regression on h of what the mask took from the output."""
        weight = getattr(module, module.layout.down).weight
        size = module.intermediate_size
        sums = Sums.zeros(len(weight), size, weight.device)
        seen: list[tuple[Tensor, Tensor]] = []

        def combine(gate: Tensor, up: Tensor) -> Tensor:
            product = partial(counted_product, module.activation, gate, up, masked=None)
            seen.append(tuple(product(threshold)[0] for threshold in (0.0, module.threshold)))
            return seen[-1][1]

        module.combine = combine
        for state in states:
            state.output(block, number)
            valid = state.valid.reshape(-1)
            full, h = (part.reshape(-1, size)[valid] for part in seen.pop())
            lost = ((full - h) @ weight.t()).float()
            root = root_size((full @ weight.t()).float())
            sums.add(*((part * root).to(h.dtype) for part in (h, lost)))
        module.combine = None
        return sums.solve(RIDGE).to(weight.dtype)


@dataclass
class Sums:
    """moments [m, m], the sum of h h^T over tokens; cross [d, m], the sum of y h^T."""

    moments: Tensor
    cross: Tensor

    @classmethod
    def zeros(cls, outputs: int, inputs: int, device) -> "Sums":
        return cls(torch.zeros(inputs, inputs, device=device), torch.zeros(outputs, inputs, device=device))

    def add(self, h: Tensor, y: Tensor) -> None:
        """Tokens: h [N, m], y [N, d], of one dtype; sums are in fp32."""
        self.moments += _moment(h, h)
        self.cross += _moment(y, h)

    def solve(self, ridge: float) -> Tensor:
        """cross (moments + ridge diag(moments))^-1, [d, m], with zero for neurons that never survive."""
        scale = self.moments.diagonal().sqrt()
        scale = torch.where(scale > 0, 1 / scale, 0)
        scaled = self.moments * scale[:, None] * scale
        scaled.diagonal().add_(ridge + (scale == 0))
        return torch.cholesky_solve((self.cross * scale).t(), torch.linalg.cholesky(scaled)).t() * scale


def _moment(a: Tensor, b: Tensor) -> Tensor:
    """a^T b in fp32; of 16-bit numbers on a GPU by its tensor cores, ten times as fast."""
    if a.is_cuda and a.dtype != torch.float32:
        return torch.mm(a.t(), b, out_dtype=torch.float32)
    return a.float().t() @ b.float()


@register
class Refit(Neuron):
    """The rule `refit`: the masks of `neuron`, the rows of W_down moved so that the survivors stand in."""

    name = "refit"
    title = "CATS fitted, uniform"
    what = (
        "the thresholds of `neuron`, and W_down by ridge regression of the dense MLP's output on what "
        "survives: the kernel and the bytes of CATS, other values in W_down"
    )

    def check(self, model: nn.Module) -> None:
        super().check(model)
        blocks(model)

    def calibrate(self, model, batches, *, source=None, progress=True) -> RefitFit:
        fit = super().calibrate(model, batches, source=source, progress=progress)
        return RefitFit(
            self.name,
            fit.thresholds,
            fit.allocation,
            batches=list(batches),
            progress=progress,
        )


@register
class RefitCombined(Refit, Combined):
    """The rule `refit-combined`."""

    name = "refit-combined"
    title = "CATS fitted"
    what = "`refit` with the masks of `combined`: thresholds per neuron, a sparsity per layer"
