"""How many neurons do several tokens need together: python kernels/bench/overlap.py --sparsity 0.5.

Union density is the share of neurons that at least one of B masks keeps: for consecutive tokens of a text,
and for tokens of different stretches of text, layer by layer. Needs no GPU. Writes a record overlap.
"""

import argparse
import time
from collections import defaultdict

import torch
import workload
from cats_kernels import crossover, reference
from real import RealModel
from tqdm import tqdm

from cats import corpora, models, observation
from cats.errors import CatsError
from cats.sparsify import sparsify


def main() -> None:
    options = parse()
    started = time.time()
    net = RealModel(
        options.model, dtype=options.dtype, device="cuda" if torch.cuda.is_available() else "cpu",
        corpus=options.corpus, tokens=options.tokens, length=options.length,
    )  # fmt: skip
    stretches = net.batches(net.held_out, options.length * options.stretches)
    rows = [row for sparsity in options.sparsity for row in unions(net, sparsity, stretches, options)]
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


@torch.no_grad()
def unions(net: RealModel, sparsity: float, stretches, options) -> list[dict]:
    """Rows of the record for one sparsity: every layer, kind and number of rows."""
    sparsify(net.net, net.thresholds, sparsity)
    consecutive = defaultdict(list)
    last = defaultdict(list)
    realised = defaultdict(list)

    def see(layer, module, z, _):
        keep = reference.survivors(z.float(), module.threshold)
        realised[layer].append(1 - keep.float().mean().item())
        last[layer].append(keep[-1])
        for count in options.rows:
            consecutive[layer, count].append(keep[-count:].any(dim=0).float().mean().item())

    with observation.Observation(net.net, see):
        for batch in tqdm(stretches, desc=f"s={sparsity}", disable=None, leave=False):
            net.net(input_ids=batch["input_ids"].to(net.net.device), use_cache=False, logits_to_keep=1)
    rows = []
    for layer, values in realised.items():
        dropped = sum(values) / len(values)
        tokens = torch.stack(last[layer])
        for count in options.rows:
            groups = tokens[: len(tokens) // count * count].unflatten(0, (-1, count))
            found = {
                "consecutive": sum(consecutive[layer, count]) / len(stretches),
                "different": groups.any(dim=1).float().mean().item(),
            }
            rows += [
                {
                    "model": net.model["id"], "layer": layer, "sparsity": sparsity, "rows": count,
                    "kind": kind, "union_density": union,
                    "independent_density": crossover.union_density(count, dropped),
                    "realised_sparsity": dropped,
                    "groups": len(stretches) if kind == "consecutive" else len(groups),
                }
                for kind, union in found.items()
            ]  # fmt: skip
    return rows


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
