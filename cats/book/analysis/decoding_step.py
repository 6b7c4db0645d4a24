"""Where the time of a decoded token goes: the kernels of a step, as recorded, by what they are for."""

import pandas as pd

from cats.errors import CatsError

PARTS = ("gated MLPs", "projections of attention", "attention", "output head", "norms and the rest", "idle")
OURS = {"gate_up_down": "gated MLPs", "sum_partials": "gated MLPs", "_decode_attention": "attention"}
LONG_US = 5.0  # a product of matrix and vector takes longer than this, a norm or a rotation less


def parts(rows: pd.DataFrame) -> pd.Series:
    """µs of one step by part, in the order of PARTS, from the rows of one sparsity of a record decode_step.

    Compiled kernels have names of what was fused into them, so they are told by their place: after a layer's
    attention comes the projection of its output, then the MLP's products, then the next layer's q, k and v,
    and behind the last layer the output head with its argmax. Raises CatsError where a layer has no such
    products.
    """
    ordered = rows.sort_values("order")
    labels = [_label(name) for name in ordered.kernel]
    attention = [place for place, label in enumerate(labels) if label == "attention"]
    if not attention:
        raise CatsError("This step has no kernel of this book's attention: its parts cannot be told apart.")
    known = {"attention", "output head"}
    long = [p for p, us in enumerate(ordered.us) if us >= LONG_US and labels[p] not in known]
    ends = [*attention[1:], len(labels)]
    before = [place for place in long if place < attention[0]]
    found = [before, *([p for p in long if a < p < b] for a, b in zip(attention, ends, strict=True))]
    if not before or any(len(products) < 3 for products in found[1:]):
        raise CatsError(
            "A layer of this step has fewer than three long products: its parts cannot be told apart."
        )
    labels[before[-1]] = "projections of attention"
    last = len(found) - 1
    for layer, (first, *middle, end) in enumerate(found[1:], start=1):
        labels[first] = "projections of attention"
        for place in middle:
            labels[place] = "gated MLPs"
        labels[end] = "output head" if layer == last else "projections of attention"
    times = ordered.us.groupby(pd.Series(labels, index=ordered.index)).sum()
    times["idle"] = ordered.gap_us.sum()
    return times.reindex(PARTS, fill_value=0.0)


def by_part(rows: pd.DataFrame) -> pd.DataFrame:
    """µs by part (columns) of the dense step and of the sparse one, named "dense" and "CATS 50%"."""
    steps = {"dense" if s == 0 else f"CATS {s:.0%}": parts(found) for s, found in rows.groupby("sparsity")}
    return pd.DataFrame(steps).T


def numbers(rows: pd.DataFrame, mlp_rows: pd.DataFrame) -> dict:
    """What the page says of a step, by the names under which it is glued.

    `rows` of the record decode_step, `mlp_rows` of the record mlp_latency of the model's MLP. The limit
    is the dense step with each MLP as fast as its bytes at the read bandwidth.
    """
    times = by_part(rows)
    mlps, rest = times["gated MLPs"], times.drop(columns="gated MLPs").sum(axis=1)
    own = mlp_rows[(mlp_rows.variant == "cats") & (mlp_rows.launch == "graph")]
    own = own[own.sparsity == rows.sparsity.max()].iloc[0]
    layers = int((rows.kernel == "gate_up_down").sum())
    dense, sparse = times.sum(axis=1)
    return {
        "decoding_step_dense": mlps.iloc[0],
        "decoding_step_sparse": mlps.iloc[1],
        "decoding_step_rest_dense": rest.iloc[0],
        "decoding_step_rest_sparse": rest.iloc[1],
        "decoding_step_share": rest.iloc[1] / sparse,
        "decoding_step_ratio": mlps.iloc[0] / mlps.iloc[1],
        "decoding_step_limit": dense / (rest.iloc[0] + layers * own.bound_us),
        "decoding_step_now": dense / sparse,
    }


def _label(kernel: str) -> str:
    return "output head" if "argmax" in kernel else OURS.get(kernel, "norms and the rest")
