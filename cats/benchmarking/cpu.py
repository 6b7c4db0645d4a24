"""CATS against dense on this machine's CPU: cats measure cpu --shapes 576x1536 --threads 1 2.

Everything is compared with the reference before it is timed; dense and sparse calls take turns. Writes a
record mlp_latency, and a record decode for each model.
"""

import argparse
import os
import time
from pathlib import Path

import torch
from tqdm import tqdm

from cats import paths
from cats.benchmarking import cpu_timing as cpu_benchmarking
from cats.benchmarking import workload
from cats.calibration import calibrate as calibration
from cats.core.thresholds import Thresholds
from cats.corpora import corpus as corpora
from cats.errors import CatsError
from cats.models import load as models
from cats.models.geometries import GEOMETRIES

SHAPES = ["576x1536", "2048x5632", "4096x11008"]  # SmolLM2-135M, a 1B class, Llama-2-7B
MODELS = [models.DEFAULT]


def latency(options) -> list[dict]:
    """Rows of every shape and number of threads."""
    rows = []
    for shape in tqdm(options.shapes, desc="shapes", disable=None):
        d, m = workload.shape(shape)
        for threads in options.threads:
            torch.set_num_threads(threads)
            found = cpu_benchmarking.mlp_latency(
                d, m, options.sparsity, dtype=options.dtype, rows=options.rows, compiled=options.compiled,
                seconds=0.1 if options.quick else options.seconds, seed=options.seed,
            )  # fmt: skip
            for row in found:
                print(
                    f"{shape:>11} {threads:2d} threads  {row['sparsity']:4.2f} {row['variant']:<14} "
                    f"{row['latency_us']:9.0f} us "
                    f"({row['latency_us_p5']:.0f} ... {row['latency_us_p95']:.0f}), "
                    f"{row['gbs']:5.1f} GB/s = {row['bound_share']:4.0%} of {row['bandwidth_gbs']:.1f}, "
                    f"{row['speedup_over_best_dense']:5.2f} x {row['best_dense']}",
                    flush=True,
                )
            rows += found
    return rows


def decode(name: str, options) -> tuple[list[dict], dict, dict]:
    """Rows of one model at every number of threads, and the provenance of model and prompt."""
    known = f"{models.RANDOM}{name}" if name in GEOMETRIES else name
    loaded = models.load(known, dtype=options.dtype, seed=options.seed, layers=options.layers)
    prompt, thresholds, data = _workload(name, loaded, options)
    rows = []
    for threads in options.threads:
        torch.set_num_threads(threads)
        found = cpu_benchmarking.decode_rate(
            loaded, thresholds, prompt, [s for s in options.sparsity if s > 0], new_tokens=options.new,
            rounds=1 if options.quick else options.rounds,
        )  # fmt: skip
        for row in found:
            print(
                f"{name} {threads:2d} threads  {row['sparsity']:4.2f} {row['variant']:<20} "
                f"{row['tokens_per_s']:6.1f} tok/s ({row['tokens_per_s_low']:.1f} ... "
                f"{row['tokens_per_s_high']:.1f}), {row['speedup_over_best_dense']:.2f} x dense "
                f"(bytes allow {row['bound_speedup']:.2f})",
                flush=True,
            )
        rows += found
    return rows, loaded.info, data


def _workload(name: str, loaded, options) -> tuple[torch.Tensor, Thresholds, dict]:
    """Prompt [1, T], thresholds, and their source: text, or random tokens where there is no tokenizer."""
    if loaded.tokenizer is None:
        generator = torch.Generator().manual_seed(options.seed)
        vocabulary = loaded.model.config.get_text_config().vocab_size
        ids = torch.randint(0, vocabulary, (1, 256), generator=generator)
        batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        thresholds = calibration.calibrate(loaded.model, [batch])
        return ids[:, : options.prompt], thresholds, {"corpus": "random token ids", "seed": options.seed}

    def batches(corpus, tokens: int, length: int):
        return corpora.batches(
            corpus, loaded.tokenizer, tokens=tokens, sequence_length=length, batch_size=1, pad=False
        )

    held_out = batches(corpora.load(split="test"), options.prompt, options.prompt)
    shipped = paths.THRESHOLDS / f"{name}.json"
    if shipped.exists():
        thresholds = Thresholds.load(shipped)
    else:
        text = batches(corpora.load(), options.tokens, 512)
        thresholds = calibration.calibrate(loaded.model, text, source={"corpus": text.info})
    return held_out[0]["input_ids"], thresholds, held_out.info


def main() -> None:
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the record is to name the CPU
    options = parse()
    if options.shapes:
        started = time.time()
        model = {"id": "one gated MLP", "weights": "random"}
        rows = latency(options)
        workload.record("mlp_latency", options, rows, model, {"seed": options.seed}, started)
    for name in options.models:
        started = time.time()
        rows, model, data = decode(name, options)
        workload.record("decode", options, rows, model, data, started, suffix=name)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shapes", nargs="*", default=SHAPES, help="hidden x intermediate size")
    parser.add_argument("--models", nargs="*", default=MODELS, help="trained models or geometries")
    parser.add_argument("--sparsity", type=float, nargs="+", default=[0.0, 0.5, 0.7])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, os.cpu_count() or 1])
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--rows", type=int, default=1, help="tokens of one call of the MLP")
    parser.add_argument("--compiled", action="store_true", help="also torch.compile (needs a C++ compiler)")
    parser.add_argument("--seconds", type=float, default=15.0, help="to measure a shape for")
    parser.add_argument("--prompt", type=int, default=64, help="tokens")
    parser.add_argument("--new", type=int, default=64, help="tokens to decode")
    parser.add_argument("--rounds", type=int, default=7, help="of dense and sparse decoding in turns")
    parser.add_argument("--layers", type=int, help="keep so many layers of a geometry")
    parser.add_argument("--tokens", type=int, default=8192, help="calibration tokens where none are shipped")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--slug", help="name of the record; default: cpu")
    parser.add_argument("--output", type=Path, help="folder of the record; default: data/records")
    parser.add_argument("--quick", action="store_true", help="few runs; no record without --output")
    options = parser.parse_args()
    if torch.cuda.is_available():
        raise CatsError("This measures a CPU but its record would name the GPU: set CUDA_VISIBLE_DEVICES=''.")
    if min(options.threads) < 1 or options.new < 3 or not 1 <= options.rows <= 16:
        raise CatsError("--threads must be at least 1, --new at least 3, --rows from 1 to 16.")
    if any(not 0 <= s < 1 for s in options.sparsity):
        raise CatsError("--sparsity is a share of gate activations, from 0 to below 1.")
    options.threads = sorted(set(options.threads))
    return options


if __name__ == "__main__":
    workload.run(main)
