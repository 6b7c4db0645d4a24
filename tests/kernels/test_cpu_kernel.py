"""The decode kernel for a CPU: equal to the reference, also over threads, harmless where it cannot run."""

import math
import os
import shutil
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import cats_kernels
import pytest
import torch
import toys
import triton
from cats_kernels import cpu, crossover, reference

from cats.core import structure
from cats.core.sparsify import sparsify

pytest.importorskip("numba")
pytestmark = pytest.mark.skipif(triton.knobs.runtime.interpret, reason="the interpreter takes the op's place")
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2e-6}  # of a float32 result
NEVER = 1e30
PACKAGE = Path(cats_kernels.__file__).parent


@pytest.fixture(params=(1, 2))
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.fixture
def at_once(monkeypatch):
    """All threads from the first call on: no calls on one thread to compare with."""
    monkeypatch.setattr(cpu, "FEWEST_ALONE", 0)
    monkeypatch.setattr(cpu, "_threads", threading.local())


def case(m, d, rows=1, dtype=torch.float32, seed=0):
    """x [rows, d] and the three weights [m, d]."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, d, generator=generator)
    weights = [torch.randn(m, d, generator=generator) / math.sqrt(d) for _ in range(3)]
    return [tensor.to(dtype) for tensor in (x, *weights)]


def gate(x, w_gate, activation="silu"):
    return reference.ACTIVATIONS[activation](x.double() @ w_gate.double().t())


def threshold(z, sparsity):
    """A threshold in the widest gap near the quantile, so that rounding cannot change the mask."""
    ordered = z.abs().flatten().sort().values
    rank = round(sparsity * len(ordered))
    if rank in (0, len(ordered)):
        return torch.tensor(0.0 if rank == 0 else NEVER)
    near = ordered[max(0, rank - 8) : rank + 8]
    place = int(near.diff().argmax())
    return near[place : place + 2].mean().float()


def agrees(arguments, activation="silu", mask=None):
    """The op's float32 result, compared with float64 arithmetic on the same tensors."""
    y = cats_kernels.cats_mlp(*arguments, activation, mask, out_dtype=torch.float32)
    expected = reference.cats_mlp(
        *arguments, activation, mask, out_dtype=torch.float64, accumulate=torch.float64
    )
    assert y.shape == expected.shape and y.dtype == torch.float32
    error = float((y.double() - expected).norm() / expected.norm().clamp_min(1e-30))
    assert error <= TOLERANCE[arguments[0].dtype], f"relative error {error:.1e}"
    return y


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("rows", (1, 2, 3, 4, 16))
@pytest.mark.parametrize(
    ("m", "d"), [(1, 1), (5, 3), (63, 129), (64, 64), (150, 576), (1000, 273), (273, 1000)]
)
def test_equals_the_reference_on_odd_and_even_shapes(m, d, rows, dtype):
    x, *weights = case(m, d, rows, dtype)
    agrees((x, *weights, threshold(gate(x, weights[0]), 0.5)))


@pytest.mark.parametrize("rows", (1, 4))
@pytest.mark.parametrize(("m", "d"), [(1000, 2730), (4099, 513)])
def test_equals_the_reference_on_large_shapes(m, d, rows, threads, at_once):
    x, *weights = case(m, d, rows)
    agrees((x, *weights, threshold(gate(x, weights[0]), 0.7)))


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("activation", sorted(reference.ACTIVATIONS))
def test_every_activation(activation, dtype):
    x, *weights = case(50, 96, 2, dtype)
    agrees((x, *weights, threshold(gate(x, weights[0], activation), 0.6)), activation)


@pytest.mark.parametrize("rows", (1, 3))
@pytest.mark.parametrize("sparsity", (0.0, 0.5, 0.9, 1.0))
def test_every_sparsity(sparsity, rows, threads):
    x, *weights = case(177, 80, rows, seed=3)
    y = agrees((x, *weights, threshold(gate(x, weights[0]), sparsity)))
    if sparsity == 1:
        assert not y.any()


def test_keeps_at_equality():
    """Small integers make z exact: with t = 2, |z| = 2 stays and |z| = 1 goes."""
    x = torch.tensor([[1.0, 1.0]])
    w_gate = torch.tensor([[1.0, 1.0], [1.0, 0.0], [3.0, 0.0], [-1.0, -1.0]])
    ones = torch.ones(4, 2)
    y = cats_kernels.cats_mlp(x, w_gate, ones, ones, torch.tensor(2.0), "relu")
    assert torch.equal(y, torch.tensor([[10.0, 10.0]]))  # (2 + 3) times up = 2


@pytest.mark.parametrize("rows", (1, 3))
def test_one_threshold_a_neuron(rows):
    x, *weights = case(90, 40, rows, seed=5)
    z = gate(x, weights[0])[0].abs()
    t = torch.where(torch.arange(90) % 2 == 0, z * 0.9, z * 1.1).float()
    agrees((x, *weights, t))
    strided = torch.stack((t, t), dim=1)[:, 0]
    assert torch.equal(cats_kernels.cats_mlp(x, *weights, strided), cats_kernels.cats_mlp(x, *weights, t))


@pytest.mark.parametrize("rows", (1, 3))
@pytest.mark.parametrize("kind", ("none", "one", "random", "all", "shared"))
def test_given_masks(kind, rows):
    x, *weights = case(200, 72, rows, seed=1)
    share = {"none": 0.0, "one": 0.0, "random": 0.4, "all": 1.0, "shared": 0.4}[kind]
    shape = (200,) if kind == "shared" else (rows, 200)
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(2)) < share
    if kind == "one":
        mask[rows - 1, 17] = True
    y = agrees((x, *weights, torch.tensor(NEVER)), mask=mask)
    wide = torch.stack((mask, mask), dim=-1)[..., 0]
    assert torch.equal(cats_kernels.cats_mlp(x, *weights, torch.tensor(NEVER), mask=wide), y)


@pytest.mark.parametrize("rows", (1, 4))
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_bit_equal_from_run_to_run_and_over_threads(rows, dtype, at_once):
    x, *weights = case(1000, 200, rows, dtype)
    t = threshold(gate(x, weights[0]), 0.5)
    before = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 3, 8) * 5:
            torch.set_num_threads(count)
            results.append(cats_kernels.cats_mlp(x, *weights, t))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(result, results[0]) for result in results)


def test_several_callers_at_once(threads):
    """Each calling thread has its own scratch memory."""
    x, *weights = case(700, 150)
    inputs = [x * (k + 1) for k in range(4)]
    t = torch.tensor(0.1)
    expected = [cats_kernels.cats_mlp(each, *weights, t) for each in inputs]
    wrong = []

    def call(k):
        for _ in range(50):
            if not torch.equal(cats_kernels.cats_mlp(inputs[k], *weights, t), expected[k]):
                wrong.append(k)

    callers = [threading.Thread(target=call, args=(k,)) for k in range(4)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert not wrong


def test_one_thread_while_other_processes_hold_the_cores(monkeypatch, at_once):
    """A call that waits for an unscheduled thread is followed by calls on one thread, more each time."""
    monkeypatch.setattr(cpu, "FEWEST_ALONE", 2)
    x, *weights = case(200, 64)
    t = torch.tensor(0.1)
    started = []
    kernel = cpu.compiled(torch.float32)

    def slow(address, arguments, threads, flags):
        started.append(threads)
        time.sleep(0.03)
        kernel.run(arguments)

    monkeypatch.setattr(cpu, "_parallel", lambda: slow)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    results = [cats_kernels.cats_mlp(x, *weights, t) for _ in range(200)]
    assert 1 <= len(started) <= 10
    assert all(torch.equal(result, results[0]) for result in results)


@pytest.mark.parametrize("rows", (1, 3))
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_nan_and_infinity_are_seen_where_they_count(rows, dtype):
    x, *weights = case(100, 60, rows, dtype)
    keep = torch.zeros(100, dtype=torch.bool)
    keep[:50] = True
    t = torch.where(keep, 0.0, NEVER)
    clean = cats_kernels.cats_mlp(x, *weights, t)
    assert clean.isfinite().all()
    for k in (1, 2):  # a dropped neuron's rows of W_up and W_down are not read
        poisoned = [weight.clone() for weight in weights]
        poisoned[k][50:] = torch.nan
        assert torch.equal(cats_kernels.cats_mlp(x, *poisoned, t), clean)
        poisoned[k][7] = torch.nan
        assert cats_kernels.cats_mlp(x, *poisoned, t).isnan().all()
    gated = [weight.clone() for weight in weights]
    gated[0][60] = torch.nan
    assert cats_kernels.cats_mlp(x, *gated, t).isnan().all(), "a NaN activation is kept"
    down = [weight.clone() for weight in weights]
    down[2][3, 5] = torch.inf
    y = cats_kernels.cats_mlp(x, *down, t)
    assert not y[:, 5].isfinite().any() and torch.equal(y[:, :5], clean[:, :5])
    x[0, 0] = torch.nan
    y = cats_kernels.cats_mlp(x, *weights, t)
    assert y[0].isnan().all() and torch.equal(y[1:], clean[1:])


def test_a_token_does_not_see_what_only_others_keep():
    x, *weights = case(40, 30, 2)
    mask = torch.ones(2, 40, dtype=torch.bool)
    mask[0, 11] = False
    weights[2][11] = torch.nan
    y = cats_kernels.cats_mlp(x, *weights, torch.tensor(0.0), mask=mask)
    assert y[0].isfinite().all() and y[1].isnan().all()


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float32, torch.float16, torch.float64))
def test_output_dtypes_and_views(dtype):
    """Inputs at odd offsets and strides; float16 and float64 take dense products."""
    x, *weights = case(65, 33, 2, dtype)
    t = threshold(gate(x, weights[0]), 0.5)
    expected = reference.cats_mlp(x, *weights, t, out_dtype=torch.float64, accumulate=torch.float64)
    odd = [torch.empty(weight.numel() + 1, dtype=dtype)[1:].view(65, 33).copy_(weight) for weight in weights]
    strided = torch.stack((x, x), dim=2)[:, :, 1]
    for out_dtype in (None, torch.float32, torch.bfloat16):
        y = cats_kernels.cats_mlp(strided, *odd, t, out_dtype=out_dtype)
        assert y.dtype == (out_dtype or dtype) and y.is_contiguous()
        loose = 2e-2 if torch.bfloat16 in (y.dtype, dtype) else 2e-3 if dtype == torch.float16 else 1e-5
        assert float((y.double() - expected).norm() / expected.norm()) < loose
    empty = cats_kernels.cats_mlp(x[:0], *weights, t)
    assert empty.shape == (0, 33)
    nothing = cats_kernels.cats_mlp(x, *(weight[:0] for weight in weights), t)
    assert nothing.shape == x.shape and not nothing.any()


def test_under_inference_mode_and_compile():
    x, *weights = case(90, 48, 2)
    t = torch.tensor(0.2)
    expected = cats_kernels.cats_mlp(x, *weights, t)
    with torch.inference_mode():
        assert torch.equal(cats_kernels.cats_mlp(x, *weights, t), expected)

    def twice(x):
        return cats_kernels.cats_mlp(x, *weights, t) * 2

    step = torch.compile(twice, backend="aot_eager", fullgraph=True)  # needs no compiler of C++
    with torch.no_grad():
        assert torch.equal(step(x), expected * 2)
    torch.library.opcheck(torch.ops.cats.mlp.default, (x, *weights, t, "silu"))


@pytest.mark.parametrize(("rows", "dtype"), [(1, torch.float32), (2, torch.float32), (2, torch.bfloat16)])
def test_generate_equals_the_masked_model_token_for_token(rows, dtype, monkeypatch):
    model = toys.toy("llama", dtype=dtype)
    sparsify(model, toys.constant_thresholds(model, most=0.5), 0.4)
    monkeypatch.setattr(crossover, "sparse_pays", lambda *_: True)  # equal whether or not it is faster
    calls = []
    sparse = cpu.cats_mlp
    monkeypatch.setattr(cpu, "cats_mlp", lambda *arguments: calls.append(1) or sparse(*arguments))
    ids = toys.tokens(rows, 7)
    options = {"attention_mask": torch.ones_like(ids), "do_sample": False, "output_logits": True}
    options |= {"max_new_tokens": 14, "min_new_tokens": 14, "return_dict_in_generate": True}
    found = model.generate(ids, **options)
    assert len(calls) == 3 * 13, "all tokens but the first, which prefill gives"
    for module in structure.cats_mlps(model):
        module.observer = lambda z, up: None  # who watches gets dense products with the mask
    masked = model.generate(ids, **options)
    assert len(calls) == 3 * 13
    if dtype == torch.float32:
        assert torch.equal(found.sequences, masked.sequences)
        logits = torch.stack(found.logits), torch.stack(masked.logits)
        torch.testing.assert_close(*logits, rtol=1e-4, atol=1e-4)
    else:  # a token may differ where two logits round to one bfloat16; the first ones may not
        assert torch.equal(found.sequences[:, :9], masked.sequences[:, :9])


def run(script, cwd, **environment):
    """Standard output and error of a Python program that finds `cats_kernels` where `cwd` is."""
    kept = {k: v for k, v in os.environ.items() if k not in ("NUMBA_CACHE_DIR", "TRITON_INTERPRET")}
    path = {"PYTHONPATH": str(cwd), "OMP_NUM_THREADS": "2", "PYTHONDONTWRITEBYTECODE": "1"}
    process = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        cwd=cwd, env={**kept, **path, **environment}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert process.returncode == 0, process.stderr[-3000:]
    return process.stdout, process.stderr


def test_dense_products_and_one_line_without_numba(tmp_path):
    output, error = run(
        """
        import sys
        sys.modules["numba"] = None
        import torch, cats_kernels
        from cats_kernels import reference
        torch.manual_seed(0)
        for dtype in (torch.float32, torch.bfloat16):
            x, *weights = torch.randn(2, 24).to(dtype), *(torch.randn(60, 24).to(dtype) for _ in range(3))
            for _ in range(3):
                y = cats_kernels.cats_mlp(x, *weights, torch.tensor(0.7))
                expected = reference.cats_mlp(x, *weights, torch.tensor(0.7), out_dtype=torch.float32)
                error = (y.float() - expected).norm() / expected.norm()
                assert error < (1e-5 if dtype == torch.float32 else 2e-2), error
        print("same")
        """,
        PACKAGE.parent,
    )
    assert output == "same\n"
    lines = [line for line in error.splitlines() if "numba" in line]
    assert len(lines) == 1 and "dense" in lines[0]


def test_machine_code_is_kept_where_something_can_be_written(tmp_path):
    """A read-only package uses the home directory; where that is read-only too, every process compiles."""
    package = tmp_path / "cats_kernels"
    shutil.copytree(PACKAGE, package, ignore=shutil.ignore_patterns("__pycache__"))
    (package / "__pycache__").write_text("a file, so that no directory can be made here, not even by root")
    home = tmp_path / "home"
    home.mkdir()
    script = """
        import torch, cats_kernels
        from cats_kernels import cpu
        x = torch.ones(1, 4)
        weights = [torch.ones(3, 4) for _ in range(3)]
        y = cats_kernels.cats_mlp(x, *weights, torch.tensor(0.0), "relu")
        assert torch.equal(y, torch.full((1, 4), 48.0))
        print(cpu.compiled(torch.float32).owner.cache_hits)
        """
    environment = {"HOME": str(home), "XDG_CACHE_HOME": str(home / "cache")}
    assert run(script, tmp_path, **environment)[0] == "0\n"
    kept = list(home.rglob("*.nbc"))
    assert len(kept) == 1
    assert run(script, tmp_path, **environment)[0] == "1\n"
    nowhere = str(package / "__pycache__")
    assert run(script, tmp_path, HOME=nowhere, XDG_CACHE_HOME=nowhere)[0] == "0\n"


def test_a_forked_child_decodes(tmp_path):
    """It has no threads of its own, and must not wait for its parent's."""
    output, _ = run(
        """
        import os, sys, torch, cats_kernels
        from cats_kernels import cpu
        cpu.FEWEST_ALONE = 0
        x, *weights = torch.randn(1, 200), *(torch.randn(500, 200) for _ in range(3))
        t = torch.tensor(0.5)
        expected = cats_kernels.cats_mlp(x, *weights, t)
        child = os.fork()
        if child == 0:
            os._exit(0 if torch.equal(cats_kernels.cats_mlp(x, *weights, t), expected) else 1)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
        """,
        PACKAGE.parent,
    )
    assert output == "0\n"
