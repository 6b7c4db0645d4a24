"""The activation and the sparse MLP: what is kept, what flows back, in which dtype."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from toys import constant_thresholds, tokens, toy

from cats import CatsError, cats_mlps, restore, sparsify
from cats.core.activation import ACTIVATIONS, activation_name, cats, unrounded

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


@pytest.mark.parametrize("dtype", DTYPES)
def test_ties_are_kept_and_smaller_magnitudes_dropped(dtype):
    z = torch.tensor([-0.5, -0.25, 0.25, 0.5, 0.75, 0.0], dtype=dtype)
    assert cats(z, 0.5).tolist() == [-0.5, 0, 0, 0.5, 0.75, 0]
    assert cats(z, 0.5).dtype == dtype


def test_threshold_is_not_rounded_to_the_dtype_of_z():
    z = torch.tensor([0.5, 0.50390625], dtype=torch.bfloat16)  # neighbours in bf16
    between = 0.501
    assert cats(z, between).tolist() == [0, 0.50390625]
    assert cats(z, torch.tensor(between)).tolist() == [0, 0.50390625]
    assert cats(z, torch.tensor([between, between])).tolist() == [0, 0.50390625]


def test_zero_threshold_and_nan():
    z = torch.tensor([-0.0, 1e-30, float("nan"), float("inf")])
    kept = cats(z, 0.0)
    assert torch.equal(kept[:2], z[:2]) and kept[2].isnan() and kept[3] == float("inf")
    assert cats(z, 1e9).isnan().tolist() == [False, False, True, False]


def test_threshold_per_neuron():
    z = torch.tensor([[0.1, 0.2, 0.3], [0.3, 0.2, 0.1]])
    expected = torch.tensor([[0, 0.2, 0.3], [0.3, 0.2, 0]])
    assert torch.equal(cats(z, torch.tensor([0.2, 0.2, 0.2])), expected)
    assert torch.equal(cats(z, torch.tensor([0.0, 0.3, 0.0])), torch.tensor([[0.1, 0, 0.3], [0.3, 0, 0.1]]))


def test_gradient_is_that_of_a_constant_mask():
    z = torch.tensor([-0.4, -0.1, 0.1, 0.4], requires_grad=True)
    t = torch.tensor(0.2, requires_grad=True)
    (cats(z, t) * torch.tensor([1.0, 2.0, 3.0, 4.0])).sum().backward()
    assert z.grad.tolist() == [1, 0, 0, 4]
    assert t.grad is None


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_are_known_by_name_and_by_value(name):
    assert activation_name(name) == name
    assert activation_name(ACTIVATIONS[name]) == name


@pytest.mark.parametrize(
    ("act", "name"),
    [
        ("swish", "silu"),
        ("gelu_pytorch_tanh", "gelu_tanh"),
        ("gelu_new", "gelu_tanh"),
        (nn.SiLU(), "silu"),
        (nn.GELU(), "gelu"),
        (nn.GELU(approximate="tanh"), "gelu_tanh"),
        (nn.ReLU(inplace=True), "relu"),
        (lambda z: z * torch.sigmoid(z), "silu"),
    ],
)
def test_spellings_of_an_activation(act, name):
    assert activation_name(act) == name


@pytest.mark.parametrize("act", ["relu2", "tanh", nn.Tanh(), nn.LeakyReLU(), nn.PReLU(), nn.Softmax(dim=-1)])
def test_other_activations_are_refused(act):
    with pytest.raises(CatsError, match="not supported: CATS here knows silu"):
        activation_name(act)


def test_sixteen_bits_are_compared_before_rounding():
    gate = torch.tensor([-1.25, -1.28125, -1.3125], dtype=torch.bfloat16)
    z = F.silu(gate)
    assert len(set(z.tolist())) == 1, "one bf16 number at the minimum of SiLU"
    exact = unrounded(F.silu, gate, z)
    assert exact.dtype == torch.float32 and len(set(exact.tolist())) == 3
    middle = exact.abs().sort().values[1]
    assert cats(z, middle, exact).ne(0).sum() == 2
    full = torch.randn(4)
    assert torch.equal(unrounded(F.silu, full, F.silu(full)), F.silu(full))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("act", ["silu", "gelu", "gelu_pytorch_tanh", "relu"])
def test_module_equals_its_equation(act, dtype):
    model = toy(hidden_act=act, dtype=dtype)
    sparsify(model, constant_thresholds(model), 0.3)
    module = cats_mlps(model)[1]
    x = torch.randn(2, 5, 32, dtype=dtype)
    gate, up = x @ module.w_gate.t(), x @ module.w_up.t()
    act = ACTIVATIONS[module.activation]
    z = act(gate)
    z = torch.where(act(gate.float() if dtype != torch.float64 else gate).abs() < 0.3, torch.zeros_like(z), z)
    expected = (z * up) @ module.w_down_t
    with torch.no_grad():
        y = module(x)
    assert y.dtype == dtype
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5}.get(dtype, 2e-2)
    torch.testing.assert_close(y, expected, rtol=tolerance, atol=tolerance)


def test_gradients_through_the_module():
    model = toy()
    sparsify(model, constant_thresholds(model), 0.3)
    module = cats_mlps(model)[0]
    x = torch.randn(1, 1, 32)
    masked = ACTIVATIONS["silu"](x @ module.w_gate.t()).abs().flatten() < 0.3
    assert 0 < masked.sum() < 80
    module(x).sum().backward()
    assert module.gate_proj.weight.grad[masked].abs().max() == 0
    assert module.up_proj.weight.grad[masked].abs().max() == 0
    assert module.down_proj.weight.grad[:, masked].abs().max() == 0
    for weight in (
        module.gate_proj.weight.grad,
        module.up_proj.weight.grad,
        module.down_proj.weight.grad.t(),
    ):
        assert (weight[~masked].abs().amax(1) > 0).all()
    assert module.threshold.grad is None and not module.threshold.requires_grad


def test_dense_prefill_leaves_prompts_alone():
    model = toy()
    dense = model(tokens())
    sparsify(model, constant_thresholds(model), 0.3, prefill="dense")
    read = model(tokens())
    assert torch.equal(read.logits, dense.logits)
    step = tokens(length=1)
    found = model(step, past_key_values=read.past_key_values).logits
    assert not torch.equal(found, toy()(step, past_key_values=dense.past_key_values).logits)


def test_threshold_stays_fp32_when_the_model_is_cast():
    model = toy()
    sparsify(model, constant_thresholds(model), 1 / 3)
    before = [module.threshold.clone() for module in cats_mlps(model)]
    model.to(torch.bfloat16).half().to("cpu")
    for module, t in zip(cats_mlps(model), before, strict=True):
        assert module.threshold.dtype == torch.float32 and torch.equal(module.threshold, t)
        assert module.gate_proj.weight.dtype == torch.float16


@pytest.mark.parametrize("prefill", ["masked", "dense"])
def test_one_token_without_a_batch(prefill):
    model = toy()
    sparsify(model, constant_thresholds(model), 0.3, prefill=prefill)
    module, x = cats_mlps(model)[0], torch.randn(32)
    torch.testing.assert_close(module(x), module(x[None])[0])


def test_a_hook_on_the_activation_is_called_for_few_tokens_too():
    model = toy()
    sparsify(model, constant_thresholds(model), 0.3)
    module, x, called = cats_mlps(model)[0], torch.randn(1, 1, 32), []
    with torch.no_grad():
        assert module.reads_survivors_only(x)
        module.act_fn.register_forward_hook(lambda *_: called.append(1))
        module(x)
    assert called


def test_an_activation_under_a_name_of_the_module_itself():
    model = toy()
    expected = sparsify(toy(), constant_thresholds(model), 0.3)(tokens()).logits

    class Renamed(nn.Module):
        def __init__(self, mlp):
            super().__init__()
            self.gate_proj, self.up_proj, self.down_proj = mlp.gate_proj, mlp.up_proj, mlp.down_proj
            self.activation = nn.SiLU()

        def forward(self, x):
            return self.down_proj(self.activation(self.gate_proj(x)) * self.up_proj(x))

    for layer in model.model.layers:
        layer.mlp = Renamed(layer.mlp)
    dense = model(tokens()).logits
    sparsify(model, constant_thresholds(model), 0.3)
    assert torch.equal(model(tokens()).logits, expected)
    assert torch.equal(restore(model)(tokens()).logits, dense)
