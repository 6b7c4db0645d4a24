"""The calibration artefact: quantile functions of |z|, from which t follows for any sparsity (sec. 4.1)."""

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from cats.core import thresholds_file
from cats.core.centres import Centres, Setting
from cats.core.quantiles import interpolate, shortest
from cats.core.structure import GatedMLP, find_gated_mlps
from cats.errors import CatsError

_TAIL = [0.9925, 0.995, 0.9965, 0.998, 0.999, 0.9995, 0.9999, 1.0]

GRID = torch.tensor(
    [0.0, 0.001, 0.0025, 0.005, *(k / 100 for k in range(1, 100)), *_TAIL], dtype=torch.float32
)


@dataclass
class Thresholds:
    """Quantiles of |z|, z = act(x W_gate), of one model on one corpus.

    `grid` [G]: gate sparsities, ascending from 0 to 1. `values`: thresholds at the grid, [L, G], one scalar
    per layer (CATS), or [L, m, G], one per neuron. `scale` [L, m], where given: `values` [L, G] are quantiles
    of |z| scale, so neuron j drops z where |z| < t / scale_j. `grid_error`: no layer's share of activations
    that are zero or below `at(s)`, on the calibration tokens, differs from s by more than this fraction, for
    any s in 0.05 … 0.95. `model`, `corpus`, `policy` (padding, first token, …) and `tokens`: what was
    measured, and the text that it was measured on. `centres`, where given, makes them those of the rule
    `centred`; `values` [L, G] are then quantiles of |z| times the neuron's weight.
    """

    model: dict
    activation: str
    criterion: str
    corpus: dict
    tokens: int
    policy: dict
    grid: Tensor
    values: Tensor
    grid_error: float
    scale: Tensor | None = None
    centres: Centres | None = None

    @property
    def layers(self) -> int:
        return self.values.shape[0]

    @property
    def _neurons(self) -> int | None:
        """Neurons of a layer, where each has a threshold of its own."""
        return self.scale.shape[1] if self.scale is not None else (self.values.shape[1:-1] or [None])[0]

    @property
    def per(self) -> str:
        """What has a threshold of its own, "layer" or "neuron"."""
        by_layer = self.values.ndim == 2 and self.scale is None and self.centres is None
        return "layer" if by_layer else "neuron"

    @property
    def rule(self) -> str:
        """By which the neurons are dropped: "cats", an activation to zero, or "centred", to its centre."""
        return "cats" if self.centres is None else "centred"

    def at(self, sparsity: float | Sequence[float]) -> Tensor:
        """Thresholds [L] or [L, m] (fp32) for one gate sparsity in [0, 1), or for one per layer.

        Linear between grid points; sparsity 0 gives 0, which masks nothing. Raises CatsError outside [0, 1),
        and where there are centres, without which thresholds mean nothing: those come from `settings`.
        """
        if self.centres is not None:
            raise CatsError("These thresholds are for the rule centred alone: calibrate the model for cats.")
        targets = sparsities(sparsity, self.layers)
        t = interpolate(self.grid, self.values, targets[(..., *[None] * (self.values.ndim - 1))]).squeeze(-1)
        if self.scale is not None:
            t = t[:, None] / self.scale.double()
        t[targets == 0] = 0
        return t.float()

    def settings(self, sparsity: float | Sequence[float]) -> list[Setting]:
        """The mask of each layer, as `at`; by the rule `centred` with centres in layers where they pay."""
        if self.centres is None:
            return [Setting(t) for t in self.at(sparsity)]
        targets = sparsities(sparsity, self.layers).tolist()
        return [self.setting(n, s, self.centres.centred(n, s)) for n, s in enumerate(targets)]

    def setting(self, layer: int, sparsity: float, centred: bool) -> Setting:
        """The mask of one layer by the rule `centred`, with centres or without."""
        return self.centres.setting(layer, sparsity, self.grid, self.values, self.activation, centred)

    def check(self, model: nn.Module | Sequence[GatedMLP], *, weights: bool = True) -> None:
        """Raise CatsError unless these were calibrated on this model: layers, sizes, activation, weights.

        `weights` False compares shapes alone, for a model whose weights are not loaded yet.
        """
        mlps = find_gated_mlps(model) if isinstance(model, nn.Module) else list(model)
        name = self.model.get("id") or self.model.get("architecture") or "another model"
        if len(mlps) != self.layers:
            raise CatsError(
                f"These thresholds are for {self.layers} layers ({name}), the model has {len(mlps)}."
            )
        sizes = self.model.get("intermediate_sizes") or [mlp.intermediate_size for mlp in mlps]
        if len(sizes) != self.layers:
            raise CatsError(f"These thresholds name {len(sizes)} sizes for {self.layers} layers ({name}).")
        for mlp, size in zip(mlps, sizes, strict=True):
            neurons = self._neurons or size
            if mlp.intermediate_size != size or mlp.intermediate_size != neurons:
                size = size if mlp.intermediate_size != size else neurons
                raise CatsError(
                    f"These thresholds are for intermediate size {size} in layer {mlp.layer} ({name}), "
                    f"the model has {mlp.intermediate_size}."
                )
            if mlp.activation != self.activation:
                raise CatsError(
                    f"These thresholds are for {self.activation} gates ({name}), "
                    f"the model has {mlp.activation}."
                )
        if self.centres is not None:
            self.centres.check(mlps, name)
        expected = self.model.get("gate_signs")
        if weights and expected and fingerprint(mlps) != expected:
            raise CatsError(
                f"These thresholds were calibrated on other weights ({name}, gate signs {expected[:12]}): "
                "calibrate this model with `cats calibrate`."
            )

    def provenance(self) -> dict:
        """Everything but the values: what was measured, on what."""
        return {
            "model": self.model,
            "activation": self.activation,
            "criterion": self.criterion,
            "corpus": self.corpus,
            "tokens": self.tokens,
            "policy": self.policy,
            "grid_error": self.grid_error,
        }

    def save(self, path: str | os.PathLike) -> None:
        """Write the JSON file, and beside it a safetensors file where there are many thresholds per neuron.

        Raises CatsError where `path` is something else than a thresholds file, or cannot be written.
        """
        document = {
            **self.provenance(),
            "shape": list(self.values.shape),
            "grid": shortest(self.grid),
        }
        if self.centres is not None:
            document["centres"] = self.centres.document()
        tensors = {"values": self.values} | ({} if self.scale is None else {"scale": self.scale})
        thresholds_file.write(Path(path), document, tensors)

    @classmethod
    def load(cls, path: str | os.PathLike) -> "Thresholds":
        """Read a thresholds file; raises CatsError for a missing, truncated, inconsistent or newer one."""
        document, tensors = thresholds_file.read(Path(path))
        thresholds = cls(**document, **tensors)
        if not thresholds.consistent():
            raise CatsError(
                f"The thresholds file {path} is inconsistent (grid, values or shape): make it again."
            )
        return thresholds

    def consistent(self) -> bool:
        """Whether grid and values are quantile functions: [G] rising from 0 to 1, finite, never falling."""
        grid, values, scale = self.grid, self.values, self.scale
        return (
            grid.ndim == 1
            and len(grid) > 1
            and values.ndim in (2, 3)
            and values.shape[-1] == len(grid)
            and values.shape[0] > 0
            and grid[0] == 0
            and grid[-1] == 1
            and bool((grid.diff() > 0).all())
            and bool(values.isfinite().all())
            and bool((values >= 0).all())
            and bool((values.diff() >= 0).all())
            and (
                self.centres is None
                or (values.ndim == 2 and scale is None and self.centres.consistent(*values.shape))
            )
            and (
                scale is None
                or (
                    (values.ndim == scale.ndim == 2 and len(scale) == len(values))
                    and bool(scale.isfinite().all())
                    and bool((scale >= 0).all())
                )
            )
        )


def plain(sparsity):
    """Python's own numbers, one or a list, in place of a tensor, an array or NumPy's numbers."""
    if hasattr(sparsity, "tolist"):
        return sparsity.tolist()
    is_list = isinstance(sparsity, Sequence) and not isinstance(sparsity, str)
    return [plain(value) for value in sparsity] if is_list else sparsity


def sparsities(sparsity: float | Sequence[float], layers: int) -> Tensor:
    """Gate sparsities [L] (fp64) from one number or one per layer; raises CatsError outside [0, 1)."""
    given = plain(sparsity)
    given = given if isinstance(given, list) else [given] * layers
    if len(given) != layers:
        raise CatsError(
            f"{len(given)} sparsities were given for {layers} layers: give one, or one per layer."
        )
    for value in given:
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < 1:
            raise CatsError(
                f"Sparsity {value!r} is outside [0, 1): it is the share of gate activations to drop."
            )
    return torch.tensor(given, dtype=torch.float64, device="cpu")  # Transformers loads under "meta"


def fingerprint(mlps: Sequence[GatedMLP]) -> str:
    """sha256 over the signs of 4096 gate weights per layer: the same in every dtype."""
    digest = hashlib.sha256()
    for mlp in mlps:
        weight = mlp.module.get_submodule(mlp.layout.gate).weight.detach()
        if mlp.fused:
            weight = weight.chunk(2)[mlp.layout.gate_half]
        flat = weight.reshape(-1)
        sample = flat[:: max(1, flat.numel() // 4096)][:4096]
        digest.update(torch.signbit(sample).cpu().numpy().tobytes())
    return digest.hexdigest()
