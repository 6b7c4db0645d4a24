"""Dense gated MLPs to beat: PyTorch op by op, gate and up in one product, torch.compile's, and our own op."""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from cats_kernels import cats_mlp
from cats_kernels.reference import ACTIVATIONS

from cats.benchmarking.workload import Layer

RECIPES = {
    "dense_eager": None,
    "dense_fused": None,
    "dense_compiled": {},
    "dense_reduce_overhead": {"mode": "reduce-overhead"},
    "dense_max_autotune": {"mode": "max-autotune-no-cudagraphs"},
    "dense_coordinate_descent": {"options": {"coordinate_descent_tuning": True}},
    "dense_by_op": None,  # the sparse op at threshold 0: what is left of a gain is sparsity's
}
OWN_GRAPHS = {"dense_reduce_overhead"}  # captures graphs by itself, so it cannot be part of ours


@dataclass
class Dense:
    """One dense variant: `step(i)` runs layer i, `compute(layer)` is y [B, d]; `compile_s` in seconds."""

    name: str
    step: Callable
    compute: Callable
    compile_s: float
    launches: tuple[str, ...]


def separate(x, w_gate, w_up, w_down, act):
    return F.linear(act(F.linear(x, w_gate)) * F.linear(x, w_up), w_down)


def fused(x, w_gate_up, _, w_down, act):
    gate, up = F.linear(x, w_gate_up).chunk(2, dim=-1)
    return F.linear(act(gate) * up, w_down)


def build(name: str, layers: list[Layer]) -> Dense:
    """The variant `name` of RECIPES on these layers, compiled where it is to be, from a fresh start.

    W_down is copied to the usual [d, m]: the layout that dense code has, and its products are tuned for.
    """
    if name == "dense_by_op":
        return _by_op(layers)
    recipe = RECIPES[name]
    function = fused if name == "dense_fused" else separate
    act = ACTIVATIONS[layers[0].activation]
    weights = []
    for layer in layers:
        if name == "dense_fused":
            front = (torch.cat([layer.w_gate, layer.w_up]), None)
        else:
            front = (layer.w_gate, layer.w_up)
        weights.append((layer.x, *front, layer.w_down_t.t().contiguous()))
    if recipe is not None:
        torch._dynamo.reset()
        function = torch.compile(function, fullgraph=True, dynamic=False, **recipe)
        for tensor in (tensor for each in weights for tensor in each):
            torch._dynamo.mark_static_address(tensor)

    @torch.no_grad()
    def step(i):
        if name in OWN_GRAPHS:
            torch.compiler.cudagraph_mark_step_begin()
        return function(*weights[i % len(weights)], act)

    def compute(layer):
        return step(next(i for i, each in enumerate(layers) if each is layer))

    start = time.perf_counter()
    step(0)
    if layers[0].x.is_cuda:
        torch.cuda.synchronize()
    compile_s = time.perf_counter() - start if recipe is not None else 0.0
    return Dense(name, step, compute, compile_s, ("eager",) if name in OWN_GRAPHS else ("graph", "eager"))


def _by_op(layers: list[Layer]) -> Dense:
    never = torch.zeros((), dtype=torch.float32, device=layers[0].x.device)

    @torch.no_grad()
    def compute(layer):
        return cats_mlp(layer.x, layer.w_gate, layer.w_up, layer.w_down_t, never, layer.activation)

    return Dense("dense_by_op", lambda i: compute(layers[i % len(layers)]), compute, 0.0, ("graph", "eager"))
