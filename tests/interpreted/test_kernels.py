"""What the Triton kernels of the gated MLP must do, of CATS and of the centred rule."""

import math

import cats_kernels
import pytest
import torch
import triton
from cats_kernels import batch, centred, few, reference, tuning
from cats_kernels import decode as one_row

DEVICE = "cpu" if triton.knobs.runtime.interpret else "cuda"
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 1e-5, torch.float16: 1e-5}  # of a float32 result
NEVER = 1e30
BATCHES = (1, 2, 4, 7, 16)


def case(m, d, rows=1, dtype=torch.bfloat16, seed=0):
    """x [rows, d] and the three weights [m, d]."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, d, generator=generator)
    weights = [torch.randn(m, d, generator=generator) / math.sqrt(d) for _ in range(3)]
    return [tensor.to(DEVICE, dtype) for tensor in (x, *weights)]


def gate(x, w_gate, activation="silu"):
    return reference.ACTIVATIONS[activation](x.double() @ w_gate.double().t())


def threshold(z, sparsity):
    """A threshold between two magnitudes, so that rounding cannot change the mask."""
    ordered = z.abs().flatten().sort().values
    rank = round(sparsity * len(ordered))
    if rank == 0:
        return torch.zeros((), device=DEVICE)
    if rank == len(ordered):
        return torch.tensor(NEVER, device=DEVICE)
    near = ordered[max(0, rank - 8) : rank + 8]
    place = int(near.diff().argmax())
    return near[place : place + 2].mean().float()


def agrees(arguments, activation="silu", mask=None, dtype=None, tolerance=None):
    """The op's float32 result against float64 arithmetic on the same tensors; returns it."""
    y = cats_kernels.cats_mlp(*arguments, activation, mask, out_dtype=torch.float32)
    expected = reference.cats_mlp(
        *arguments, activation, mask, out_dtype=torch.float64, accumulate=torch.float64
    )
    assert y.shape == expected.shape and y.dtype == torch.float32
    error = (y.double() - expected).norm() / expected.norm().clamp_min(1e-30)
    assert error <= (tolerance or TOLERANCE[arguments[0].dtype]), f"relative error {error:.1e}"
    return y


@pytest.mark.parametrize("rows", BATCHES)
@pytest.mark.parametrize(("m", "d"), [(1, 1), (63, 129), (64, 64), (40, 5120), (150, 576)])
def test_equals_the_reference_on_odd_and_even_shapes(m, d, rows):
    x, *weights = case(m, d, rows)
    agrees((x, *weights, threshold(gate(x, weights[0]), 0.5)))


@pytest.mark.parametrize(("m", "d", "rows"), [(1000, 2730, 1), (1000, 2730, 4), (13824, 16, 4)])
def test_equals_the_reference_on_large_shapes(m, d, rows):
    x, *weights = case(m, d, rows)
    agrees((x, *weights, threshold(gate(x, weights[0]), 0.9)))


@pytest.mark.parametrize("rows", (1, 5))
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("activation", sorted(reference.ACTIVATIONS))
def test_every_activation_and_dtype(activation, dtype, rows):
    x, *weights = case(50, 96, rows, dtype)
    agrees((x, *weights, threshold(gate(x, weights[0], activation), 0.6)), activation)


@pytest.mark.parametrize("rows", (1, 2, 16))
@pytest.mark.parametrize("sparsity", (0.0, 0.3, 0.9, 1.0))
def test_every_sparsity(sparsity, rows):
    x, *weights = case(77, 80, rows, seed=3)
    y = agrees((x, *weights, threshold(gate(x, weights[0]), sparsity)))
    if sparsity == 1:
        assert not y.any()


@pytest.mark.parametrize("rows", (1, 3))
@pytest.mark.parametrize("kind", ("clustered", "one", "last", "none", "all", "random"))
def test_given_masks(kind, rows):
    x, *weights = case(200, 72, rows, seed=1)
    mask = torch.zeros(rows, 200, dtype=torch.bool, device=DEVICE)
    if kind == "clustered":
        mask[:, 90:130] = True
    elif kind == "one":
        mask[rows - 1, 17] = True
    elif kind == "last":
        mask[:, -1] = True
    elif kind == "all":
        mask[:] = True
    elif kind == "random":
        mask = torch.rand(rows, 200, generator=torch.Generator().manual_seed(0)).to(DEVICE) < 0.3
    agrees((x, *weights, torch.zeros((), device=DEVICE)), mask=mask)
    agrees((x, *weights, torch.zeros((), device=DEVICE)), mask=mask[0])


@pytest.mark.parametrize("rows", (1, 4))
def test_a_threshold_for_each_neuron(rows):
    x, *weights = case(90, 64, rows, seed=2)
    z = gate(x, weights[0])
    each = torch.stack([threshold(column, 0.5) for column in z.t()]) if rows > 1 else z[0].abs() * 0.9
    each = each.float()
    each[::7] = NEVER
    each[1::7] = 0
    agrees((x, *weights, each))


@pytest.mark.parametrize("rows", (1, 2))
def test_a_tie_is_kept_and_the_next_smaller_number_is_not(rows):
    t = torch.tensor(0.75, device=DEVICE)
    below = torch.nextafter(t, torch.zeros_like(t))
    above = torch.nextafter(t, torch.ones_like(t))
    w_gate = torch.stack([t, -t, below, above])[:, None]
    w_up = torch.ones(4, 1, device=DEVICE)
    w_down = torch.tensor([[1.0], [16.0], [256.0], [4096.0]], device=DEVICE)
    x = torch.ones(rows, 1, device=DEVICE)
    y = cats_kernels.cats_mlp(x, w_gate, w_up, w_down, t, "relu")
    assert torch.equal(y, torch.full_like(y, float(t + 4096 * above)))


@pytest.mark.parametrize("rows", (1, 2, 16))
def test_unwritten_memory_is_never_used(rows, monkeypatch):
    """Work space comes from torch.empty: garbage in it must not show, nor be followed as an index."""
    empty = torch.empty

    def poisoned(*size, **options):
        tensor = empty(*size, **options)
        return tensor.fill_(math.nan if tensor.is_floating_point() else tensor.new_tensor(77).item())

    x, *weights = case(45, 70, rows)
    t = threshold(gate(x, weights[0]), 0.7)
    expected = agrees((x, *weights, t))
    monkeypatch.setattr(torch, "empty", poisoned)
    y = cats_kernels.cats_mlp(x, *weights, t, out_dtype=torch.float32)
    assert torch.equal(y, expected)


@pytest.mark.parametrize("rows", (1, 2, 16))
def test_dropped_rows_of_the_weights_are_not_read(rows):
    x, w_gate, w_up, w_down = case(60, 50, rows)
    mask = torch.rand(rows, 60, generator=torch.Generator().manual_seed(5)).to(DEVICE) < 0.1
    unused = ~mask.any(dim=0)
    expected = agrees((x, w_gate, w_up, w_down, torch.zeros((), device=DEVICE)), mask=mask)
    for weight in (w_gate, w_up, w_down):
        weight[unused] = math.nan
    y = cats_kernels.cats_mlp(
        x, w_gate, w_up, w_down, torch.zeros((), device=DEVICE), mask=mask, out_dtype=torch.float32
    )
    assert torch.equal(y, expected)


@pytest.mark.parametrize("rows", (2, 7))
def test_a_row_does_not_see_what_other_rows_keep(rows):
    x, *weights = case(80, 64, rows, seed=4)
    t = threshold(gate(x, weights[0]), 0.8)
    together = agrees((x, *weights, t))
    for i in range(rows):
        alone = cats_kernels.cats_mlp(x[i : i + 1], *weights, t, out_dtype=torch.float32)
        torch.testing.assert_close(together[i : i + 1], alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("rows", (1, 3))
@pytest.mark.parametrize("value", (math.nan, math.inf, -math.inf))
def test_what_is_not_finite_shows_in_its_row_only(value, rows):
    x, *weights = case(64, 48, rows)
    x[rows - 1, 5] = value
    y = cats_kernels.cats_mlp(x, *weights, torch.tensor(0.1, device=DEVICE))
    assert not y[rows - 1].isfinite().all()
    assert y[: rows - 1].isfinite().all()


@pytest.mark.parametrize("rows", (1, 4))
def test_strided_and_misaligned_inputs(rows):
    x, *weights = case(33, 40, rows)
    t = threshold(gate(x, weights[0]), 0.5)
    expected = agrees((x, *weights, t))
    wide = torch.zeros(rows, 80, dtype=x.dtype, device=DEVICE)
    wide[:, ::2] = x
    shifted = []
    for weight in weights:
        storage = torch.zeros(weight.numel() + 1, dtype=weight.dtype, device=DEVICE)
        storage[1:] = weight.flatten()
        shifted.append(storage[1:].view(weight.shape))
    torch.testing.assert_close(agrees((wide[:, ::2], *shifted, t)), expected, rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="contiguous"):
        cats_kernels.cats_mlp(x, weights[0].t().contiguous().t(), *weights[1:], t)


@pytest.mark.parametrize("centre", (False, True))
@pytest.mark.parametrize("values", sorted({*tuning.DECODE.values(), tuning.SMALL}))
def test_one_row_agrees_in_every_launch_configuration(values, centre):
    """Tiles of the columns that a row of 700 fills in part, more and fewer neurons than programs own."""
    x, *weights, shared, centres, t = centred_case(101, 700)
    config = dict(zip(tuning.DECODE_NAMES, values, strict=True)) | {"cols": min(512, values[4])}
    around = {"centre": centres, "shared": shared} if centre else {}
    t = t if centre else threshold(gate(x, weights[0]), 0.5)
    y = one_row.launch(x, *weights, t, "silu", None, torch.float32, config, **around)
    arguments = (x, *weights, shared, centres, t) if centre else (x, *weights, t)
    reference_of = centred.dense if centre else reference.cats_mlp
    more = {} if centre else {"mask": None}
    expected = reference_of(*arguments, "silu", **more, out_dtype=torch.float64, accumulate=torch.float64)
    assert float((y - expected).norm() / expected.norm()) < TOLERANCE[torch.bfloat16]


@pytest.mark.parametrize("hidden_size", (1, 129, 512, 576, 896, 1536, 2304, 4096, 5120, 8192, 12288, 20000))
@pytest.mark.parametrize("element_size", (2, 4))
def test_a_launch_configuration_has_tiles_that_a_width_fills(hidden_size, element_size):
    c = tuning.decode_config(4 * hidden_size, hidden_size, element_size)
    assert c["rows"] >= c["take"] >= 1 and c["cols"] & (c["cols"] - 1) == 0
    padded = -(-hidden_size // c["cols"]) * c["cols"]
    assert padded < 2 * hidden_size and (hidden_size < 1152 or padded <= 1.34 * hidden_size)


def test_what_does_not_fit_is_said():
    x, *weights = case(8, 16, 2)
    t = torch.zeros((), device=DEVICE)
    wrong = {
        "B <= 16": (x.repeat(9, 1), *weights, t),
        "B, d": (x[0], *weights, t),
        "w_up is": (x, weights[0], weights[1][:4], weights[2], t),
        "move one": (x, weights[0], weights[1].float(), weights[2], t),
        "threshold must": (x, *weights, torch.zeros(3, device=DEVICE)),
        "activation is": (x, *weights, t, "tanh"),
        "mask must": (x, *weights, t, "silu", torch.ones(2, 7, dtype=torch.bool, device=DEVICE)),
        "x is torch.int64": (x.long(), *(weight.long() for weight in weights), t),
        "threshold is torch.complex64": (x, *weights, t.to(torch.complex64)),
        "threshold is torch.bool": (x, *weights, t.bool()),
        "out_dtype is torch.int32": (x, *weights, t, "silu", None, torch.int32),
    }
    for message, arguments in wrong.items():
        with pytest.raises(ValueError, match=message):
            cats_kernels.cats_mlp(*arguments)


@pytest.mark.parametrize("rows", (1, 3, 8))
def test_runs_are_equal_to_the_bit(rows):
    x, *weights = case(120, 136, rows)
    t = threshold(gate(x, weights[0]), 0.4)
    first = cats_kernels.cats_mlp(x, *weights, t)
    assert first.dtype == x.dtype
    for _ in range(2 if DEVICE == "cpu" else 50):
        assert torch.equal(cats_kernels.cats_mlp(x, *weights, t), first)


@pytest.mark.parametrize("splits", (1, 4))
def test_the_number_of_programs_does_not_change_the_result(splits):
    """Few and many programs, tiles smaller and larger than what a program owns."""
    x, *weights = case(333, 100, 3, seed=6)
    t = threshold(gate(x, weights[0]), 0.5)
    expected = agrees((x, *weights, t))
    config = dict(
        programs=splits, warps=4, gate_rows=32, gate_cols=64, gate_stages=2, up_rows=16, up_cols=32,
        up_stages=2, down_programs=2 * splits, down_warps=4, cols=64, take=16, down_stages=3,
    )  # fmt: skip
    y = batch.launch(x, *weights, t, "silu", None, torch.float32, config)
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)
    config = dict(programs=2 * splits, warps=4, registers=128, rows=2, cols=64, take=4, tensor_rows=4)
    y = few.launch(x, *weights, t, "silu", None, torch.float32, config)
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("rows", (1, 3))
def test_the_registration_passes_torchs_own_checks(rows):
    x, *weights = case(24, 32, rows)
    arguments = (x, *weights, torch.tensor(0.2, device=DEVICE), "silu")
    torch.library.opcheck(torch.ops.cats.mlp.default, arguments)
    torch.library.opcheck(torch.ops.cats.mlp.default, (*arguments, None, torch.float32))


@pytest.mark.parametrize("rows", (1, 3))
def test_compiles_whole_and_exports(rows):
    x, *weights = case(24, 32, rows)
    t = torch.tensor(0.2, device=DEVICE)

    class Module(torch.nn.Module):
        def forward(self, x, w_gate, w_up, w_down_t, t):
            return cats_kernels.cats_mlp(x * 2, w_gate, w_up, w_down_t, t) + 1

    expected = Module()(x, *weights, t)
    backend = "aot_eager" if DEVICE == "cpu" else "inductor"
    compiled = torch.compile(Module(), fullgraph=True, backend=backend)
    torch.testing.assert_close(compiled(x, *weights, t), expected)
    exported = torch.export.export(Module(), (x, *weights, t))
    torch.testing.assert_close(exported.module()(x, *weights, t), expected)


def test_the_three_kernels_agree_on_one_row():
    x, *weights = case(70, 90, 1)
    t = threshold(gate(x, weights[0]), 0.5)
    alone = one_row.launch(x, *weights, t, "silu", None, torch.float32)
    for rows in (few, batch):
        y = rows.launch(x, *weights, t, "silu", None, torch.float32)
        torch.testing.assert_close(y, alone, rtol=1e-4, atol=1e-5)


def centred_case(m, d, rows=1, dtype=torch.bfloat16, seed=0, activation="silu"):
    """x and weights as `case`, A [d, d], centres [m] of all sizes, and a threshold that half survive."""
    x, *weights = case(m, d, rows, dtype, seed)
    generator = torch.Generator().manual_seed(seed + 1)
    shared = (torch.randn(d, d, generator=generator) / math.sqrt(d)).to(DEVICE, dtype)
    centre = (torch.randn(m, generator=generator) * 0.2).to(DEVICE)
    t = threshold(gate(x, weights[0], activation) - centre.double(), 0.5)
    return x, *weights, shared, centre, t


def centred_agrees(arguments, activation="silu"):
    y = centred.centred_mlp(*arguments, activation, torch.float32)
    expected = centred.dense(*arguments, activation, torch.float64, torch.float64)
    error = (y.double() - expected).norm() / expected.norm().clamp_min(1e-30)
    assert y.dtype == torch.float32 and error <= TOLERANCE[arguments[0].dtype], f"relative error {error:.1e}"
    return y


@pytest.mark.parametrize(("m", "d"), [(1, 1), (63, 129), (64, 64), (40, 1000), (5, 576)])
def test_around_centres_on_odd_and_even_shapes(m, d):
    centred_agrees(centred_case(m, d))


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("activation", sorted(reference.ACTIVATIONS))
def test_around_centres_with_every_activation_and_dtype(activation, dtype):
    arguments = centred_case(50, 96, dtype=dtype, activation=activation)
    y = centred_agrees(arguments, activation)
    assert torch.equal(y, centred.centred_mlp(*arguments, activation, torch.float32))


def test_around_centres_a_threshold_each_none_and_all():
    x, *weights, shared, centre, t = centred_case(90, 64)
    z = gate(x, weights[0])[0] - centre.double()
    each = (z.abs() * 0.9).float()
    each[::7], each[1::7] = NEVER, 0
    centred_agrees((x, *weights, shared, centre, each))
    centred_agrees((x, *weights, shared, centre, torch.zeros_like(t)))
    linear = centred_agrees((x, *weights, shared, centre, torch.full_like(t, NEVER)))
    assert torch.allclose(linear, x.float() @ shared.float(), rtol=1e-5, atol=1e-5)


def test_centres_of_zero_and_no_matrix_are_cats():
    x, *weights, shared, centre, t = centred_case(70, 80, dtype=torch.float32)
    y = centred_agrees((x, *weights, torch.zeros_like(shared), torch.zeros_like(centre), t))
    plain = cats_kernels.cats_mlp(x, *weights, t)
    assert torch.allclose(y, plain, rtol=1e-5, atol=1e-6)


def test_around_centres_what_is_not_a_number_is_seen():
    x, *weights, shared, centre, t = centred_case(30, 40)
    x[0, 3] = math.nan
    assert centred.centred_mlp(x, *weights, shared, centre, t).isnan().all()


def test_around_centres_several_rows_are_dense_products():
    centred_agrees(centred_case(60, 64, rows=3, dtype=torch.float32))
    torch.library.opcheck(torch.ops.cats.centred_mlp.default, (*centred_case(20, 32), "silu"))


@pytest.mark.parametrize(
    ("place", "wrong", "reason"),
    [
        (4, lambda shared: shared[:-1], r"shared must be contiguous \[32, 32\]"),
        (4, lambda shared: shared.t(), "shared must be contiguous"),
        (4, lambda shared: shared.double(), "shared must be contiguous"),
        (5, lambda centre: centre[:-1], r"centre must be contiguous float32 \[20\]"),
        (5, lambda centre: centre.bfloat16(), "centre must be contiguous float32"),
        (1, lambda w_gate: w_gate[:, :-1], r"w_gate is|ask for"),
    ],
)
def test_around_centres_what_does_not_fit_is_said(place, wrong, reason):
    arguments = list(centred_case(20, 32))
    arguments[place] = wrong(arguments[place])
    with pytest.raises(ValueError, match=reason):
        centred.centred_mlp(*arguments)
