"""What a row drops adds nothing to it, whatever its weights hold: of the reference and of dense products."""

import math

import pytest
import torch
from cats_kernels import cpu, reference

PATHS = {"reference": reference.cats_mlp, "dense products": cpu.masked_dense}


def case(rows, dtype):
    generator = torch.Generator().manual_seed(rows)
    x = torch.randn(rows, 24, generator=generator)
    weights = [torch.randn(40, 24, generator=generator) / math.sqrt(24) for _ in range(3)]
    return x.to(dtype), *(weight.to(dtype) for weight in weights), torch.zeros(())


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16, torch.float32))
@pytest.mark.parametrize("value", (math.nan, math.inf))
def test_all_dropped_is_zero(path, dtype, value):
    x, w_gate, w_up, w_down, t = case(1, dtype)
    w_up[3] = value
    w_down[5] = value
    y = PATHS[path](x, w_gate, w_up, w_down, torch.full_like(t, 1e30), "silu", None, None)
    assert torch.equal(y, torch.zeros_like(x))


@pytest.mark.parametrize("path", PATHS)
def test_a_row_that_drops_a_neuron_does_not_see_its_weights(path):
    x, w_gate, w_up, w_down, t = case(3, torch.float16)
    mask = torch.ones(3, 40, dtype=torch.bool)
    mask[1, 7] = mask[1, 11] = False
    expected = PATHS[path](x, w_gate, w_up, w_down, t, "silu", mask, torch.float32)
    w_up[11], w_down[7] = math.nan, math.nan
    y = PATHS[path](x, w_gate, w_up, w_down, t, "silu", mask, torch.float32)
    torch.testing.assert_close(y[1], expected[1], rtol=2e-3, atol=2e-3)
    assert y[0].isnan().all() and y[2].isnan().all(), "rows that keep it do"
