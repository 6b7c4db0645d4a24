"""Where the time of a decoded token goes, kernel by kernel: cats measure step --models llama-2-7b.

The compiled step of the decoding loop, dense and sparse, under the profiler. Writes a record decode_step for
each model. Rates under a profiler are not to be quoted: decode.py has those.
"""

import argparse
import time

import torch

from cats.benchmarking import decode, workload
from cats.benchmarking import timing as benchmarking
from cats.core.sparsify import sparsify
from cats.decoding import graph as decoding


def main() -> None:
    options = parse()
    device = workload.device_or_quick(options.quick)
    for name in options.models:
        started = time.time()
        bench = decode.Bench(name, options, device)
        rows = profile(bench, 0.0)
        thresholds = bench.thresholds()
        decoding.release(bench.model)
        torch._dynamo.reset()
        for sparsity in options.sparsity:
            sparsify(bench.model, thresholds, sparsity)
            rows += profile(bench, sparsity)
        workload.record("decode_step", options, rows, bench.info, bench.data, started, suffix=name)


def profile(bench: decode.Bench, sparsity: float) -> list[dict]:
    """A row for each kernel of one step, in order; `gap_us` is the idle time before it."""
    decode.loop(bench, "dense_loop", 2)  # compiles
    decoder = decoding.decoder_for(bench.model, bench.length)
    decoder.prefill(bench.prompt)
    kernels = benchmarking.timeline(decoder.step, steps=min(20, max(bench.options.new) - 4), warmup=2)
    print(
        f"{bench.name:<22} {sparsity:4.2f} {len(kernels)} kernels, {sum(k['us'] for k in kernels):.0f} us "
        f"and {sum(k['gap_us'] for k in kernels):.0f} us between them"
    )
    labels = {"geometry": bench.name, "weights": bench.info["weights"], "sparsity": sparsity}
    return [{**labels, "order": order, **kernel} for order, kernel in enumerate(kernels)]


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--models", nargs="+", default=["llama-2-7b"], help="geometries or trained models")
    parser.add_argument("--sparsity", type=float, nargs="+", default=[0.5, 0.9])
    parser.add_argument("--prompt", type=int, default=128, help="tokens")
    parser.add_argument("--new", type=int, nargs="+", default=[32], help="tokens that the cache has room for")
    parser.add_argument("--layers", type=int, help="keep so many layers of a geometry")
    parser.add_argument("--tokens", type=int, default=32768, help="calibration tokens of a trained model")
    parser.set_defaults(dense=["loop"])
    return workload.finish(parser)


if __name__ == "__main__":
    workload.run(main)
