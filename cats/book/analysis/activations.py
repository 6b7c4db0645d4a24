"""Distributions of gate activations by layer and group of tokens, for the chapters on them."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import pandas as pd
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from cats.book.analysis import reference_code
from cats.book.box import Box
from cats.book.words import listed
from cats.calibration.calibrate import FOLDS
from cats.calibration.histogram import Binning, count, quantiles, shares_below
from cats.calibration.observe import Observation
from cats.calibration.stream import watched
from cats.core.activation import CatsMLP
from cats.core.structure import find_gated_mlps
from cats.errors import CatsError


@dataclass
class Distribution:
    """Counts of z = act(x W_gate) over the neurons of L layers and the tokens of G groups.

    `magnitudes` [L, G, bins]: |z| in bins 0.1 % wide, finer where the activation has its minimum; `signed`
    [L, G, 999]: z in the bins of the reference code, 997 of them from -1 to 1 and one beyond each end.
    `tokens` [G]. Methods take names of groups and count these together; all groups where none is named.
    """

    groups: tuple[str, ...]
    magnitudes: Tensor
    signed: Tensor
    tokens: Tensor
    binning: Binning

    def thresholds(self, sparsity: float, *groups: str) -> Tensor:
        """Thresholds [L] (fp64): the `sparsity` quantile of |z|."""
        return quantiles(self._pick(self.magnitudes, groups), torch.tensor([sparsity]), self.binning)[:, 0]

    def reference_thresholds(self, sparsity: float, *groups: str) -> Tensor:
        """Thresholds [L] (fp64) as the reference code takes them from its bins."""
        counts = reference_code.fold(self._pick(self.signed, groups))
        return reference_code.thresholds(counts, sparsity)

    def share_below(self, thresholds: Tensor | float, *groups: str) -> Tensor:
        """Share [L] of |z| below thresholds [L]: their sparsity, had masking no effect downstream."""
        counts = self._pick(self.magnitudes, groups)
        t = torch.as_tensor(thresholds, dtype=torch.float64).expand(len(counts))[:, None]
        lower, upper = shares_below(counts, t, self.binning)
        return ((lower + upper) / 2)[:, 0]

    def energy_below(self, thresholds: Tensor, *groups: str) -> Tensor:
        """Share [L] of the sum of z² below thresholds [L], to 0.2 %: bins count with their left edges."""
        energy = self._pick(self.magnitudes, groups).double() * self.binning.edges() ** 2
        below = torch.searchsorted(self.binning.edges(), thresholds.double())
        total = energy.cumsum(-1)
        return total.gather(1, (below - 1).clamp(min=0)[:, None])[:, 0] / total[:, -1]

    def largest(self, *groups: str) -> Tensor:
        """Left edge [L] of the highest bin that holds a value: the largest |z|, to 0.1 %."""
        occupied = self._pick(self.magnitudes, groups) > 0
        last = occupied.shape[-1] - 1 - occupied.flip(-1).int().argmax(-1)
        return self.binning.edges()[last]

    def negative_share(self, *groups: str) -> Tensor:
        """Share [L] of activations below zero; half of the bin at zero (0.002 wide) counts."""
        counts = self._pick(self.signed, groups).double()
        centre = counts.shape[-1] // 2
        return (counts[:, :centre].sum(-1) + counts[:, centre] / 2) / counts.sum(-1)

    def density(self, layer: int, *groups: str, merge: int = 5) -> tuple[Tensor, Tensor]:
        """Centres and density of z in a layer from -1 to 1, an odd number `merge` of bins taken together."""
        counts = self._pick(self.signed, groups)[layer].double()
        inner = counts[1:-1]
        number = len(inner) // merge
        number -= (len(inner) - number * merge) % 2  # what is cut off is the same on both sides
        cut = (len(inner) - number * merge) // 2
        inner = inner[cut : len(inner) - cut].view(number, merge).sum(-1)
        width = merge * reference_code.WIDTH
        centres = width * (torch.arange(number, dtype=torch.float64) - (number - 1) / 2)
        return centres, inner / counts.sum() / width

    def _pick(self, counts: Tensor, groups: Sequence[str]) -> Tensor:
        unknown = [group for group in groups if group not in self.groups]
        if unknown:
            raise CatsError(
                f"There is no group {unknown[0]!r} of tokens: there are {', '.join(self.groups)}."
            )
        chosen = [self.groups.index(group) for group in groups or self.groups]
        return counts[:, chosen].sum(1)


def measure(
    model: nn.Module,
    batches: Iterable[dict[str, Tensor]],
    *,
    groups: Sequence[str] = ("all",),
    label: Callable[[Tensor], Tensor] | None = None,
    progress: bool = True,
) -> Distribution:
    """Count every z in one pass of `batches` ({"input_ids", "attention_mask"}, [B, T]), the model dense.

    `label`: attention mask [B, T] → number of each token's group in `groups`, negative to leave it out;
    without it every token that is not padding is in the first group. Memory: 0.6 MB a layer and group,
    whatever the tokens. Raises CatsError where no token is counted.
    """
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else model
    device = next(decoder.parameters()).device
    with watched(model):
        mlps = find_gated_mlps(model)
        shape = (len(mlps), len(groups))
        binning = Binning(mantissa_bits=10, lowest=-24, highest=16, fold=FOLDS.get(mlps[0].activation))
        magnitudes = torch.zeros(*shape, binning.bins, dtype=torch.int64, device=device)
        signed = torch.zeros(*shape, reference_code.BINS, dtype=torch.int64, device=device)
        tokens = torch.zeros(len(groups), dtype=torch.int64)
        rows: list[Tensor] = []

        def see(layer: int, module: CatsMLP, z: Tensor, up: Tensor) -> None:
            for group, chosen in enumerate(rows):
                values = z if len(chosen) == len(z) else z[chosen]
                if len(values):
                    count(magnitudes[layer, group], values, binning)
                    reference_code.count(signed[layer, group], values)

        bar = tqdm(
            total=getattr(batches, "info", {}).get("tokens"), unit="tok", disable=None if progress else True
        )
        with bar, torch.no_grad(), Observation(decoder, see) as observation:
            for batch in batches:
                mask = batch["attention_mask"]
                labels = label(mask) if label else torch.where(mask.bool(), 0, -1)
                observation.valid = labels >= 0
                flat = labels[labels >= 0]
                rows[:] = [(flat == group).nonzero()[:, 0].to(device) for group in range(len(groups))]
                tokens += torch.tensor([len(chosen) for chosen in rows])
                decoder(
                    input_ids=batch["input_ids"].to(device), attention_mask=mask.to(device), use_cache=False
                )
                bar.update(int(mask.sum()))
    if int(tokens.sum()) == 0:
        raise CatsError("No token was counted: give text, or a label that keeps some of it.")
    return Distribution(tuple(groups), magnitudes.cpu(), signed.cpu(), tokens, binning)


def first_token(mask: Tensor) -> Tensor:
    """A `label`: 0 for the first token of each row, 1 for the others, -1 for padding."""
    labels = torch.where(mask.bool(), 1, -1)
    labels[:, 0] = torch.where(mask[:, 0].bool(), 0, -1)
    return labels


def padding(mask: Tensor) -> Tensor:
    """A `label`: 0 for tokens of text, 1 for padding."""
    return 1 - mask.long()


class Draws:
    """A `label` that deals rows into disjoint random draws: `sizes` rows each, `repeats` of every size.

    `groups` names them, "10 rows, draw 1" and so on; "others" are the rest of the first `rows` rows, later
    ones do not count. All groups together are the first `rows` rows. Raises CatsError where the draws need
    more rows.
    """

    def __init__(self, rows: int, sizes: Sequence[int], repeats: int, seed: int):
        needed = repeats * sum(sizes)
        if needed > rows:
            raise CatsError(
                f"{repeats} draws of {', '.join(map(str, sizes))} rows need {needed} rows, not {rows}."
            )
        self._draws = [(size, draw) for size in sizes for draw in range(1, repeats + 1)]
        self.groups = (*(self.name(size, draw) for size, draw in self._draws), "others")
        dealt = torch.tensor([number for number, (size, _) in enumerate(self._draws) for _ in range(size)])
        dealt = torch.cat([dealt, torch.full((rows - needed,), len(self._draws))])
        self._of_row = dealt[torch.randperm(rows, generator=torch.Generator().manual_seed(seed))]
        self._seen = 0

    @staticmethod
    def name(size: int, draw: int) -> str:
        return f"{size} rows, draw {draw}"

    def __call__(self, mask: Tensor) -> Tensor:
        of_row = self._of_row[self._seen : self._seen + len(mask)]
        self._seen += len(mask)
        of_row = torch.cat([of_row, torch.full((len(mask) - len(of_row),), -1)])
        return torch.where(mask.bool(), of_row[:, None], -1)

    def errors(self, drawn: Distribution, other: Distribution, sparsities: Sequence[float]) -> pd.DataFrame:
        """Share of |z| of `other` below each draw's thresholds, minus the target, by sparsity and layer.

        Columns sparsity, rows, draw, layer, error (a fraction). All rows together count as one more draw.
        """
        cases = [(size, draw, (self.name(size, draw),)) for size, draw in self._draws]
        cases.append((len(self._of_row), 1, ()))
        return pd.DataFrame(
            [
                {"sparsity": s, "rows": size, "draw": draw, "layer": layer, "error": float(share) - s}
                for s in sparsities
                for size, draw, groups in cases
                for layer, share in enumerate(other.share_below(drawn.thresholds(s, *groups)))
            ]
        )


def box(
    distribution: Distribution, model: str, first: str, sparsities: tuple[float, float] = (0.5, 0.9)
) -> Box:
    """The chapter in a box: the shares of Σz² that two sparsities drop, mean of the layers and their range.

    `first`: the group of first tokens.
    """
    parts = []
    for sparsity in sparsities:
        energy = distribution.energy_below(distribution.thresholds(sparsity))
        parts.append(f"{energy.mean():.0%} ({energy.min():.0%} to {energy.max():.0%}) at {sparsity:.0%}")
    negative = distribution.negative_share().mean()
    special = distribution.share_below(distribution.thresholds(0.5), first).mean()
    return Box(
        "Are most gate activations small, as the paper's Figure 1 shows?",
        f"In {model}, dropping the smallest activations removes this share of Σz², mean of the layers and "
        f"their range: {listed(parts)}. {negative:.0%} of all activations are negative, "
        f"and the threshold for 50% drops {special:.0%} of the first token's.",
        "fig-selected-layers",
        "Measured live on this page, on one small model. The sum of squares is no loss: the chapter on "
        "perplexity measures what dropping costs.",
        "cats reproduce 01 --profile llama-2-7b",
    )


def exchange(texts: Mapping[str, Distribution], sparsity: float) -> pd.DataFrame:
    """Thresholds of each text applied to each: "mean (lowest to highest layer)" of the share below them."""
    rows = []
    for source, calibrated in texts.items():
        row = {"thresholds from": source}
        for target, measured in texts.items():
            share = measured.share_below(calibrated.thresholds(sparsity))
            row[f"on {target}"] = f"{share.mean():.1%} ({share.min():.1%} to {share.max():.1%})"
        rows.append(row)
    return pd.DataFrame(rows)
