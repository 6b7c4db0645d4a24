"""Latency of a gated MLP of rule `centred` beside CATS and dense: cats measure centred_mlp.

At each sparsity both read the same bytes: A [d, d] of `centred` is paid for by more neurons dropped. Centres
and weights are random, thresholds exact quantiles. Each is compared with float64 arithmetic before it is
timed. Writes a record mlp_latency for each shape.
"""

import argparse
import time
from dataclasses import dataclass

import torch
from cats_kernels import centred, reference
from torch import Tensor

from cats.benchmarking import dense, latency, workload
from cats.benchmarking import timing as benchmarking
from cats.errors import CatsError

SHAPES = ["4096x11008", "4096x14336", "1536x8960"]


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
        """Of the kernel, with the mask of z as it is held: rounding in the gate may not change it."""
        keep = reference.survivors(self.z, self.threshold)
        x, w_gate, w_up, w_down_t = (t.double() for t in (self.x, self.w_gate, self.w_up, self.w_down_t))
        z = reference.ACTIVATIONS[self.activation](x @ w_gate.t()) - self.centre.double()
        expected = x @ self.shared.double() + torch.where(keep, z * (x @ w_up.t()), 0.0) @ w_down_t
        return workload.relative_error(centred.centred_mlp(*self.arguments()), expected)


def main() -> None:
    options = parse()
    started = time.time()
    device = workload.device_or_quick(options.quick)
    bandwidth = benchmarking.read_bandwidth() if device.type == "cuda" else None
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
            measure(bench, around, sparsity)
        data = {"seed": options.seed}
        model = {"id": "one gated MLP", "weights": "random"}
        workload.record("mlp_latency", options, bench.rows, model, data, started, suffix=f"centred {shape}")


def with_centres(layer: workload.Layer) -> CentredLayer:
    """The same weights with a typical spread of centres, and the A that belongs to them."""
    m = len(layer.w_gate)
    centre = torch.randn(m, generator=torch.Generator().manual_seed(m)).to(layer.x.device) * 0.1
    shared = centred.at_centres(layer.w_up, layer.w_down_t, centre).to(layer.x.dtype)
    held = (layer.w_gate, layer.w_up, layer.w_down_t, layer.x, layer.z - centre, layer.threshold)
    return CentredLayer(*held, layer.activation, shared, centre)


def measure(bench: latency.Bench, layers: list[CentredLayer], sparsity: float) -> None:
    error = max(layer.error() for layer in layers[:2])
    if not error <= workload.TOLERANCE[layers[0].x.dtype]:
        raise CatsError(f"centred is wrong by {error:.1e}: nothing is reported.")

    @torch.no_grad()
    def step(i):
        return centred.centred_mlp(*layers[i % len(layers)].arguments())

    for launch in ("graph", "eager"):
        bench.time("centred", step, launch, sparsity, error)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shapes", nargs="+", default=SHAPES, help="hidden x intermediate size")
    parser.add_argument("--sparsity", type=float, nargs="+", default=[0.3, 0.5, 0.7])
    parser.add_argument("--dense", nargs="+", default=list(dense.RECIPES), choices=list(dense.RECIPES))
    return workload.finish(parser)


if __name__ == "__main__":
    workload.run(main)
