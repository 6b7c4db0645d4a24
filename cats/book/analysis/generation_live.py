"""Greedy text of a sparse model beside the dense one's: after how many tokens they part."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import pandas as pd
import torch
from torch import Tensor

from cats.book.analysis.generation import DECODE_ONLY, EVERYWHERE
from cats.book.html_table import Table
from cats.book.words import tidy
from cats.core.sparsify import restore, sparsify
from cats.core.thresholds import Thresholds
from cats.criteria.generate import continue_prompts
from cats.criteria.masking import Masking, Policy

_PREFILL_TOKENS = 2048  # tokens of prompts read at once
_DENSE = "dense"


@dataclass
class Greedy:
    """Texts of the dense model and of CATS under each policy, by label.

    `texts`: label -> token ids added to each prompt, dense first. `curves`: label -> `curve`. `realised`:
    label -> gate sparsity by phase, "prefill" and "decode".
    """

    texts: dict[str, list[list[int]]]
    curves: dict[str, pd.DataFrame]
    realised: dict[str, dict[str, float]]

    @property
    def tokens(self) -> int:
        """Tokens generated in all."""
        return sum(len(ids) for added in self.texts.values() for ids in added)


def compare(
    model,
    tokenizer,
    thresholds: Thresholds,
    prompts: Sequence[Sequence[int]],
    sparsities: Sequence[float],
    *,
    new_tokens: int,
) -> Greedy:
    """Continue each prompt dense and at each gate sparsity, the prompt masked and not; dense afterwards."""
    dense, _ = continuations(model, tokenizer, prompts, new_tokens=new_tokens)
    found = Greedy({_DENSE: dense}, {}, {})
    policies = {EVERYWHERE: Policy(), DECODE_ONLY: Policy(prefill="dense")}
    for sparsity in sparsities:
        sparsify(model, thresholds, sparsity)
        for masked, policy in policies.items():
            label = f"CATS {sparsity:.0%}, {masked}"
            added, realised = continuations(model, tokenizer, prompts, new_tokens=new_tokens, policy=policy)
            found.texts[label] = added
            found.curves[label] = curve(dense, added, label)
            found.realised[label] = {phase: shares["gate_sparsity"] for phase, shares in realised.items()}
    restore(model)
    return found


def table(found: Greedy) -> Table:
    """How long each text equals the dense model's, and what was realised."""
    frame = pd.DataFrame(
        [
            {
                "": label,
                "equal tokens": each.length.iloc[0],
                "equal to the end": each.share.iloc[-1],
                "realised, prompt": found.realised[label].get("prefill"),
                "realised, decode": found.realised[label].get("decode"),
            }
            for label, each in found.curves.items()
        ]
    )
    shares = dict.fromkeys(("equal to the end", "realised, prompt", "realised, decode"), "{:.1%}")
    caption = f"Live: greedy texts of {len(found.texts[_DENSE])} prompts beside those of the dense model"
    return Table(frame, {"equal tokens": "{:.1f}", **shares}, caption=caption)


def example(found: Greedy, tokenizer, prompts: Sequence[Sequence[int]]) -> Table:
    """The first prompt whose text changes, the first of all if none does, with what each model adds."""
    dense, first = found.texts[_DENSE], next(iter(found.curves))
    changed = (n for n, ids in enumerate(dense) if common(ids, found.texts[first][n]) < len(ids))
    chosen = next(changed, 0)
    texts = {"prompt": prompts[chosen], **{name: added[chosen] for name, added in found.texts.items()}}
    lines = [{"": name, "text": " ".join(tokenizer.decode(ids).split())} for name, ids in texts.items()]
    return Table(pd.DataFrame(lines), caption="Live: one prompt, and what each model adds")


def words(found: Greedy, model: str) -> str:
    """After how many tokens the texts of `model` part, on average, as a sentence."""
    parts = [f"{label} for {each.length.iloc[0]:.1f}" for label, each in found.curves.items()]
    longest = max(map(len, found.texts[_DENSE]))
    return tidy(
        f"On {model} the sparse text equals the dense one for so many of {longest} tokens on average: "
        f"{'; '.join(parts)}."
    )


def prompts(batches: Iterable[dict[str, Tensor]]) -> list[list[int]]:
    """The token ids of each sequence of `batches` (as of `cats.corpora.batches`), without padding."""
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
    `policy`, the paper's by default; what is realised is as `Masking.realised` gives it.
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
