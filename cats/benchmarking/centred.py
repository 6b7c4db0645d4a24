"""Latency of a gated MLP of rule `centred` beside CATS and dense: `cats measure centred`.

At each sparsity both read the same bytes: A [d, d] of `centred` is paid for by more neurons dropped. Centres
and weights are random, thresholds exact quantiles. Each is compared with float64 arithmetic before it is
timed. Writes a record mlp_latency for each shape.
"""

import time
from argparse import Namespace
from dataclasses import dataclass

import torch
from cats_kernels import centred, reference
from torch import Tensor

from cats.benchmarking import dense, latency, timing, workload
from cats.errors import CatsError


@dataclass
class CentredLayer(workload.Layer):
    """A layer with centres [m]; `z` and `threshold` are those of act(x W_gate) - centre."""

    shared: Tensor = None
    centre: Tensor = None

    def arguments(self) -> tuple:
        weights = self.w_gate, self.w_up, self.w_down_t
        return self.x, *weights, self.shared, self.centre, self.threshold, self.activation

    def bytes_read(self) -> float:
        return super().bytes_read() + self.shared.numel() * self.shared.element_size()

    def error(self) -> float:
        """Relative error of the kernel, the mask taken from the stored z, where no rounding changes it."""
        keep = reference.survivors(self.z, self.threshold)
        x, w_gate, w_up, w_down_t = (t.double() for t in (self.x, self.w_gate, self.w_up, self.w_down_t))
        z = reference.ACTIVATIONS[self.activation](x @ w_gate.t()) - self.centre.double()
        expected = x @ self.shared.double() + torch.where(keep, z * (x @ w_up.t()), 0.0) @ w_down_t
        return workload.relative_error(centred.centred_mlp(*self.arguments()), expected)


def measure(options: Namespace) -> None:
    """Time CATS and the centred rule at the same bytes; write a record for each shape."""
    options.dense = workload.chosen("dense variant", options.dense, dense.RECIPES)
    started = time.time()
    device = workload.device_or_quick(options.quick)
    bandwidth = timing.read_bandwidth() if device.type == "cuda" else None
    print(latency.HEADER)
    for shape in options.shapes:
        d, m = workload.shape(shape)
        dtype = getattr(torch, options.dtype)
        count = 2 if options.quick else workload.layer_count(m, d, dtype.itemsize)
        layers = workload.random_layers(m, d, count, dtype=dtype, device=device, seed=options.seed)
        around = [with_centres(layer) for layer in layers]
        bench = latency.Bench(layers, options, device, bandwidth, {"masks": "independent"})
        bench.dense(options.dense)
        for sparsity in options.sparsity:
            dropped = sparsity + d / (2 * m)
            if dropped >= 1:
                raise CatsError(f"{sparsity:.0%} of {shape} leaves no neuron beside A: use a lower one.")
            bench.layers = layers
            workload.set_sparsity(layers, sparsity)
            bench.sparse(sparsity, ["cats"])
            bench.layers = around
            workload.set_sparsity(around, dropped)
            measure_centred(bench, around, sparsity)
        data = {"seed": options.seed}
        model = {"id": "one gated MLP", "weights": "random"}
        workload.record(
            "mlp_latency", options, bench.rows, model, data, started,
            ops=[*workload.mlp_ops([1]), "centred"], suffix=f"centred {shape}",
        )  # fmt: skip


def with_centres(layer: workload.Layer) -> CentredLayer:
    """The same weights with a typical spread of centres, and the A that belongs to them."""
    m = len(layer.w_gate)
    centre = torch.randn(m, generator=torch.Generator().manual_seed(m)).to(layer.x.device) * 0.1
    shared = centred.at_centres(layer.w_up, layer.w_down_t, centre).to(layer.x.dtype)
    weights = layer.w_gate, layer.w_up, layer.w_down_t
    return CentredLayer(
        *weights, layer.x, layer.z - centre, layer.threshold, layer.activation, shared, centre
    )


def measure_centred(bench: latency.Bench, layers: list[CentredLayer], sparsity: float) -> None:
    error = max(layer.error() for layer in layers[:2])
    if not error <= workload.TOLERANCE[layers[0].x.dtype]:
        raise CatsError(f"centred is wrong by {error:.1e}: nothing is reported.")

    @torch.no_grad()
    def step(i):
        return centred.centred_mlp(*layers[i % len(layers)].arguments())

    for launch in ("graph", "eager"):
        bench.time("centred", step, launch, sparsity, error)
