"""Latency of one gated MLP against the batch size, CATS against dense: `cats measure batch`.

The masks of random inputs are independent, or as much alike as --correlation makes them. With --model they
are those of consecutive tokens of a text, and of tokens of different texts. Writes a record mlp_latency.
"""

import itertools
import time
from argparse import Namespace

import torch

from cats.benchmarking import dense, latency, timing, workload
from cats.benchmarking.real import RealModel

VARIANTS = ["cats", "cats_mask_dense"]


def measure(options: Namespace) -> None:
    """Time every batch size, kind of masks and sparsity; write one record."""
    options.dense = workload.chosen("dense variant", options.dense, dense.RECIPES)
    started = time.time()
    device = workload.device_or_quick(options.quick)
    bandwidth = timing.read_bandwidth() if device.type == "cuda" else None
    print(latency.HEADER)
    rows, model, data = [], {"id": "one gated MLP", "weights": "random"}, {"seed": options.seed}
    if options.model:
        net = RealModel(options.model, dtype=options.dtype, device=str(device), tokens=options.tokens)
        model, data = net.model, net.data
    for size in options.batch_sizes:
        best = None
        for kind, sparsity in itertools.product(kinds(options), options.sparsity):
            if options.model:
                layers = net.layers(sparsity, batch_size=size, texts=kind == "texts")
            else:
                layers = random_inputs(size, kind, sparsity, options, device)
            labels = {"masks": kind if isinstance(kind, str) else "random", "correlation": correlation(kind)}
            bench = latency.Bench(layers, options, device, bandwidth, labels)
            if best is None:
                bench.dense(options.dense)
            bench.best = best = bench.best or best
            bench.sparse(sparsity, VARIANTS)
            rows += bench.rows
    ops = workload.mlp_ops(options.batch_sizes)
    workload.record("mlp_latency", options, rows, model, data, started, ops=ops)


def kinds(options) -> list:
    """Correlations of random inputs, or kinds of real ones."""
    return ["tokens", "texts"] if options.model else options.correlation


def correlation(kind) -> float | None:
    return None if isinstance(kind, str) else kind


def random_inputs(batch_size: int, kind: float, sparsity: float, options, device) -> list[workload.Layer]:
    d, m = workload.shape(options.shape)
    dtype = getattr(torch, options.dtype)
    count = 2 if options.quick else workload.layer_count(m, d, dtype.itemsize)
    layers = workload.random_layers(
        m, d, count, batch_size=batch_size, correlation=kind, dtype=dtype, device=device, seed=options.seed
    )
    workload.set_sparsity(layers, sparsity)
    return layers
