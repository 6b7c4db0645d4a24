"""How many neurons several tokens need together: `cats measure overlap`.

Union density is the share of neurons that at least one of B masks keeps: for consecutive tokens of a text,
and for tokens of different sequences, layer by layer. Needs no GPU. Writes a record overlap.
"""

import time
from argparse import Namespace
from collections import defaultdict
from collections.abc import Iterable, Sequence

import torch
from cats_kernels import crossover
from torch import nn
from tqdm.auto import tqdm

from cats.benchmarking import workload
from cats.benchmarking.real import RealModel
from cats.calibration.observe import Observation
from cats.core.sparsify import sparsify
from cats.core.thresholds import Thresholds
from cats.errors import CatsError


def measure(options: Namespace) -> None:
    """Print union densities, means over layers, and write one record."""
    if max(options.batch_sizes) > min(options.length, options.sequences):
        raise CatsError(
            f"{max(options.batch_sizes)} masks need as many --sequences, and a --length of as many tokens."
        )
    started = time.time()
    net = RealModel(
        options.model, dtype=options.dtype, device="cuda" if torch.cuda.is_available() else "cpu",
        corpus=options.corpus, tokens=options.tokens, length=options.length,
    )  # fmt: skip
    sequences = net.batches(net.held_out, options.length * options.sequences)
    rows = [
        {"model": net.model["id"], **row}
        for sparsity in options.sparsity
        for row in unions(net.net, net.thresholds, sparsity, sequences, options.batch_sizes)
    ]
    for sparsity in options.sparsity:
        print(f"{options.model}, s={sparsity}: union density, mean over layers (independent masks)")
        for kind in ("consecutive", "different"):
            shown = []
            for count in options.batch_sizes:
                here = [r for r in rows if (r["sparsity"], r["kind"], r["rows"]) == (sparsity, kind, count)]
                union = sum(r["union_density"] for r in here) / len(here)
                independent = sum(r["independent_density"] for r in here) / len(here)
                shown.append(f"{count}: {union:.3f} ({independent:.3f})")
            print(f"  {kind:<12} {'  '.join(shown)}")
    workload.record("overlap", options, rows, net.model, net.data, started, suffix=options.model)


@torch.no_grad()
def unions(
    model: nn.Module, thresholds: Thresholds, sparsity: float, sequences: Iterable[dict], sizes: Sequence[int]
) -> list[dict]:
    """Union density, the share of neurons that at least one of B masks keeps, for every B of `sizes`.

    `sequences`: batches whose input_ids [N, T] are N sequences of one length, without padding. The B masks
    are of the last B tokens of one sequence (kind "consecutive"), averaged over the sequences, or of the last
    tokens of B sequences ("different"), averaged over disjoint groups. Returns the columns of the experiment
    `overlap`, whose column `rows` is B; independent_density is 1 - s^B with the sparsity s that the layer
    realised. The model is sparsified afterwards. Raises CatsError where there are fewer sequences or tokens
    than masks.
    """
    sparsify(model, thresholds, sparsity)
    consecutive, last, realised = defaultdict(list), defaultdict(list), defaultdict(list)
    count = 0

    def see(layer, module, z, _):
        keep = (~(z.float().abs() < module.threshold)).unflatten(0, (count, -1))  # NaN is kept
        realised[layer].append(1 - keep.float().mean(dim=(1, 2)))
        last[layer].append(keep[:, -1])
        for size in sizes:
            consecutive[layer, size].append(keep[:, -size:].any(dim=1).float().mean(dim=1))

    with Observation(model, see):
        for batch in tqdm(sequences, desc=f"masks at {sparsity:.0%}", disable=None, leave=False):
            ids = batch["input_ids"].to(model.device)
            count = len(ids)
            if ids.shape[1] < max(sizes):
                raise CatsError(f"{max(sizes)} masks need sequences of as many tokens, not {ids.shape[1]}.")
            model(input_ids=ids, use_cache=False, logits_to_keep=1)
    table = []
    for layer, found in realised.items():
        dropped = torch.cat(found).mean().item()
        tokens = torch.cat(last[layer])
        if len(tokens) < max(sizes):
            raise CatsError(f"{max(sizes)} masks need as many sequences, not {len(tokens)}.")
        for size in sizes:
            groups = tokens[: len(tokens) // size * size].unflatten(0, (-1, size)).any(dim=1)
            densities = {
                "consecutive": torch.cat(consecutive[layer, size]),
                "different": groups.float().mean(dim=1),
            }
            table += [
                {
                    "layer": layer, "sparsity": sparsity, "rows": size, "kind": kind,
                    "union_density": density.mean().item(), "realised_sparsity": dropped,
                    "independent_density": crossover.union_density(size, dropped), "groups": len(density),
                }
                for kind, density in densities.items()
            ]  # fmt: skip
    return table
