"""Greedy text beside the dense model's, and recorded answers to GSM8K: what is kept, and what breaks."""

from collections.abc import Iterable, Iterator, Sequence

import pandas as pd
import torch
from torch import Tensor

from cats.book.analysis import recorded
from cats.criteria.generate import continue_prompts
from cats.criteria.masking import Masking, Policy
from cats.evaluation.intervals import as_text, difference
from cats.records import paper
from cats.records.packing import unpack

EVERYWHERE, DECODE_ONLY = "all tokens", "decode only"
_PREFILL_TOKENS = 2048  # tokens of prompts read at once


def prompts(batches: Iterable[dict[str, Tensor]]) -> list[list[int]]:
    """The token ids of each row of `batches` (as of `cats.corpora.batches`), without padding."""
    return [
        ids[mask.bool()].tolist()
        for batch in batches
        for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)
    ]


def continuations(
    model, tokenizer, prompts: Sequence[Sequence[int]], *, new_tokens: int, policy: Policy | None = None
) -> tuple[list[list[int]], dict[str, dict]]:
    """Token ids that the model adds greedily to each prompt, and the sparsity realised by phase.

    At most `new_tokens` a prompt, up to and with an end-of-sequence token. A sparse model masks under
    `policy`, the paper's by default; what is realised is as `cats.masking.Masking.realised` gives it.
    """
    end = tokenizer.eos_token_id
    with Masking(model, policy) as masking:
        added = continue_prompts(
            model,
            prompts,
            new_tokens=new_tokens,
            eos=[] if end is None else [end],
            ended=lambda ids: None,
            masking=masking,
            prefill_tokens=_PREFILL_TOKENS,
        )
        return added, masking.realised()


def common(first: Sequence[int], second: Sequence[int]) -> int:
    """Tokens at the start of both that are equal."""
    pairs = enumerate(zip(first, second, strict=False))
    return next((place for place, (a, b) in pairs if a != b), min(len(first), len(second)))


def curve(dense: Sequence[Sequence[int]], sparse: Sequence[Sequence[int]], label: str) -> pd.DataFrame:
    """Share of prompts whose texts agree up to each token: label, token, share, and the mean `length`.

    Two texts that end alike before the longest one does agree to its end.
    """
    longest = max(len(ids) for ids in dense)
    lengths = torch.tensor(
        [longest if list(a) == list(b) else common(a, b) for a, b in zip(dense, sparse, strict=True)]
    )
    places = range(longest + 1)
    return pd.DataFrame(
        {
            "label": label,
            "token": places,
            "share": [float((lengths >= place).double().mean()) for place in places],
            "length": float(lengths.double().mean()),
        }
    )


def where(row) -> str:
    """Which tokens of a recorded row were masked, in the words of the figures."""
    policy = row["policy"]
    return DECODE_ONLY if isinstance(policy, dict) and policy.get("prefill") == "dense" else EVERYWHERE


def table(rows: pd.DataFrame) -> pd.DataFrame:
    """Rows of the experiment `generation` as a page shows them, a line each; dense once for each model.

    Solved is the share of problems with an exact match and its standard error; gained and lost are problems
    that only the sparse, and only the dense model solves.
    """
    rows = rows[(rows.rule != "dense") | ~rows.duplicated(["model", "task", "rule", "exact_match"])]
    return pd.DataFrame(
        [
            {
                "": recorded.label(row),
                "masked": None if row.rule == "dense" else where(row),
                "solved, %": f"{100 * row.exact_match:.1f} ± {100 * row.exact_match_se:.1f}",
                "− dense [95 %]": interval(row.delta, row.delta_low, row.delta_high),
                "gained, lost": None if pd.isna(row.delta) else f"{row.gained:.0f}, {row.lost:.0f}",
                "realised, prompt": row.get("realised_prefill"),
                "realised, decode": row.get("realised_decode"),
            }
            for _, row in rows.iterrows()
        ]
    )


def interval(delta: float | None, low: float, high: float) -> str | None:
    """A difference of shares in percentage points, "−9.1 [−11.0, −7.2]"; None where there is none."""
    if delta is None or pd.isna(delta):
        return None
    return as_text(delta, low, high, "+.1f", scale=100)


def kept(rows: pd.DataFrame) -> pd.DataFrame:
    """Exact match as a share of the dense model's, for `cats.plots.generation.over_sparsity`.

    First the values of the paper's rebuttal; then recorded rules with a gate sparsity, each a series with
    its tokens masked. Models that solve nothing dense have no share and are left out.
    """
    reported = paper.table("generation")
    reported = reported[reported.gate_sparsity.notna()]
    points = []
    for name, part in reported.groupby("model", sort=False):
        base = part[part.method == "dense"].value.iloc[0]
        points += [
            {
                "series": f"{name}, paper",
                "gate_sparsity": row.gate_sparsity,
                "value": row.value / base,
                "low": None,
                "high": None,
                "reported": True,
            }
            for row in part[part.method == "CATS"].itertuples()
        ]
    for _, row in _compared(rows):
        base = row.exact_match - row.delta
        if base > 0:
            points.append(
                {
                    "series": f"{row.method}, {where(row)}",
                    "gate_sparsity": row.gate_sparsity,
                    "value": row.exact_match / base,
                    "low": 1 + row.delta_low / base,
                    "high": 1 + row.delta_high / base,
                    "reported": False,
                }
            )
    return pd.DataFrame(points).astype({"low": float, "high": float})


def words(rows: pd.DataFrame) -> str:
    """What CATS keeps with all tokens masked, beside the rebuttal at the same sparsity, as a sentence."""
    points = kept(rows)
    reported = points[points.reported].set_index("gate_sparsity")
    phrases = []
    for _, row in _compared(rows):
        if row.rule == "cats" and where(row) == EVERYWHERE and row.exact_match - row.delta > 0:
            own = f"{row.exact_match / (row.exact_match - row.delta):.0%}"
            level = row.gate_sparsity
            beside = ""
            if level in reported.index:
                name = reported.series[level].removesuffix(", paper")
                beside = f" (the rebuttal's {name} {reported.value[level]:.0%})"
            phrases.append(f"{own} at {level:.0%} gate sparsity{beside}")
    if not phrases:
        return "No run of CATS on these problems is recorded yet."
    return f"With all tokens masked, {rows.model.iloc[0]} keeps of its dense score {', '.join(phrases)}."


def prompt_costs(rows: pd.DataFrame) -> pd.DataFrame:
    """What masking the prompt too costs over masking the answer alone, on the same problems.

    A line for each rule and sparsity recorded both ways: label, everywhere and decode_only (exact match),
    and delta, low, high, everywhere minus decode only with a 95 % paired interval.
    """
    ways: dict[tuple, dict] = {}
    for _, row in _compared(rows):
        key = (row.model, row.task, row.documents, row.rule, row.gate_sparsity)
        ways.setdefault(key, {})[where(row)] = row
    found = []
    for both in ways.values():
        if len(both) == 2:
            masked, alone = both[EVERYWHERE], both[DECODE_ONLY]
            compared = difference(unpack(alone.correct), unpack(masked.correct))
            found.append(
                {
                    "label": recorded.label(masked),
                    "everywhere": masked.exact_match,
                    "decode_only": alone.exact_match,
                    **{name: compared[name] for name in ("delta", "low", "high")},
                }
            )
    return pd.DataFrame(found)


def broken(rows: pd.DataFrame, problems: int = 3) -> pd.DataFrame:
    """Problems that only the dense model solves, at most `problems` of them: a line for each text.

    Columns "" (whose text) and "text": the question, the dense answer, and that of each CATS row with all
    tokens masked which fails there and kept its text. Empty where the rows keep no texts.
    """
    found: dict[int, dict[str, str]] = {}
    for _, row in _compared(rows):
        examples = row.get("examples")
        if row.rule != "cats" or where(row) != EVERYWHERE or not isinstance(examples, list):
            continue
        for example in examples:
            question = example["question"].removeprefix("Question:").removesuffix("Answer:")
            texts = {"question": question, "dense": example["dense"]}
            found.setdefault(example["document"], texts)[recorded.label(row)] = example["sparse"]
    chosen = sorted(found.values(), key=len, reverse=True)[:problems]  # where most sparsities fail, first
    lines = [{"": name, "text": text.strip()} for texts in chosen for name, text in texts.items()]
    return pd.DataFrame(lines, columns=["", "text"])


def _compared(rows: pd.DataFrame) -> Iterator[tuple]:
    """Rows with a gate sparsity and a difference to dense."""
    if len(rows):
        yield from rows[rows.gate_sparsity.gt(0) & rows.delta.notna()].iterrows()
