"""Recorded rates of whole models: gains over the fastest dense decoding, their bounds, and this CPU."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import pandas as pd

from cats.benchmarking import timing
from cats.book.box import Box
from cats.book.html_table import Table
from cats.core.accounting import Accounting, account
from cats.errors import CatsError
from cats.models import load as models
from cats.records import record as records

NAMES = {
    "llama-2-7b": "Llama-2-7B",
    "mistral-7b": "Mistral-7B",
    "llama-2-13b": "Llama-2-13B",
    "qwen2.5-coder-1.5b-instruct": "Qwen2.5-Coder-1.5B",
    "smollm2-135m-instruct": "SmolLM2-135M",
}
LARGE = ("Llama-2-7B", "Mistral-7B", "Llama-2-13B")  # of random weights
LEVELS = (0.5, 0.7, 0.9)
WAYS = ("generate_eager", "generate_static", "loop")


@dataclass
class Rates:
    """Records `decode` of one kind of device: `rows` of all models, named as their makers write them."""

    records: list[records.Record]
    rows: pd.DataFrame

    @property
    def shortest(self) -> int:
        return int(self.rows.new_tokens.min())

    @property
    def models(self) -> list[str]:
        return list(dict.fromkeys(self.rows.geometry))

    @property
    def device(self) -> str:
        return self.records[0].device

    def value(
        self,
        model: str,
        variant: str,
        sparsity: float,
        new_tokens: int | None = None,
        column: str = "tokens_per_s",
    ) -> float | None:
        """One value, at the shortest output where no length is given; None where it was not measured."""
        rows = self.rows[(self.rows.geometry == model) & (self.rows.variant == variant)]
        length = self.shortest if new_tokens is None else new_tokens
        rows = rows[(rows.sparsity == sparsity) & (rows.new_tokens == length)]
        return float(rows[column].iloc[0]) if len(rows) else None

    def gain(self, model: str, sparsity: float, new_tokens: int | None = None) -> float | None:
        """CATS in the loop over the fastest dense way of that length."""
        return self.value(model, "cats_loop", sparsity, new_tokens, "speedup_over_best_dense")

    def bound(self, model: str, sparsity: float) -> float | None:
        """What the bytes of the shortest output allow."""
        return self.value(model, "cats_loop", sparsity, column="bound_speedup")


def on_gpu(begin: str = timing.SHIPPED) -> Rates:
    """The records decode-<begin>-<model>, in the order of NAMES; CatsError where there is none."""
    of_device = [r for r in records.every("decode") if r.path.stem.startswith(f"decode-{begin}-")]
    newest = {record.rows.geometry.iloc[0]: record for record in of_device}
    found = [newest[name] for name in NAMES if name in newest]
    if not found:
        raise CatsError(f"No record decode-{begin} is there: run the chapter with source=measure on a GPU.")
    return Rates(found, pd.concat([record.rows.replace({"geometry": NAMES}) for record in found]))


def on_cpu() -> Rates:
    """The records of CPUs, with all threads and with one."""
    found = [r for r in records.every("decode") if not r.on_gpu]
    return Rates(found, pd.concat([record.rows for record in found]))


def counted() -> dict[str, Accounting]:
    """The weights of the paper's models and of Llama-3-8B, by name, without loading any."""
    names = ("Llama-2-7B", "Mistral-7B", "Llama-2-13B", "Llama-3-8B")
    return {name: account(models.config(f"random:{name.lower()}")) for name in names}


def box(rates: Rates) -> Box:
    """The chapter in a box: the first model at its shortest and longest output."""
    name = LARGE[0]
    longest = int(rates.rows[rates.rows.geometry == name].new_tokens.max())
    eager = [rates.value(name, f"{kind}_generate_eager", s) for kind, s in (("dense", 0.0), ("cats", 0.5))]
    return Box(
        "How much faster does a whole model decode, against the fastest dense decoding?",
        f"{name} at 50% sparsity decodes {rates.gain(name, 0.5):.2f} times as many tokens a second as the "
        f"fastest dense way over {rates.shortest} new tokens, of {rates.bound(name, 0.5):.2f} that the bytes "
        f"allow, and {rates.gain(name, 0.5, longest):.2f} times over {longest:,}. "
        f"{NAMES['smollm2-135m-instruct']} gains nothing there "
        f"({rates.gain(NAMES['smollm2-135m-instruct'], 0.5):.2f}).",
        "fig-decoding-h100",
        f"One {rates.device}, bf16, one sequence, random weights in the large models. The gain takes this "
        f"book's loop or a compiled step: in eager `generate` CATS is slower than dense, {eager[1]:.0f} "
        f"against {eager[0]:.0f} tokens a second.",
        "cats reproduce 09 -p source=measure",
    )


def bounds_table(accounts: Mapping[str, Accounting]) -> Table:
    """Bytes of a token in bf16, the share of gated MLPs, and the bound on the speed-up by gate sparsity."""
    frame = pd.DataFrame(
        {
            "model": list(accounts),
            "GB a token": [each.bytes_per_token() / 1e9 for each in accounts.values()],
            "in MLPs": [each.mlp_share for each in accounts.values()],
            **{f"{s:.0%}": [each.speedup_bound(s) for each in accounts.values()] for s in LEVELS},
        }
    )
    formats = {"GB a token": "{:.1f}", "in MLPs": "{:.0%}", **{f"{s:.0%}": "{:.2f}" for s in LEVELS}}
    caption = "Bytes of a token in bf16, and the bound on the speed-up at three gate sparsities"
    return Table(frame, formats, caption=caption)


def ways_table(rates: Rates) -> Table:
    """Dense tokens/s of the three ways to decode, and the gain of CATS in the loop over the fastest."""
    dense = {
        way.removeprefix("generate_"): [rates.value(name, f"dense_{way}", 0.0) for name in rates.models]
        for way in WAYS
    }
    gains = {
        f"CATS {s:.0%}": [f"{rates.gain(name, s):.2f} of {rates.bound(name, s):.2f}" for name in rates.models]
        for s in LEVELS
    }
    frame = pd.DataFrame({"model": rates.models, **dense, **gains})
    caption = (
        f"Dense tokens a second of three ways to decode {rates.shortest} tokens, and the gain of CATS in the "
        "loop over the fastest, of what the bytes allow"
    )
    return Table(frame, dict.fromkeys(dense, "{:.0f}"), caption=caption)


def numbers(rates: Rates, accounts: Mapping[str, Accounting]) -> dict:
    """What the page says of the recorded rates, by the names under which it is glued."""
    seven, mistral = LARGE[:2]
    longest = int(rates.rows[rates.rows.geometry == seven].new_tokens.max())
    large = [name for name in rates.models if name in LARGE]
    kept = [(rates.gain(name, s) - 1) / (rates.bound(name, s) - 1) for name in large for s in LEVELS]
    keys = ["geometry", "sparsity", "new_tokens"]
    greedy = rates.rows[rates.rows.variant == "cats_generate_greedy"]
    greedy = greedy[greedy.geometry.isin(large)]
    loop = rates.rows[rates.rows.variant == "cats_loop"]
    both = greedy.merge(loop, on=keys, suffixes=("", "_loop"))
    ratio = both.tokens_per_s / both.tokens_per_s_loop
    memory = [
        rates.value(name, "cats_loop", 0.5, column="peak_memory_gb")
        / rates.value(name, "dense_loop", 0.0, column="peak_memory_gb")
        for name in rates.models
    ]
    static = [rates.value(seven, f"{kind}_generate_static", s) for kind, s in (("cats", 0.5), ("dense", 0.0))]
    return {
        "decoding_llama_bound": accounts[seven].speedup_bound(0.5),
        "decoding_h100_dense": rates.value(seven, "dense_loop", 0.0),
        "decoding_h100_sparse": rates.value(seven, "cats_loop", 0.5),
        "decoding_h100_gain": rates.gain(seven, 0.5),
        "decoding_h100_gain_long": rates.gain(seven, 0.5, longest),
        "decoding_h100_gain_mistral_long": rates.gain(mistral, 0.5, longest),
        "decoding_h100_longest": longest,
        "decoding_h100_part_low": min(kept),
        "decoding_h100_part_high": max(kept),
        "decoding_h100_smol": rates.gain(NAMES["smollm2-135m-instruct"], 0.5),
        "decoding_h100_greedy_low": ratio.min(),
        "decoding_h100_greedy_high": ratio.max(),
        "decoding_h100_memory": max(memory),
        "decoding_h100_static": static[0] / static[1],
        "decoding_h100_eager_dense": rates.value(seven, "dense_generate_eager", 0.0),
        "decoding_h100_eager": rates.value(seven, "cats_generate_eager", 0.5),
    }


def cpu_table(rows: pd.DataFrame) -> Table:
    """Sparse rows of the records of CPUs."""
    rows = rows[rows.sparsity > 0]
    columns = {
        "geometry": ("model", "{}"),
        "weights": ("weights", "{}"),
        "threads": ("threads", "{}"),
        "sparsity": ("gate sparsity", "{:.0%}"),
        "tokens_per_s": ("tokens/s", "{:.1f}"),
        "speedup_over_best_dense": ("× dense", "{:.2f}"),
        "bound_speedup": ("byte bound", "{:.2f}"),
    }
    frame = rows[list(columns)].rename(columns={key: name for key, (name, _) in columns.items()})
    return Table(frame, dict(columns.values()), caption="Decoding on a CPU, recorded")


def h200_table(record: records.Record) -> Table:
    """The loop's rates on an H200, dense and sparse; no gain stands where it would exceed the byte bound."""
    rows = record.rows[record.rows.variant.isin(["dense_loop", "cats_loop"])].sort_values("sparsity")
    gains = rows.speedup_over_best_dense.to_numpy(dtype=float)
    frame = pd.DataFrame(
        {
            "gate sparsity": [f"{s:.0%}" if s else "dense" for s in rows.sparsity],
            "tokens/s": rows.tokens_per_s,
            "× dense": ["not reported" if math.isnan(gain) else f"{gain:.2f}" for gain in gains],
            "byte bound": rows.bound_speedup,
        }
    )
    formats = {"tokens/s": "{:.1f}", "byte bound": "{:.2f}"}
    caption = f"Llama-2-7B's geometry, random weights, bfloat16, batch 1, 128 new tokens, {record.device}"
    return Table(frame, formats, caption=caption)


def live_table(rows: pd.DataFrame) -> Table:
    """Rates of this CPU with the range of the rounds; dense first."""
    spread = zip(rows.tokens_per_s_low, rows.tokens_per_s_high, strict=True)
    frame = pd.DataFrame(
        {
            "gate sparsity": [f"{s:.0%}" if s else "dense" for s in rows.sparsity],
            "tokens/s": rows.tokens_per_s,
            "lowest to highest": [f"{low:.1f} to {high:.1f}" for low, high in spread],
            "× dense": rows.speedup_over_best_dense,
            "byte bound": rows.bound_speedup,
        }
    )
    formats = {"tokens/s": "{:.1f}", "× dense": "{:.2f}", "byte bound": "{:.2f}"}
    return Table(frame, formats, caption="generate on the CPU that made this page, median of the rounds")


def live_numbers(rows: pd.DataFrame, model: dict, own: Accounting) -> dict:
    """What the page says of this CPU; `rows` of `cpu_timing.decode_rate`, dense first."""
    dense, most = rows.iloc[0], rows.iloc[-1]
    return {
        "decoding_live_model": model["id"],
        "decoding_live_threads": int(dense.threads),
        "decoding_live_dense": dense.tokens_per_s,
        "decoding_live_sparsity": most.sparsity,
        "decoding_live_rate": most.tokens_per_s,
        "decoding_live_gain": most.speedup_over_best_dense,
        "decoding_live_bound": most.bound_speedup,
        "decoding_live_share": own.mlp_share,
        "decoding_live_head": own.head_weights / own.weights_read(),
    }
