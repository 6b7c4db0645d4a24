"""CATS against dense on this machine's CPU: `cats measure cpu`.

Everything is compared with the reference before it is timed; dense and sparse calls take turns. Writes a
record mlp_latency, and a record decode for each model.
"""

import os
import time
from argparse import Namespace

import torch
from tqdm import tqdm

from cats import corpora, paths
from cats.benchmarking import cpu_timing, workload
from cats.calibration.calibrate import calibrate
from cats.core.thresholds import Thresholds
from cats.errors import CatsError
from cats.models import load as models
from cats.models.geometries import GEOMETRIES


def latency(options) -> list[dict]:
    """Rows of every shape and number of threads."""
    rows = []
    for shape in tqdm(options.shapes, desc="shapes", disable=None):
        d, m = workload.shape(shape)
        for threads in options.threads:
            torch.set_num_threads(threads)
            found = cpu_timing.mlp_latency(
                d, m, options.sparsity, dtype=options.dtype, batch_size=options.batch_size,
                compiled=options.compiled, seed=options.seed,
                seconds=0.1 if options.quick else options.seconds,
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
        found = cpu_timing.decode_rate(
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
        thresholds = calibrate(loaded.model, [batch])
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
        thresholds = calibrate(loaded.model, text, source={"corpus": text.info})
    return held_out[0]["input_ids"], thresholds, held_out.info


def measure(options: Namespace) -> None:
    """Time the shapes and decoding of every model; write a record for the shapes and one for each model."""
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the record is to name the CPU
    if torch.cuda.is_available():
        raise CatsError("This measures a CPU but its record would name the GPU: set CUDA_VISIBLE_DEVICES=''.")
    if options.new < 3 or options.batch_size > 16:
        raise CatsError("--new must be at least 3, and --batch-size from 1 to 16.")
    options.threads = sorted(set(options.threads))
    if options.shapes:
        started = time.time()
        model = {"id": "one gated MLP", "weights": "random"}
        rows = latency(options)
        workload.record("mlp_latency", options, rows, model, {"seed": options.seed}, started, ops=["cpu"])
    for name in options.models:
        started = time.time()
        rows, model, data = decode(name, options)
        workload.record("decode", options, rows, model, data, started, ops=["cpu"], suffix=name)
