"""Thresholds that move while a model is fine-tuned: on a schedule, or by a straight-through estimator."""

from functools import partial

import torch
from torch import Tensor, nn

from cats.core.activation import CatsMLP, unrounded
from cats.core.sparsify import set_thresholds
from cats.core.structure import cats_mlps
from cats.core.thresholds import Thresholds
from cats.criteria import Fit
from cats.errors import CatsError

_WIDTH = 0.25  # of the threshold: how far from it an activation still tells where the threshold should go
_HIGHEST = 0.995  # gate sparsity of a layer, at most


def annealed(target: float, step: int, steps: int) -> float:
    """Gate sparsity at `step`: s (1 - (1 - step / steps)^3), s from `steps` on (Zhu and Gupta, 2017)."""
    left = max(0.0, 1 - step / steps) if steps else 0.0
    return target * (1 - left**3)


class _StraightThrough(torch.autograd.Function):
    """z where |exact| >= t, else 0; the step's derivative by t is that of a triangle around t.

    The gradient to z is the mask's, as in `cats.activation.cats`. d(z 1[|z| >= t])/dt = -z delta(|z| - t),
    and delta is replaced by a triangle of half-width h = `_WIDTH` t and area one.
    """

    @staticmethod
    def forward(ctx, z: Tensor, exact: Tensor, threshold: Tensor) -> Tensor:
        drop = exact.abs() < threshold.float()
        ctx.save_for_backward(z, exact, threshold, drop)
        return z.masked_fill(drop, 0)

    @staticmethod
    def backward(ctx, gradient: Tensor):
        z, exact, threshold, drop = ctx.saved_tensors
        half = (_WIDTH * threshold.float()).clamp_min(torch.finfo(torch.float32).tiny)
        near = (1 - (exact.abs().float() - threshold.float()).abs() / half).clamp_min_(0) / half
        by_threshold = -(gradient.float() * z.float() * near).sum()
        return gradient.masked_fill(drop, 0), None, by_threshold.reshape(threshold.shape)


def straight_through(z: Tensor, exact: Tensor, threshold: Tensor) -> Tensor:
    """CATS_t(z), [..., m], as `cats.activation.cats`, with a gradient to the threshold [] as well."""
    return _StraightThrough.apply(z, exact, threshold)


class LearnedThresholds(nn.Module):
    """One parameter a layer, `shift` [L]: layer l drops a share s + shift_l - mean(shift) of its activations.

    t_l follows from the share by the calibrated quantile function of the layer, so the mean share stays the
    target while the loss moves sparsity to where it costs least. Registered in the model as `learned`, where
    the optimizer and a checkpoint find it. Raises CatsError for thresholds per neuron.
    """

    def __init__(self, model: nn.Module, thresholds: Thresholds, target: float):
        super().__init__()
        if thresholds.per != "layer":
            raise CatsError(
                "Learning thresholds needs one a layer, these are one per neuron: use the rule cats."
            )
        self.mlps = cats_mlps(model)  # a list: they are submodules of the model, not of this
        device = self.mlps[0].threshold.device
        self.target = target
        self.shift = nn.Parameter(torch.zeros(len(self.mlps), device=device))
        self.register_buffer("grid", thresholds.grid.to(device), persistent=False)
        self.register_buffer("values", thresholds.values.to(device), persistent=False)

    def shares(self) -> Tensor:
        """Gate sparsity of each layer, [L]."""
        return (self.target + self.shift - self.shift.mean()).clamp(0, _HIGHEST)

    def thresholds(self) -> Tensor:
        """[L], with a gradient to `shift`: linear between the points of the quantile functions."""
        shares = self.shares()
        place = torch.searchsorted(self.grid, shares.detach(), right=True).clamp(1, len(self.grid) - 1)
        low, high = self.grid[place - 1], self.grid[place]
        part = ((shares - low) / (high - low))[:, None]
        left = self.values.gather(1, place[:, None] - 1)
        right = self.values.gather(1, place[:, None])
        return torch.lerp(left, right, part).squeeze(1)

    def attach(self) -> None:
        """Let the sparse MLPs mask by these thresholds while they train."""
        layers = torch.arange(len(self.mlps), device=self.shift.device)
        for layer, module in zip(layers.split(1), self.mlps, strict=True):  # a number would be compiled in
            module.combine = partial(self._combine, layer, module)

    def detach(self) -> None:
        """Write the thresholds into the MLPs, which mask by themselves again."""
        set_thresholds(self.mlps, self.thresholds().detach(), self.shares().tolist())
        for module in self.mlps:
            module.combine = None

    def _combine(self, layer: Tensor, module: CatsMLP, gate: Tensor, up: Tensor) -> Tensor:
        act = module.gate_act
        z = act(gate)
        return straight_through(z, unrounded(act, gate, z), self.thresholds().index_select(0, layer)) * up


class Anneal:
    """The thresholds of a fit at any step of a run of `steps`, a `share` of which sparsity takes to rise."""

    def __init__(self, model: nn.Module, fit: Fit, target: float, share: float, steps: int):
        self.modules = cats_mlps(model)
        self.fit, self.target = fit, target
        self.steps = round(share * steps)

    def at(self, step: int) -> None:
        """Set the thresholds of `step`."""
        level = self.fit.allocation(annealed(self.target, step, self.steps))
        targets = level if isinstance(level, list) else [level] * len(self.modules)
        set_thresholds(self.modules, self.fit.thresholds.at(level), targets)

    def end(self) -> None:
        """Set the thresholds of the last step, at which everything is measured."""
        self.at(self.steps)
