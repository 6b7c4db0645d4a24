"""Layers that the benchmarks rotate through, their thresholds, and the check that comes before any timing."""

import math
import re
from argparse import Namespace
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from cats_kernels import reference, registry
from torch import Tensor

from cats import paths
from cats.benchmarking import timing
from cats.errors import CatsError, did_you_mean
from cats.records import record as records

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 8e-3, torch.float16: 2e-3}  # of a rounded result
ROTATED_BYTES = 2 * 2**30  # weights cycled through: 40 times the L2 of an H100
NOT_RECORDED = {"command", "program", "slug", "output"}  # options that change no result
CLEAR_GAP = 24  # ranks around the quantile in which the widest gap is looked for


@dataclass
class Layer:
    """One gated MLP and its input: weights [m, d], x [B, d], z = act(x W_gate) [B, m] float32, threshold."""

    w_gate: Tensor
    w_up: Tensor
    w_down_t: Tensor
    x: Tensor
    z: Tensor
    threshold: Tensor
    activation: str = "silu"

    @property
    def keep(self) -> Tensor:
        return reference.survivors(self.z, self.threshold)

    @property
    def density(self) -> float:
        """Share of neurons that at least one token keeps."""
        return self.keep.any(dim=0).float().mean().item()

    @property
    def sparsity(self) -> float:
        """Share of its activations that a token drops, on average."""
        return 1 - self.keep.float().mean().item()

    def arguments(self) -> tuple:
        return self.x, self.w_gate, self.w_up, self.w_down_t, self.threshold, self.activation

    def bytes_read(self) -> float:
        """Weight bytes that must be read: the gate, and of up and down the neurons that some token needs."""
        m, d = self.w_gate.shape
        return m * d * (1 + 2 * self.density) * self.w_gate.element_size()


def layer_count(m: int, d: int, element_size: int, limit: int | None = None) -> int:
    """Layers of one shape whose weights together exceed every cache by far."""
    wanted = max(2, math.ceil(ROTATED_BYTES / (3 * m * d * element_size)))
    return min(wanted, limit) if limit else wanted


def random_layers(
    m: int, d: int, count: int, *, batch_size: int = 1, correlation: float = 0.0, dtype=torch.bfloat16,
    device="cuda", activation: str = "silu", seed: int = 0,
) -> list[Layer]:  # fmt: skip
    """Layers with normal weights and threshold zero; inputs x [batch_size, d] correlate by `correlation`."""
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, device=device, dtype=torch.float32)

    layers = []
    for _ in range(count):
        weights = [(normal(m, d) / math.sqrt(d)).to(dtype) for _ in range(3)]
        x = math.sqrt(correlation) * normal(1, d) + math.sqrt(1 - correlation) * normal(batch_size, d)
        layers.append(make_layer(*weights, x.to(dtype), activation))
    return layers


def make_layer(w_gate, w_up, w_down_t, x, activation, threshold=None) -> Layer:
    """A layer with its z computed in float32 from weights and x of any dtype."""
    z = reference.ACTIVATIONS[activation](x.float() @ w_gate.float().t())
    threshold = torch.zeros((), device=x.device) if threshold is None else threshold
    return Layer(w_gate, w_up, w_down_t, x, z, threshold, activation)


def set_sparsity(layers: list[Layer], sparsity: float) -> None:
    """Thresholds at the exact quantile of each layer's own |z|, in place.

    Moved into the widest gap within some ranks, so that every kernel with a float32 gate finds one mask.
    """
    for layer in layers:
        layer.threshold = layer.threshold.new_tensor(quantile_in_gap(layer.z, sparsity))


def clear_threshold(layer: Layer) -> Layer:
    """The layer with its threshold moved by a few ranks of its |z|, into the widest gap there."""
    below = (layer.z.abs() < layer.threshold).double().mean().item()
    if below > 0:
        layer.threshold = layer.threshold.new_tensor(quantile_in_gap(layer.z, below))
    return layer


def quantile_in_gap(z: Tensor, sparsity: float) -> float:
    if sparsity <= 0:
        return 0.0
    ordered = z.abs().flatten().sort().values.double()
    rank = min(round(sparsity * len(ordered)), len(ordered) - 1)
    near = ordered[max(0, rank - CLEAR_GAP) : rank + CLEAR_GAP]
    if len(near) < 2:
        return ordered[rank].item()
    widest = int(near.diff().argmax())
    return near[widest : widest + 2].mean().item()


def relative_error(y: Tensor, expected: Tensor) -> float:
    """Norm of the difference over the norm expected; infinite where either is not finite."""
    if not bool(y.isfinite().all()):
        return math.inf
    return float((y.double() - expected).norm() / expected.norm().clamp_min(1e-30))


def expected(layer: Layer, *, masked: bool = True) -> Tensor:
    """y [B, d] in float64: of CATS with the layer's threshold, or of the dense MLP."""
    threshold = layer.threshold if masked else torch.zeros_like(layer.threshold)
    keep = reference.survivors(layer.z, threshold)  # the mask of the float32 gate
    return reference.cats_mlp(
        layer.x, layer.w_gate, layer.w_up, layer.w_down_t, threshold, layer.activation, keep,
        out_dtype=torch.float64, accumulate=torch.float64,
    )  # fmt: skip


def require_correct(
    name: str, compute, layers: list[Layer], *, masked: bool = True, tolerance: float
) -> float:
    """Largest relative error of `compute(layer)` over two layers; CatsError where that is too large."""
    worst = max(relative_error(compute(layer), expected(layer, masked=masked)) for layer in layers[:2])
    if not worst <= tolerance:
        raise CatsError(f"{name} is wrong by {worst:.1e} (allowed {tolerance:.0e}): nothing is reported.")
    return worst


def shape(text: str) -> tuple[int, int]:
    """ "4096x11008" (hidden x intermediate size) → (d, m)."""
    try:
        d, m = (int(part) for part in text.lower().split("x"))
        if min(d, m) < 1:
            raise ValueError
        return d, m
    except ValueError as error:
        raise CatsError(
            f"{text!r} is no shape: write hidden x intermediate size, as in 4096x11008."
        ) from error


def chosen(what: str, names: Sequence[str] | None, known: Iterable[str]) -> list[str]:
    """`names`, or all of `known` where there are none; CatsError where one is unknown."""
    known = list(known)
    for name in names or ():
        if name not in known:
            raise CatsError(f"Unknown {what} {name!r}{did_you_mean(name, known)}: use {', '.join(known)}.")
    return list(names or known)


def record(
    experiment: str, options: Namespace, rows: list[dict], model: dict, data: dict, started: float, *,
    ops: Iterable[str] = (), suffix: str = "",
) -> None:  # fmt: skip
    """Write the record `<device or --slug>[-suffix]`, unless this was a dry run, and say where it is.

    `ops`: the names, of `cats.records.identity.OPS`, that were measured.
    """
    if options.quick and options.output is None:
        return
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    name = " ".join([options.slug or device, Path(suffix).name])
    slug = re.sub(r"[^a-z0-9.]+", "-", name.lower()).strip("-")
    parameters = {key: value for key, value in vars(options).items() if key not in NOT_RECORDED}
    for key in ("model", "corpus"):
        if parameters.get(key):
            parameters[key] = paths.without_folders(parameters[key])
    if "models" in parameters:
        parameters["models"] = [paths.without_folders(name) for name in parameters["models"]]
    path = records.write(
        experiment, slug, parameters=parameters, rows=rows, model=model, data=data, started=started,
        ops=tuple(ops), folder=Path(options.output) if options.output else None,
    )  # fmt: skip
    print(f"Record: {path.name}")


def mlp_ops(batches: Iterable[int]) -> list[str]:
    """The ops of `cats.records.identity` that the sparse MLP runs on this machine for these batch sizes."""
    if not torch.cuda.is_available():
        return ["cpu"]
    kernels = registry.KERNELS.items()
    return sorted({name for batch in batches for name, kernel in kernels if batch in kernel.rows})


def device_or_quick(quick: bool) -> torch.device:
    """The GPU to measure on; the CPU for a dry run. CatsError where there is neither."""
    return torch.device("cpu") if quick and not torch.cuda.is_available() else timing.require_gpu()


def timed(step, device: torch.device, launch: str, calls: int, quick: bool) -> timing.Timing:
    """µs a call by CUDA-graph replay ("graph") or launched from Python ("eager"); a CPU has no graphs."""
    if launch == "graph" and device.type == "cuda":
        return timing.time_graph(step, calls=calls, runs=5 if quick else 30)
    return timing.time_eager(step, calls=calls, runs=1 if quick else 15)
