"""The CATS kernels where only a GPU can show it: graphs, streams, memory, compilation."""

import math

import cats_kernels
import pytest
import torch
from cats_kernels import reference


@pytest.fixture
def layer():
    if not torch.cuda.is_available():
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
