"""CATS with a sparsity for each layer, the total the same, by the error of masking each layer alone."""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm.auto import tqdm

from cats.calibration.calibrate import calibrate
from cats.core.sparsify import restore, sparsify
from cats.core.structure import cats_mlps
from cats.core.thresholds import Thresholds
from cats.criteria.rule import Rule, ThresholdFit, register

LEVELS = (0.5, 0.7, 0.85)  # gate sparsities at which a layer is measured
ROWS = 4  # of a batch at a time: fp32 log-probabilities of all tokens over the vocabulary are large
TOKENS = 4096  # of text on which it is measured: layers x levels readings of so many


@register
class Allocated(Rule):
    """The rule `allocated`: layers that suffer least from their mask drop most."""

    name = "allocated"
    title = "CATS, allocated by layer"
    what = (
        "CATS with a sparsity for each layer, so that the last bytes saved cost the same everywhere, "
        "in KL divergence of one layer masked alone"
    )

    def calibrate(self, model, batches, *, source=None, progress=True) -> ThresholdFit:
        return allocate(
            self.name, model, calibrate(model, batches, source=source, progress=progress), batches, progress
        )


def allocate(name: str, model: nn.Module, thresholds: Thresholds, batches, progress: bool) -> ThresholdFit:
    """A ThresholdFit of `thresholds` that allocates by measured divergence."""
    scales, exponents = curves(divergences(model, thresholds, batches, progress=progress))
    return ThresholdFit(name, thresholds, partial(equal_margins, scales, exponents))


@torch.no_grad()
def divergences(model: nn.Module, thresholds: Thresholds, batches, *, progress: bool = True) -> Tensor:
    """Mean KL divergence in nats from the dense model's next tokens to those with one layer masked.

    [L, levels], over the first TOKENS tokens of `batches`. Leaves the model dense.
    """
    sample = _sample(batches)
    dense = [_log_probabilities(model, batch) for batch in sample]
    sparsify(model, thresholds, 0.0)
    try:
        modules = cats_mlps(model)
        result = torch.zeros(len(modules), len(LEVELS), dtype=torch.float64)
        bar = tqdm(
            total=result.numel(), desc="measuring layers", unit="run", disable=None if progress else True
        )
        for column, level in enumerate(LEVELS):
            values = thresholds.at(level)
            for layer, module in enumerate(modules):
                before = module.threshold
                module.threshold = values[layer].to(before.device)
                result[layer, column] = _divergence(model, sample, dense)
                module.threshold = before
                bar.update()
        bar.close()
    finally:
        restore(model)
    return result


def equal_margins(scales: Tensor, exponents: Tensor, sparsity: float) -> list[float]:
    """Sparsities s_l of mean `sparsity` that minimise the sum of scale_l (s_l / (1 - s_l)) ** exponent_l.

    At the minimum every layer has the same derivative, found by bisection; exponents of 1 and above keep
    the sum convex. Sparsities stay within 0.25 of the mean: further off the curves are not measured.
    """
    if sparsity == 0:
        return [0.0] * len(scales)
    grid = torch.linspace(1e-4, 0.995, 4000, dtype=torch.float64)
    odds = grid / (1 - grid)
    margins = scales[:, None] * exponents[:, None] * odds ** (exponents[:, None] - 1) / (1 - grid) ** 2
    low, high = margins.min().log(), margins.max().log()
    for _ in range(80):
        middle = (low + high) / 2
        shares = _at_margin(margins, middle.exp(), grid, sparsity)
        low, high = (middle, high) if shares.mean() < sparsity else (low, middle)
    return shifted_to_mean(_at_margin(margins, high.exp(), grid, sparsity), sparsity)


def shifted_to_mean(shares: Tensor, sparsity: float, limit: float = 0.995) -> list[float]:
    """Sparsities [L] inside [0, limit] of mean `sparsity`: `shares`, all shifted by one amount."""
    low, high = -1.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if (shares + middle).clamp(0, limit).mean() < sparsity else (low, middle)
    return (shares + high).clamp(0, limit).tolist()


def _at_margin(margins: Tensor, margin: Tensor, grid: Tensor, sparsity: float) -> Tensor:
    indices = (margins < margin).sum(1).clamp(0, len(grid) - 1)
    return grid[indices].clamp(max(sparsity - 0.25, 0.0), min(sparsity + 0.25, 0.98))


def curves(divergences: Tensor) -> tuple[Tensor, Tensor]:
    """Per layer the line log error = log scale + exponent log(s / (1 - s)), by least squares over LEVELS."""
    levels = torch.tensor(LEVELS, dtype=torch.float64)
    x = torch.logit(levels)
    y = divergences.clamp_min(1e-9).log()
    slope = ((x - x.mean()) * (y - y.mean(1, keepdim=True))).sum(1) / ((x - x.mean()) ** 2).sum()
    slope = slope.clamp_min(1.0)
    return (y.mean(1) - slope * x.mean()).exp(), slope


def _sample(batches) -> list[dict[str, Tensor]]:
    """Parts of the batches, of ROWS rows, until TOKENS tokens are in them."""
    parts, tokens = [], 0
    for batch in batches:
        for start in range(0, len(batch["input_ids"]), ROWS):
            if tokens >= TOKENS:
                return parts
            parts.append({key: value[start : start + ROWS] for key, value in batch.items()})
            tokens += int(parts[-1]["attention_mask"].sum())
    return parts


def _log_probabilities(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    inputs = {key: value.to(model.device) for key, value in batch.items()}
    logits = model(**inputs, use_cache=False).logits[inputs["attention_mask"].bool()]
    return F.log_softmax(logits.float(), dim=-1)


def _divergence(model: nn.Module, sample: list, dense: list[Tensor]) -> float:
    total, tokens = torch.zeros((), dtype=torch.float64, device=model.device), 0
    for batch, reference in zip(sample, dense, strict=True):
        other = _log_probabilities(model, batch)
        total += F.kl_div(other, reference, reduction="sum", log_target=True).double()
        tokens += len(other)
    return float(total / tokens)
