"""Latency against the number of rows, CATS against dense: cats measure batch --rows 1 2 4 8 16.

The rows' masks are independent, or as much alike as the correlation of the rows makes them; with --model they
are those of consecutive tokens of a text, and of tokens of different texts. Writes a record mlp_latency.
"""

import argparse
import itertools
import time

import torch

from cats.benchmarking import dense, latency, workload
from cats.benchmarking import timing as benchmarking
from cats.benchmarking.real import RealModel

DENSE = ["dense_eager", "dense_max_autotune", "dense_coordinate_descent"]
VARIANTS = ["cats", "cats_mask_dense"]


def main() -> None:
    options = parse()
    started = time.time()
    device = workload.device_or_quick(options.quick)
    bandwidth = benchmarking.read_bandwidth() if device.type == "cuda" else None
    print(latency.HEADER)
    rows, model, data = [], {"id": "one gated MLP", "weights": "random"}, {"seed": options.seed}
    if options.model:
        net = RealModel(options.model, dtype=options.dtype, device=str(device), tokens=options.tokens)
        model, data = net.model, net.data
    for count in options.rows:
        best = None
        for kind, sparsity in itertools.product(kinds(options), options.sparsity):
            if options.model:
                layers = net.layers(sparsity, rows=count, texts=kind == "texts")
            else:
                layers = random_rows(count, kind, sparsity, options, device)
            labels = {"masks": kind if isinstance(kind, str) else "random", "correlation": correlation(kind)}
            bench = latency.Bench(layers, options, device, bandwidth, labels)
            if best is None:
                bench.dense(options.dense)
            bench.best = best = bench.best or best
            bench.sparse(sparsity, VARIANTS)
            rows += bench.rows
    workload.record("mlp_latency", options, rows, model, data, started)


def kinds(options) -> list:
    """Correlations of random rows, or kinds of real ones."""
    return ["tokens", "texts"] if options.model else options.correlation


def correlation(kind) -> float | None:
    return None if isinstance(kind, str) else kind


def random_rows(rows: int, kind: float, sparsity: float, options, device) -> list[workload.Layer]:
    d, m = workload.shape(options.shape)
    dtype = getattr(torch, options.dtype)
    count = 2 if options.quick else workload.layer_count(m, d, dtype.itemsize)
    layers = workload.random_layers(
        m, d, count, rows=rows, correlation=kind, dtype=dtype, device=device, seed=options.seed
    )
    workload.set_sparsity(layers, sparsity)
    return layers


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shape", default="4096x11008", help="hidden x intermediate size, random weights")
    parser.add_argument("--model", help="take weights, inputs and thresholds of this trained model instead")
    parser.add_argument("--tokens", type=int, default=16384, help="calibration tokens for --model")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 2, 4, 8, 16])
    parser.add_argument("--sparsity", type=float, nargs="+", default=[0.5, 0.7, 0.9])
    parser.add_argument(
        "--correlation", type=float, nargs="+", default=[0.0, 0.9], help="of random rows, pairwise"
    )
    parser.add_argument("--dense", nargs="+", default=DENSE, choices=list(dense.RECIPES))
    return workload.finish(parser)


if __name__ == "__main__":
    workload.run(main)
