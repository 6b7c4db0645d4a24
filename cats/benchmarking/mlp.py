"""Latency of one gated MLP, CATS against dense: cats measure mlp --shapes 4096x11008.

Each variant is compared with float64 arithmetic before it is timed; a wrong one ends the program. Weights
rotate through more layers than any cache holds. Writes a record mlp_latency.
"""

import argparse
import time

import torch

from cats.benchmarking import dense, latency, workload
from cats.benchmarking import timing as benchmarking
from cats.benchmarking.real import RealModel

SHAPES = ["4096x11008", "4096x14336", "5120x13824", "8192x28672"]


def main() -> None:
    options = parse()
    started = time.time()
    device = workload.device_or_quick(options.quick)
    bandwidth = benchmarking.read_bandwidth() if device.type == "cuda" else None
    if bandwidth:
        print(f"{torch.cuda.get_device_name()}: a read-only kernel reads {bandwidth:.0f} GB/s")
    print(latency.HEADER)
    rows, model, data = [], {"id": "one gated MLP", "weights": "random"}, {"seed": options.seed}
    if options.model:
        net = RealModel(options.model, dtype=options.dtype, device=str(device), tokens=options.tokens)
        model, data = net.model, net.data
        workloads = [({"masks": "real"}, net.layers)]
    else:
        workloads = [
            ({"masks": "independent"}, random_workload(shape, options, device)) for shape in options.shapes
        ]
    for labels, layers_at in workloads:
        bench = None
        for sparsity in options.sparsity:
            layers = layers_at(sparsity)
            if bench is None:
                bench = latency.Bench(layers, options, device, bandwidth, labels)
                bench.dense(options.dense)
            bench.layers = layers
            bench.sparse(sparsity, options.variants)
        rows += bench.rows
    workload.record("mlp_latency", options, rows, model, data, started)


def random_workload(shape: str, options, device):
    """A function from sparsity to the layers of one shape; they are made at the first call."""
    d, m = workload.shape(shape)
    dtype = getattr(torch, options.dtype)
    layers = []

    def at(sparsity: float):
        if not layers:
            count = 2 if options.quick else workload.layer_count(m, d, dtype.itemsize)
            layers.extend(workload.random_layers(m, d, count, dtype=dtype, device=device, seed=options.seed))
        workload.set_sparsity(layers, sparsity)
        return layers

    return at


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--shapes", nargs="+", default=SHAPES, help="hidden x intermediate size, random weights"
    )
    parser.add_argument("--model", help="take weights, inputs and thresholds of this trained model instead")
    parser.add_argument("--tokens", type=int, default=16384, help="calibration tokens for --model")
    parser.add_argument("--sparsity", type=float, nargs="+", default=[0.0, 0.3, 0.5, 0.7, 0.9])
    parser.add_argument("--dense", nargs="+", default=list(dense.RECIPES), choices=list(dense.RECIPES))
    parser.add_argument(
        "--variants", nargs="+", choices=list(latency.sparse_variants(1)), help="default: all"
    )
    return workload.finish(parser)


if __name__ == "__main__":
    workload.run(main)
