"""Latency of one gated MLP, CATS against dense: `cats measure mlp`.

Each variant is compared with float64 arithmetic before it is timed; a wrong one ends the program. Weights
rotate through more layers than any cache holds. Writes a record mlp_latency.
"""

import time
from argparse import Namespace

import torch

from cats.benchmarking import dense, latency, published, timing, workload
from cats.benchmarking.real import RealModel


def measure(options: Namespace) -> None:
    """Time every shape, or the layers of a trained model, at every sparsity; write one record."""
    options.dense = workload.chosen("dense variant", options.dense, dense.RECIPES)
    if options.variants:  # none given: all, those of the authors only where they are installed
        known = [*latency.sparse_variants(1), published.NAME]
        options.variants = workload.chosen("sparse variant", options.variants, known)
    started = time.time()
    device = workload.device_or_quick(options.quick)
    bandwidth = timing.read_bandwidth() if device.type == "cuda" else None
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
    workload.record("mlp_latency", options, rows, model, data, started, ops=workload.mlp_ops([1]))


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
