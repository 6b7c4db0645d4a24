"""How many neurons do several tokens need together: cats measure overlap --sparsity 0.5.

Union density is the share of neurons that at least one of B masks keeps: for consecutive tokens of a text,
and for tokens of different stretches of text, layer by layer. Needs no GPU. Writes a record overlap.
"""

import argparse
import time

import torch

from cats.benchmarking import workload
from cats.benchmarking.real import RealModel
from cats.corpora import corpus as corpora
from cats.errors import CatsError
from cats.models import load as models
from cats.overlap import unions


def main() -> None:
    options = parse()
    started = time.time()
    net = RealModel(
        options.model, dtype=options.dtype, device="cuda" if torch.cuda.is_available() else "cpu",
        corpus=options.corpus, tokens=options.tokens, length=options.length,
    )  # fmt: skip
    stretches = net.batches(net.held_out, options.length * options.stretches)
    rows = [
        {"model": net.model["id"], **row}
        for sparsity in options.sparsity
        for row in unions(net.net, net.thresholds, sparsity, stretches, options.rows)
    ]
    for sparsity in options.sparsity:
        print(f"{options.model}, s={sparsity}: union density, mean over layers (independent masks)")
        for kind in ("consecutive", "different"):
            shown = []
            for count in options.rows:
                here = [r for r in rows if (r["sparsity"], r["kind"], r["rows"]) == (sparsity, kind, count)]
                union = sum(r["union_density"] for r in here) / len(here)
                independent = sum(r["independent_density"] for r in here) / len(here)
                shown.append(f"{count}: {union:.3f} ({independent:.3f})")
            print(f"  {kind:<12} {'  '.join(shown)}")
    workload.record("overlap", options, rows, net.model, net.data, started, suffix=options.model)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default=models.DEFAULT)
    parser.add_argument("--corpus", default=corpora.DEFAULT)
    parser.add_argument("--tokens", type=int, default=32768, help="of calibration")
    parser.add_argument("--length", type=int, default=192, help="tokens of a stretch of held-out text")
    parser.add_argument("--stretches", type=int, default=64)
    parser.add_argument("--sparsity", type=float, nargs="+", default=[0.5, 0.7, 0.9])
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32, 64])
    options = workload.finish(parser)
    if max(options.rows) > min(options.length, options.stretches):
        raise CatsError(
            f"{max(options.rows)} rows need as many --stretches, and a --length of as many tokens."
        )
    return options


if __name__ == "__main__":
    workload.run(main)
