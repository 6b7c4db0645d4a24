"""Where the time of a decoded token goes, kernel by kernel: `cats measure step`.

The compiled step of the decoding loop, dense and sparse, under the profiler. Writes a record decode_step for
each model. Rates under a profiler are not to be quoted: `cats measure decode` has those.
"""

import time
from argparse import Namespace

import torch

from cats.benchmarking import decode, timing, workload
from cats.core.sparsify import sparsify
from cats.decoding import graph as decoding


def measure(options: Namespace) -> None:
    """Profile one step of every model, dense and sparse; write a record for each."""
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
        workload.record(
            "decode_step", options, rows, bench.info, bench.data, started,
            ops=[*workload.mlp_ops([1]), "decoding"], suffix=name,
        )  # fmt: skip


def profile(bench: decode.Bench, sparsity: float) -> list[dict]:
    """A row for each kernel of one step, in order; `gap_us` is the idle time before it."""
    decode.loop(bench, "dense_loop", 2)  # compiles
    decoder = decoding.decoder_for(bench.model, bench.length)
    decoder.prefill(bench.prompt)
    kernels = timing.timeline(decoder.step, steps=min(20, max(bench.options.new) - 4), warmup=2)
    print(
        f"{bench.name:<22} {sparsity:4.2f} {len(kernels)} kernels, {sum(k['us'] for k in kernels):.0f} us "
        f"and {sum(k['gap_us'] for k in kernels):.0f} us between them"
    )
    labels = {"geometry": bench.name, "weights": bench.info["weights"], "sparsity": sparsity}
    return [{**labels, "order": order, **kernel} for order, kernel in enumerate(kernels)]
