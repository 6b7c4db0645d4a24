"""How many neurons several tokens need together: the union of their masks, layer by layer (batches > 1)."""

from collections import defaultdict
from collections.abc import Iterable, Sequence

import torch
from cats_kernels import crossover
from torch import nn
from tqdm.auto import tqdm

from cats.calibration.observe import Observation
from cats.core.sparsify import sparsify
from cats.core.thresholds import Thresholds
from cats.errors import CatsError


@torch.no_grad()
def unions(
    model: nn.Module, thresholds: Thresholds, sparsity: float, stretches: Iterable[dict], rows: Sequence[int]
) -> list[dict]:
    """Union density, the share of neurons that at least one of B masks keeps, for every B of `rows`.

    `stretches`: batches whose input_ids [N, T] are N stretches of text of one length, without padding. The
    B masks are of the last B tokens of one stretch (kind "consecutive"), averaged over the stretches, or of
    the last tokens of B stretches ("different"), averaged over disjoint groups. Returns the columns of the
    experiment `overlap`; independent_density is 1 - s^B with the sparsity s that the layer realised. The
    model is sparsified afterwards. Raises CatsError where there are fewer stretches or tokens than rows.
    """
    sparsify(model, thresholds, sparsity)
    consecutive, last, realised = defaultdict(list), defaultdict(list), defaultdict(list)
    count = 0

    def see(layer, module, z, _):
        keep = (~(z.float().abs() < module.threshold)).unflatten(0, (count, -1))  # NaN is kept
        realised[layer].append(1 - keep.float().mean(dim=(1, 2)))
        last[layer].append(keep[:, -1])
        for wanted in rows:
            consecutive[layer, wanted].append(keep[:, -wanted:].any(dim=1).float().mean(dim=1))

    with Observation(model, see):
        for batch in tqdm(stretches, desc=f"masks at {sparsity:.0%}", disable=None, leave=False):
            ids = batch["input_ids"].to(model.device)
            count = len(ids)
            if ids.shape[1] < max(rows):
                raise CatsError(f"{max(rows)} rows need stretches of as many tokens, not {ids.shape[1]}.")
            model(input_ids=ids, use_cache=False, logits_to_keep=1)
    table = []
    for layer, found in realised.items():
        dropped = torch.cat(found).mean().item()
        tokens = torch.cat(last[layer])
        if len(tokens) < max(rows):
            raise CatsError(f"{max(rows)} rows need as many stretches of text, not {len(tokens)}.")
        for wanted in rows:
            groups = tokens[: len(tokens) // wanted * wanted].unflatten(0, (-1, wanted)).any(dim=1)
            densities = {
                "consecutive": torch.cat(consecutive[layer, wanted]),
                "different": groups.float().mean(dim=1),
            }
            table += [
                {
                    "layer": layer, "sparsity": sparsity, "rows": wanted, "kind": kind,
                    "union_density": density.mean().item(), "realised_sparsity": dropped,
                    "independent_density": crossover.union_density(wanted, dropped), "groups": len(density),
                }
                for kind, density in densities.items()
            ]  # fmt: skip
    return table
