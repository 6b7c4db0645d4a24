"""CATS whose thresholds follow the text: after each call they move towards the target sparsity."""

from dataclasses import dataclass

import torch
from torch import Tensor

from cats.calibration.calibrate import calibrate
from cats.core.activation import CatsMLP
from cats.core.thresholds import Thresholds
from cats.criteria.rule import Rule, ThresholdFit, register

# Tokens over which an error of the sparsity is corrected: one call of so many corrects 63 % of it.
HORIZON = 256
_STEP = 0.02  # of sparsity, around the target: how log t changes with s there
_LIMIT = 0.5  # of log t in one call


class Steering:
    """Moves log t of each layer by (target - realised) times its slope d log t / d s.

    Weighted by the tokens of a call. Called by `cats.criteria.masking.Masking` with the zeros of each token
    after a call; nothing is read back to the host.
    """

    def __init__(self, thresholds: Thresholds, sparsity: float):
        self.sparsity = sparsity
        below, above = (thresholds.at(min(max(sparsity + step, 0.0), 0.999)) for step in (-_STEP, _STEP))
        ratio = (above.double() / below.double().clamp_min(1e-12)).reshape(thresholds.layers, -1).mean(1)
        self.slopes = (ratio.clamp_min(1).log() / (2 * _STEP)).tolist()

    @torch.no_grad()
    def __call__(self, layer: int, module: CatsMLP, zeroed: Tensor, valid: Tensor | None) -> None:
        """zeroed [N]: zeros of each token; valid [B, T] with N tokens, False for padding."""
        kept = torch.ones_like(zeroed) if valid is None else valid.reshape(-1).to(zeroed.device)
        tokens = kept.sum()
        share = (zeroed * kept).sum() / (tokens.clamp_min(1) * module.intermediate_size)
        weight = 1 - torch.exp(-tokens / HORIZON)
        step = (self.slopes[layer] * weight * (self.sparsity - share)).clamp(-_LIMIT, _LIMIT)
        module.threshold.mul_(torch.exp(step))


@dataclass
class OnlineFit(ThresholdFit):
    """Thresholds that, inside a Masking with `steer`, depend on the calls before: on their order and size."""

    def steer(self, sparsity: float) -> Steering:
        return Steering(self.thresholds, sparsity)


@register
class Online(Rule):
    """The rule `online`: starts from the thresholds of `cats` and steers them while it runs."""

    name = "online"
    title = "CATS, corrected online"
    what = (
        "CATS, its thresholds steered while the model runs so that the realised sparsity stays at the target"
    )
    trains = False  # its thresholds move while it runs

    def calibrate(self, model, batches, *, source=None, progress=True) -> OnlineFit:
        return OnlineFit(self.name, calibrate(model, batches, source=source, progress=progress))
