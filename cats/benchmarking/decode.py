"""Tokens per second of greedy decoding, CATS against dense: `cats measure decode`.

A geometry gets random weights, any other name is a trained model. The sparse op is checked on the model's own
hidden states before anything is timed. Writes a record decode for each model.
"""

import gc
import time
from argparse import Namespace

import torch
from cats_kernels import cats_mlp
from tqdm import tqdm
from transformers import LogitsProcessor, LogitsProcessorList

from cats import corpora, paths
from cats.benchmarking import timing, workload
from cats.calibration.calibrate import calibrate
from cats.calibration.observe import SparsityMeter
from cats.core import accounting, structure
from cats.core.sparsify import sparsify
from cats.decoding import attention
from cats.decoding import graph as decoding
from cats.errors import CatsError
from cats.models import load as models
from cats.models.geometries import GEOMETRIES

# Decoding loops of this project, by Inductor options; the fastest of them is the dense baseline.
LOOPS = {
    "loop": decoding.FASTEST,
    "loop_max_autotune": {"max_autotune": True, "coordinate_descent_tuning": True},
}
TRANSFORMERS = ("generate_eager", "generate_static")
DENSE = ["generate_eager", "generate_static", "loop", "loop_max_autotune"]
SPARSE = ["generate_eager", "generate_static", "generate_greedy", "loop"]


class Bench:
    """Rows of one model: dense first, then each sparsity; `best` is the fastest dense tokens/s by length."""

    def __init__(self, name: str, options, device: torch.device):
        known = name if name not in GEOMETRIES else f"{models.RANDOM}{name}"
        loaded = models.load(
            known, dtype=options.dtype, device=str(device), seed=options.seed, layers=options.layers
        )
        self.name, self.options, self.device = paths.without_folders(name), options, device
        self.model, self.info, self.tokenizer = loaded.model, loaded.info, loaded.tokenizer
        self.trained = loaded.info["weights"] == "trained"
        self.bytes = accounting.account(self.model)
        self.length = options.prompt + max(options.new)
        self.prompt, self.data = self._prompt()
        self.rows: list[dict] = []
        self.best: dict[int, float] = {}
        self.decoders: dict[str, decoding.Decoder] = {}
        self.warm: set[str] = set()

    def _prompt(self) -> tuple[torch.Tensor, dict]:
        """Token ids [1, prompt]: of held-out text, or random where there is no tokenizer."""
        count = self.options.prompt
        if self.trained:
            text = corpora.load(split="test")
            batches = corpora.batches(
                text, self.tokenizer, tokens=count, sequence_length=count, batch_size=1, pad=False
            )
            return batches[0]["input_ids"].to(self.device), batches.info
        generator = torch.Generator().manual_seed(self.options.seed)
        vocabulary = self.model.config.get_text_config().vocab_size
        ids = torch.randint(0, vocabulary, (1, count), generator=generator)
        return ids.to(self.device), {"corpus": "random token ids", "tokens": count, "seed": self.options.seed}

    def thresholds(self):
        """Calibrated on text; those of random weights on what the dense model decodes from the prompt."""
        if self.trained:
            text = corpora.batches(
                corpora.load(), self.tokenizer, tokens=self.options.tokens, sequence_length=512, pad=False
            )
            return calibrate(self.model, text, source={"corpus": text.info})
        if "loop" in self.options.dense:
            decoder = decoding.decoder_for(self.model, self.length)  # the one measured: nothing to compile
        else:
            decoder = decoding.Decoder(self.model, self.length, options=None)
        ids = decoder.generate(self.prompt, max(self.options.new)).tokens
        batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        return calibrate(self.model, [batch], skip_first=self.options.prompt)

    def dense(self) -> None:
        for variant in ordered(self.options.dense):
            self._rows(f"dense_{variant}", variant, 0.0)

    def sparse(self) -> None:
        """Every variant at every sparsity: what it compiled serves all of them."""
        thresholds = self.thresholds()
        decoding.release(self.model)
        attention.remove(self.model)  # as dense: Transformers' own loops without this project's attention
        variants = ordered(self.options.sparse)
        for variant in tqdm(variants, desc=self.name, disable=None):
            for sparsity in self.options.sparsity:
                sparsify(self.model, thresholds, sparsity)
                if variant == variants[0]:
                    print(f"{self.name}: op differs from float64 by {self.check():.1e} at {sparsity}")
                self._rows(f"cats_{variant}", variant, sparsity)

    def _rows(self, name: str, variant: str, sparsity: float) -> None:
        limit = self.options.generate_limit if variant.startswith("generate") else max(self.options.new)
        for new in self.options.new:
            if new <= limit:
                self._row(name, RUNNERS.get(variant, loop), sparsity, new)

    def _row(self, variant: str, run, sparsity: float, new: int) -> None:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        if variant not in self.warm or run is RUNNERS["generate_static"]:
            run(self, variant, new)  # compiles and warms up; only a static cache compiles for each length
            self.warm.add(variant)
        warmup_s = time.perf_counter() - start
        runs = 1 if self.options.quick or new > self.options.repeat_limit else self.options.runs
        samples = [run(self, variant, new) for _ in range(runs)]
        rates = sorted(rate for rate, _, _ in samples)
        tokens = samples[-1][2]
        rate = rates[len(rates) // 2]
        if variant.startswith("dense"):
            self.best[new] = max(self.best.get(new, 0.0), rate)
        elif new not in self.best:
            raise CatsError(f"No dense variant was measured for {new} tokens: add one to --dense.")
        row = {
            "geometry": self.name, "weights": self.info["weights"], "sparsity": sparsity, "variant": variant,
            "prompt_tokens": self.options.prompt, "new_tokens": new, "tokens_per_s": rate,
            "tokens_per_s_low": rates[0], "tokens_per_s_high": rates[-1], "runs": len(rates),
            "first_token_s": min(first for _, first, _ in samples), "warmup_s": round(warmup_s, 2),
            "bound_speedup": self.bytes.speedup_bound(sparsity),
            "peak_memory_gb": torch.cuda.max_memory_allocated() / 1e9 if self.device.type == "cuda" else None,
            "realised_sparsity": self._realised(tokens) if variant.startswith("cats") else 0.0,
        }  # fmt: skip
        self.rows.append(row)
        print(
            f"{self.name:<22} {sparsity:4.2f} {variant:<22} {new:5d} {rate:8.1f} tok/s, "
            f"{rate / self.best[new]:5.2f} x dense so far (bytes {row['bound_speedup']:.2f}), "
            f"first {1e3 * row['first_token_s']:.0f} ms, realised {row['realised_sparsity']:.3f}",
            flush=True,
        )

    @torch.no_grad()
    def _realised(self, tokens: torch.Tensor) -> float:
        """Share of gate activations zero for the decoded tokens [1, prompt + new], in one pass over them."""
        valid = torch.arange(tokens.shape[1], device=tokens.device)[None] >= self.options.prompt
        meter = SparsityMeter(self.model, valid)
        with meter:
            self.model(input_ids=tokens, use_cache=False, logits_to_keep=1)
        return meter.overall

    @torch.no_grad()
    def check(self) -> float:
        """Largest relative error of the op on this model's hidden states; CatsError where it is wrong."""
        seen = {}
        modules = structure.cats_mlps(self.model)
        hooks = [
            m.register_forward_pre_hook(lambda m, args: seen.setdefault(m, args[0][0, -1:].clone()))
            for m in modules
        ]
        self.model(input_ids=self.prompt, use_cache=False, logits_to_keep=1)
        for hook in hooks:
            hook.remove()
        layers = [
            workload.clear_threshold(
                workload.make_layer(m.w_gate, m.w_up, m.w_down_t, seen[m], m.activation, m.threshold.clone())
            )
            for m in (modules[0], modules[-1])
        ]
        return workload.require_correct(
            "cats_mlp",
            lambda layer: cats_mlp(*layer.arguments(), out_dtype=torch.float32),
            layers,
            tolerance=1e-5,
        )


def ordered(variants: list[str]) -> list[str]:
    """Transformers' own first, without this project's attention: the loops install it, and it stays.

    `generate_greedy` comes last: it finds the decoder that the loop has compiled.
    """
    return sorted(variants, key=lambda name: (name not in TRANSFORMERS, name not in LOOPS))


def loop(bench: Bench, variant: str, new: int):
    """This project's decoding loop; one decoder serves all lengths, and all sparsities of a sparse model."""
    attention.install(bench.model)
    options = LOOPS[variant.split("_", 1)[1]]
    if options is decoding.FASTEST:
        decoder = decoding.decoder_for(bench.model, bench.length)
    elif variant not in bench.decoders:
        bench.decoders[variant] = decoder = decoding.Decoder(bench.model, bench.length, options=options)
    else:
        decoder = bench.decoders[variant]
    generation = decoder.generate(bench.prompt, new)
    return generation.tokens_per_s, generation.first_token_s, generation.tokens


class FirstToken(LogitsProcessor):
    """The time at which the first token's logits are there; later ones pass as they are."""

    def __init__(self, device: torch.device):
        self.device, self.time = device, None

    def __call__(self, input_ids, scores):
        if self.time is None:
            wait(self.device)
            self.time = time.perf_counter()
        return scores


def generate(bench: Bench, new: int, **options):
    """Transformers' own generate, greedy, exactly `new` tokens."""
    first = FirstToken(bench.device)
    tokens, begin, end = call(bench, new, logits_processor=LogitsProcessorList([first]), **options)
    return (new - 1) / (end - first.time), first.time - begin, tokens


def generate_greedy(bench: Bench, new: int):
    """Transformers' generate with this project's loop; what generate adds counts to the first token."""
    generations = []

    def greedy(*args, **kwargs):
        generations.append(decoding.timed_greedy(*args, **kwargs))
        return generations[0].tokens

    tokens, begin, end = call(bench, new, custom_generate=greedy)
    return generations[0].tokens_per_s, end - begin - generations[0].decode_s, tokens


def call(bench: Bench, new: int, **options):
    """Tokens [1, prompt + new] of one generate(), and the times of its begin and end in seconds."""
    wait(bench.device)
    begin = time.perf_counter()
    tokens = bench.model.generate(
        bench.prompt, attention_mask=torch.ones_like(bench.prompt), do_sample=False, eos_token_id=None,
        max_new_tokens=new, pad_token_id=0, **options,
    )  # fmt: skip
    wait(bench.device)
    return tokens, begin, time.perf_counter()


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


RUNNERS = {
    "generate_eager": lambda bench, _, new: generate(bench, new),
    "generate_static": lambda bench, _, new: generate(bench, new, cache_implementation="static"),
    "generate_greedy": lambda bench, _, new: generate_greedy(bench, new),
}


def measure(options: Namespace) -> None:
    """Time every model, dense and sparse; write a record for each."""
    options.dense = workload.chosen("dense variant", options.dense, DENSE)
    options.sparse = workload.chosen("sparse variant", options.sparse, SPARSE)
    if min(options.new) < 2:
        raise CatsError("--new must be at least 2: the first token belongs to the prompt.")
    device = workload.device_or_quick(options.quick)
    for name in options.models:
        started = time.time()
        bench = Bench(name, options, device)
        bench.dense()
        torch._dynamo.reset()
        bench.decoders.clear()
        bench.sparse()
        for row in bench.rows:
            ratio = row["tokens_per_s"] / bench.best[row["new_tokens"]]
            name_and_length = f"of {name} at {row['new_tokens']} tokens"
            row["speedup_over_best_dense"] = timing.speedup(ratio, row["bound_speedup"], name_and_length)
        workload.record(
            "decode", options, bench.rows, bench.info, bench.data, started,
            ops=[*workload.mlp_ops([1]), "decoding"], suffix=name,
        )  # fmt: skip
        del bench
        gc.collect()
