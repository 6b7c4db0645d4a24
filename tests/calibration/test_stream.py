"""Reading batches: their form, their masks, and the model's mode afterwards."""

import pytest
import torch
from toys import batches, toy

from cats.calibration.stream import evaluating, read, watch
from cats.errors import CatsError


def test_batches_come_with_a_mask_and_nothing_else_is_taken():
    ids = torch.tensor([[3, 4, 5]])
    ((read_ids, mask),) = read([{"input_ids": ids}], torch.device("cpu"), progress=False)
    assert torch.equal(read_ids, ids) and torch.equal(mask, torch.ones_like(ids))
    with pytest.raises(CatsError, match="A batch must be"):
        list(read([ids], torch.device("cpu"), progress=False))
    with pytest.raises(CatsError, match="no token"):
        list(read([], torch.device("cpu"), progress=False))


def test_each_module_has_its_mode_again():
    model = toy().train()
    model.model.layers[1].eval()
    modes = [module.training for module in model.modules()]
    with pytest.raises(RuntimeError), evaluating(model):
        assert not any(module.training for module in model.modules())
        raise RuntimeError
    assert [module.training for module in model.modules()] == modes


def test_watching_leaves_padding_out():
    model, seen = toy(), []
    gate = model.model.layers[1].mlp.gate_proj
    tokens = watch(model, [("gate", gate)], batches(2), lambda key, x: seen.append(len(x)), progress=False)
    assert seen == [88, 88] and tokens == 176
