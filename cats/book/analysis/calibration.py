"""What calibration asks for and what arrives: realised sparsity, draws of few rows, and padding."""

from collections.abc import Iterable, Mapping, Sequence

import pandas as pd
import torch
from torch import Tensor, nn

from cats.book.analysis.activations import Distribution
from cats.book.box import Box
from cats.book.comparison import Comparison
from cats.book.html_table import Table
from cats.calibration.observe import SparsityMeter
from cats.core.sparsify import restore, sparsify
from cats.core.thresholds import Thresholds


@torch.no_grad()
def realised(
    model: nn.Module,
    thresholds: Thresholds,
    batches: Iterable[dict[str, Tensor]],
    sparsities: Sequence[float],
) -> tuple[dict[float, Tensor], dict[float, Tensor]]:
    """What the sparse model zeroes on `batches`: by layer [L] and for each token [L, N], by target.

    The model is dense afterwards.
    """
    decoder = model.get_decoder()  # the output head adds nothing here
    device = next(decoder.parameters()).device
    by_layer, per_token = {}, {}
    for target in sparsities:
        sparsify(model, thresholds, target)
        with SparsityMeter(decoder, per_token=True) as meter:
            for batch in batches:
                decoder(**{name: values.to(device) for name, values in batch.items()}, use_cache=False)
        by_layer[target], per_token[target] = meter.by_layer, meter.per_token
    restore(model)
    return by_layer, per_token


def realised_table(by_layer: Mapping[float, Tensor], per_token: Mapping[float, Tensor]) -> Table:
    """The mean, the extreme layers and the middle 90 % of tokens, a line a target."""
    lines = []
    for target, layers in by_layer.items():
        tokens = per_token[target].mean(0).double()
        low, high = torch.quantile(tokens, torch.tensor([0.05, 0.95], dtype=torch.float64)).tolist()
        lines.append(
            {
                "target": target,
                "realised": float(layers.mean()),
                "lowest layer": float(layers.min()),
                "highest layer": float(layers.max()),
                "tokens, 5%": low,
                "tokens, 95%": high,
            }
        )
    frame = pd.DataFrame(lines)
    caption = "Realised sparsity on held-out text"
    return Table(frame, dict.fromkeys(frame.columns, "{:.1%}"), caption=caption)


def errors_table(errors: pd.DataFrame) -> Table:
    """Mean and largest |error| by number of rows and sparsity; `errors` as of `Draws.errors`."""
    size = errors.assign(error=errors.error.abs()).groupby(["rows", "sparsity"]).error
    frame = size.agg(["mean", "max"]).reset_index()
    frame = frame.rename(columns={"mean": "mean |error|", "max": "worst layer and draw"})
    formats = {"sparsity": "{:.0%}", "mean |error|": "{:.2%}", "worst layer and draw": "{:.2%}"}
    return Table(frame, formats, caption="Realised minus target sparsity, by rows of calibration text")


def achieved(z: Distribution, sparsities: Sequence[float]) -> dict[float, tuple[Tensor, Tensor]]:
    """Sparsity by layer on the calibration text: of exact quantiles, and of the reference code's bins."""
    return {s: (z.share_below(z.thresholds(s)), z.share_below(z.reference_thresholds(s))) for s in sparsities}


def padding_shifts(padded: Distribution, sparsities: Sequence[float]) -> dict[str, Tensor]:
    """Realised minus target on the text itself, by layer, of thresholds that counted the padding too."""
    return {f"s = {s:.0%}": padded.share_below(padded.thresholds(s), "text") - s for s in sparsities}


def box(by_layer: Mapping[float, Tensor], per_token: Mapping[float, Tensor], model: str, tokens: int) -> Box:
    """The chapter in a box, from the run of the page; the interval is that of the mean of tokens."""
    values = per_token[0.5].mean(0).double()
    error = 1.96 * float(values.std()) / len(values) ** 0.5
    mean, worst = float(by_layer[0.5].mean()), float((by_layer[0.5] - 0.5).abs().max())
    highest = max(by_layer)
    return Box(
        "How much text do thresholds take, and does the sparsity that was asked for arrive?",
        f"Thresholds from {tokens:,} tokens for 50% realise {mean:.1%} on held-out text "
        f"({mean - error:.1%} to {mean + error:.1%}, 95% interval over tokens), "
        f"{100 * worst:.1f} points off in the worst layer. "
        f"At {highest:.0%} they realise {float(by_layer[highest].mean()):.1%}, because masks change what "
        "later layers see.",
        "fig-realised",
        f"Live on {model}, on text of the kind that was calibrated on; tokens of a text depend on each "
        "other, so the interval is narrower than it should be.",
        "cats reproduce 02 --profile gpu",
    )


def comparisons(exact: Tensor, by_layer: Mapping[float, Tensor], setting: str) -> list[Comparison]:
    """Targets beside what arrives; `exact`: by layer, on the calibration text at 50 %."""
    worst = 0.5 + float((exact - 0.5).abs().max())
    name = "calibration text, target 50%, worst layer"
    lines = [Comparison("calibration_exact", name, 0.5, worst, 0.001, setting, digits=4)]
    for target in [s for s in by_layer if s >= 0.5]:  # the paper's targets
        key, name = f"calibration_heldout_{round(100 * target)}", f"held-out text, target {target:.0%}"
        lines.append(Comparison(key, name, target, float(by_layer[target].mean()), 0.02, setting))
    return lines
