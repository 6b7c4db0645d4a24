"""One streaming pass over text gives the quantiles of |z| for every layer and every sparsity (sec. 4.1)."""

import math
import os
from collections.abc import Iterable
from pathlib import PurePath

import torch
from torch import Tensor, nn

from cats.calibration.checkpoint import Checkpoint
from cats.calibration.histogram import Binning, count, quantiles, refined, rounded, shares_below
from cats.calibration.stream import stream
from cats.core.activation import CatsMLP
from cats.core.centred import CentredMLP
from cats.core.quantiles import interpolate
from cats.core.structure import GatedMLP, find_gated_mlps
from cats.core.thresholds import GRID, Thresholds, fingerprint
from cats.errors import CatsError

# Where an activation has its minimum, its slope is zero: every layer crowds its values below that magnitude.
FOLDS = {"silu": 0.2784645427, "gelu": 0.1699712075, "gelu_tanh": 0.1700408}
PER = ("layer", "neuron")
GRID_PER_NEURON = torch.tensor([0.0, 0.01, *(k / 40 for k in range(1, 40)), 0.99, 1.0], dtype=torch.float32)
GRID_LIMIT = 12_000  # values of all layers together: 120 kB of JSON
EXCESS = 3e-4  # what interpolation between points may miss, as a fraction of a layer's activations
PROBES = torch.linspace(0.05, 0.95, 4501)
_POLICY = ("bos", "sequence_length", "order_seed")  # of what corpora.batches tells


def calibrate(
    model: nn.Module,
    batches: Iterable[dict[str, Tensor]],
    *,
    source: dict | None = None,
    per: str = "layer",
    weights: Tensor | None = None,
    skip_first: int = 0,
    checkpoint: str | os.PathLike | None = None,
    progress: bool = True,
) -> Thresholds:
    """Thresholds for every sparsity, from one pass of `batches` ({"input_ids", "attention_mask"}, [B, T]).

    Every token that the attention mask does not mark as padding counts, prompt and BOS included; `skip_first`
    leaves out that many at the start of each row. `per`: one threshold a "layer" (the paper) or a "neuron".
    `weights` [L, m]: quantiles of |z| weights instead, each neuron's threshold being t / weight. `source`:
    {"model": …, name and hash of the corpus, …}, kept with the thresholds; NumPy's and torch's numbers become
    Python's, paths text. The model is left as it was; one
    that is sparsified already is measured as it computes, with its masks. Memory, whatever the number of
    tokens: 1.6 MB a layer, or 2 kB a neuron. `checkpoint`: a file from which the same call goes on after an
    interruption, to bit-identical thresholds; remove it once they are saved. Raises CatsError for wrong
    options, a foreign or damaged checkpoint, no tokens, and activations that are not finite.
    """
    mlps = find_gated_mlps(model)
    if any(isinstance(mlp.module, CentredMLP) and mlp.module.folded for mlp in mlps):
        raise CatsError("This model has the rule centred built in: cats.restore it, then calibrate.")
    source = plain_notes(source or {}, "source")
    widths = [mlp.intermediate_size for mlp in mlps]
    if per not in PER:
        raise CatsError(f"Thresholds per {per!r} do not exist: use one of {', '.join(PER)}.")
    if len({mlp.activation for mlp in mlps}) > 1:
        raise CatsError("The layers differ in activation: thresholds need one activation for all.")
    if (per == "neuron" or weights is not None) and len(set(widths)) > 1:
        raise CatsError(
            "The layers differ in intermediate size: thresholds per neuron need one size for all."
        )
    if weights is not None:
        weights = _checked(weights, per, [len(mlps), widths[0]])
    fold = FOLDS.get(mlps[0].activation) if weights is None else None
    if per == "layer":
        binning, grid = Binning(mantissa_bits=11, lowest=-64, highest=16, fold=fold), GRID
    else:
        binning = Binning(mantissa_bits=4, lowest=-24, highest=8, fold=fold, fold_bits=2)
        grid = GRID_PER_NEURON
    shapes = [(binning.bins,) if per == "layer" else (width, binning.bins) for width in widths]
    dtype = torch.int64 if per == "layer" else torch.int32  # a neuron has one value a token
    counts = [torch.zeros(s, dtype=dtype, device=_device(m)) for s, m in zip(shapes, mlps, strict=True)]
    scales = None if weights is None else [w.to(c.device) for w, c in zip(weights, counts, strict=True)]

    def see(layer: int, module: CatsMLP, z: Tensor, up: Tensor) -> None:
        count(counts[layer], z if scales is None else z.float() * scales[layer], binning)

    signs = fingerprint(mlps)
    saved = None
    if checkpoint is not None:
        scale = "" if weights is None else weights.tolist()
        saved = Checkpoint(
            checkpoint, counts, [signs, str(next(model.parameters()).dtype), per, skip_first, scale]
        )
    tokens = stream(model, batches, see, skip_first=skip_first, saved=saved, progress=progress)
    for layer, histogram in enumerate(counts):
        if outside := int(histogram[..., -1].sum()):
            raise CatsError(
                f"Layer {layer} has {outside:,} gate activations that are infinite, NaN or above "
                f"{2**binning.highest:,}: run the model in float32 or bfloat16, or check its weights."
            )
    if per == "layer":
        counts = [c[None].cpu() for c in counts]
        every = torch.cat(counts)
        grid = refined(every, grid, binning, PROBES, tolerance=EXCESS, limit=GRID_LIMIT // len(mlps))
        values = rounded(every, grid, quantiles(every, grid, binning), binning, PROBES, EXCESS / 4)
    else:
        values = torch.stack([quantiles(c, grid, binning).float() for c in counts])
    errors = [
        grid_error_of(c, grid, v, binning, weights is not None) for c, v in zip(counts, values, strict=True)
    ]
    return Thresholds(
        **provenance(source, model, mlps, signs, skip_first),
        criterion=_criterion(per, weights is not None),
        tokens=tokens,
        grid=grid,
        values=values,
        grid_error=float(f"{max(errors):.3g}") if max(errors) > 0 else 0.0,
        scale=weights,
    )


def grid_error_of(counts: Tensor, grid: Tensor, values: Tensor, binning: Binning, weighted: bool) -> float:
    """Bound of |share of activations zero or below at(s) - s| for s in 0.05 … 0.95, the mean over rows.

    Shares rise with s, so what holds at two neighbouring points holds between them, but for their distance.
    """
    s = torch.linspace(0.05, 0.95, 9001 if values.ndim == 1 else 901, dtype=torch.float64)
    values = values[None] if values.ndim == 1 else values
    t = interpolate(grid, values, s.expand(len(values), -1)).float()
    # the module compares |z| with t / weight, this histogram |z| weight with t: two roundings differ
    lower, upper = shares_below(counts, t, binning, slack=2.0**-22 if weighted else 0.0)
    lower, upper = lower.mean(0), upper.mean(0)
    return float(torch.maximum((upper[1:] - s[:-1]).max(), (s[1:] - lower[:-1]).max()))


def _checked(weights: Tensor, per: str, shape: list[int]) -> Tensor:
    weights = torch.as_tensor(weights, dtype=torch.float32).cpu()
    if per != "layer":
        raise CatsError(
            "Weights change nothing where each neuron has its own quantiles: use per='layer' with them."
        )
    if list(weights.shape) != shape or not bool(weights.isfinite().all()) or not bool((weights >= 0).all()):
        raise CatsError(
            f"Weights must be finite, not negative, and of shape {shape}: one per layer and neuron."
        )
    return weights


def _criterion(per: str, weighted: bool) -> str:
    if per == "neuron":
        return "quantile of |act(x W_gate)| for each neuron"
    return (
        "quantile of |act(x W_gate)| times a weight per neuron" if weighted else "quantile of |act(x W_gate)|"
    )


def provenance(source: dict, model: nn.Module, mlps: list[GatedMLP], signs: str, skip_first: int) -> dict:
    config = getattr(model, "config", None)
    known = {"id": getattr(config, "name_or_path", "") or None, "architecture": type(model).__name__}
    corpus = {
        key: source[key] for key in source if key not in ("model", "tokens", "rows", "padding", *_POLICY)
    }
    return {
        "model": {
            **known,
            **source.get("model", {}),
            "intermediate_sizes": [mlp.intermediate_size for mlp in mlps],
            "gate_signs": signs,
        },
        "activation": mlps[0].activation,
        "corpus": corpus,
        "policy": {
            "padding": "excluded",
            "tokens": "every token of a row"
            + (f" but its first {skip_first}" if skip_first else ", the first included"),
            "measured": "sparse, with its masks" if isinstance(mlps[0].module, CatsMLP) else "dense",
            **{key: source[key] for key in _POLICY if key in source},
        },
    }


def plain_notes(value, name: str):
    """What JSON can hold of a value that a caller notes; CatsError, before any text is read, for the rest."""
    if isinstance(value, dict):
        return {str(key): plain_notes(item, f"{name}[{key!r}]") for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain_notes(item, f"{name}[{place}]") for place, item in enumerate(value)]
    if isinstance(value, PurePath):
        return str(value)
    if hasattr(value, "tolist"):
        return plain_notes(value.tolist(), name)
    if value is None or isinstance(value, (str, int)) or (isinstance(value, float) and math.isfinite(value)):
        return value
    raise CatsError(
        f"{name} is {value!r}, which a thresholds file cannot keep: give text, a finite number, or a list or "
        "dict of these."
    )


def _device(mlp: GatedMLP) -> torch.device:
    return next(mlp.module.parameters()).device
