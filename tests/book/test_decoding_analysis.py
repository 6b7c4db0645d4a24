"""Where the time of a token goes: told by the place of a kernel in its step."""

import pandas as pd
import pytest

from cats.book.analysis import decoding_step as steps
from cats.errors import CatsError
from cats.records import record as records


def a_step(layers: int = 2, sparse: bool = False) -> pd.DataFrame:
    mlp = (
        [("gate_up_down", 60.0), ("sum_partials", 2.0)] if sparse else [("gate_and_up", 58.0), ("down", 30.0)]
    )
    kernels = [("embedding", 1.0), ("qkv", 20.0)]
    for layer in range(layers):
        kernels += [
            ("rotary", 1.0),
            ("_decode_attention", 6.0),
            ("o_proj", 10.0),
            ("norm", 2.0),
            *mlp,
            ("norm", 2.0),
        ]
        kernels += [("qkv", 20.0)] if layer < layers - 1 else [("head", 90.0), ("fused_argmax", 7.0)]
    return pd.DataFrame(kernels, columns=["kernel", "us"]).assign(gap_us=0.5, order=range(len(kernels)))


@pytest.mark.parametrize("sparse", (False, True))
def test_every_kernel_is_counted_once_in_its_part(sparse):
    found = steps.parts(a_step(sparse=sparse).sample(frac=1, random_state=0))
    expected = {
        "gated MLPs": 124.0 if sparse else 176.0,
        "projections of attention": 2 * 20.0 + 2 * 10.0,
        "attention": 12.0,
        "output head": 97.0,
        "norms and the rest": 1.0 + 2 * (1.0 + 2.0 + 2.0),
        "idle": 0.5 * len(a_step(sparse=sparse)),
    }
    assert found.to_dict() == expected


def test_a_step_that_cannot_be_told_apart():
    step = a_step()
    with pytest.raises(CatsError, match="no kernel of this book's attention"):
        steps.parts(step[step.kernel != "_decode_attention"])
    with pytest.raises(CatsError, match="fewer than three long products"):
        steps.parts(step[~step.kernel.isin(("gate_and_up", "down"))])


def test_the_recorded_step():
    rows = records.read("decode_step").rows
    for _, found in rows.groupby("sparsity"):
        parts = steps.parts(found)
        assert parts.sum() == pytest.approx(found.us.sum() + found.gap_us.sum())
        assert parts.idxmax() == "gated MLPs" and (parts > 0).all()
