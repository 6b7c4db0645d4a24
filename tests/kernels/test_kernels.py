"""The CATS kernels: on the GPU where there is one, in Triton's interpreter everywhere else."""

import math
import os
import re
import subprocess
import sys
from pathlib import Path

import cats_kernels
import pytest
import torch
from cats_kernels import crossover, reference

CHECKS = [Path(__file__).with_name(f"{name}_checks.py") for name in ("kernel", "decoding", "bench")]
GPU = torch.cuda.is_available()


def test_kernels_and_benchmarks():
    """A process of its own: the interpreter is chosen when Triton is imported and would slow other tests."""
    environment = {**os.environ, "TRITON_INTERPRET": "0" if GPU else "1"}
    options = ["-o", "addopts=", "-x", "-p", "no:cacheprovider", "-W", "ignore::RuntimeWarning"]
    command = [sys.executable, "-m", "pytest", *options, *map(str, CHECKS)]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=CHECKS[0].parent)
    passed = re.search(r"(\d+) passed", run.stdout)
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]
    assert passed and int(passed[1]) > 130 and "skipped" not in run.stdout, run.stdout[-2000:]


def test_the_crossover_follows_the_union():
    assert crossover.union_density(4, 0.9) == pytest.approx(1 - 0.9**4)
    assert crossover.sparse_pays(1, 0.5)
    assert crossover.sparse_pays(2, 0.9)
    assert not crossover.sparse_pays(16, 0.3), "sixteen independent rows need nearly every neuron"
    assert crossover.sparse_pays(16, 0.3, union=0.3), "unless they want the same ones"
    assert not crossover.sparse_pays(17, 0.99)
    for rows in range(2, 17):
        pays = [crossover.sparse_pays(rows, s / 100) for s in range(100)]
        assert pays == sorted(pays), "what pays at one sparsity pays at every higher one"


@pytest.fixture
def layer():
    if not GPU:
        pytest.skip("needs a CUDA GPU")
    generator = torch.Generator("cuda").manual_seed(0)
    x = torch.randn(8, 1024, generator=generator, device="cuda", dtype=torch.bfloat16)
    weights = [
        (torch.randn(2816, 1024, generator=generator, device="cuda") / 32).bfloat16() for _ in range(3)
    ]
    return x, weights, torch.tensor(0.2, device="cuda")


def close(y, x, weights, t):
    expected = reference.cats_mlp(x, *weights, t, out_dtype=torch.float64, accumulate=torch.float64)
    # a neuron at the threshold may fall on the other side of it: 1e-2 of the norm, of 2816 neurons
    assert float((y.double() - expected).norm() / expected.norm()) < 1e-2


@pytest.mark.gpu
@pytest.mark.parametrize("rows", (1, 2, 8))
def test_graph_capture_replays_with_new_inputs(layer, rows):
    x, weights, t = layer
    x = x[:rows].clone()
    cats_kernels.cats_mlp(x, *weights, t)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = cats_kernels.cats_mlp(x, *weights, t)
    for step in range(3):
        x.copy_(torch.randn_like(x))
        t.fill_(0.1 * step)
        graph.replay()
        close(y, x, weights, t)
        assert torch.equal(y, cats_kernels.cats_mlp(x, *weights, t))


@pytest.mark.gpu
@pytest.mark.parametrize("rows", (1, 4))
def test_several_streams_at_once(layer, rows):
    x, weights, t = layer
    inputs = [torch.randn_like(x[:rows]) for _ in range(4)]
    expected = [cats_kernels.cats_mlp(each, *weights, t) for each in inputs]
    streams = [torch.cuda.Stream() for _ in inputs]
    torch.cuda.synchronize()
    found = [[] for _ in inputs]
    for _ in range(100):
        for stream, each, results in zip(streams, inputs, found, strict=True):
            with torch.cuda.stream(stream):
                results.append(cats_kernels.cats_mlp(each, *weights, t))
    torch.cuda.synchronize()
    for results, y in zip(found, expected, strict=True):
        assert all(torch.equal(result, y) for result in results)


@pytest.mark.gpu
@pytest.mark.parametrize("rows", (1, 16))
def test_work_space_stays_small(layer, rows):
    """A call allocates less than one weight matrix beyond its result, and gives it back."""
    x, weights, t = layer
    x = torch.randn(rows, 1024, device="cuda", dtype=torch.bfloat16)
    y = cats_kernels.cats_mlp(x, *weights, t)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    del y
    y = cats_kernels.cats_mlp(x, *weights, t)
    assert torch.cuda.max_memory_allocated() - before < weights[0].nbytes
    assert torch.cuda.memory_allocated() <= before + 1024
    assert math.isfinite(float(y.float().sum()))


@pytest.mark.gpu
@pytest.mark.parametrize("rows", (1, 4))
def test_compiled_with_graphs_equals_eager(layer, rows):
    x, weights, t = layer
    x = x[:rows]
    step = torch.compile(
        lambda x, *w: cats_kernels.cats_mlp(x, *w, t) * 2, mode="reduce-overhead", fullgraph=True
    )
    for _ in range(4):
        torch.compiler.cudagraph_mark_step_begin()
        y = step(x, *weights).clone()
    torch.testing.assert_close(y, cats_kernels.cats_mlp(x, *weights, t) * 2)
