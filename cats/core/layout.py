"""The layout of a gated MLP, y = down(act(gate(x)) * up(x)), from the graph of its forward, not its class."""

import inspect
import operator
from functools import partial

import torch
from torch import fx, nn

from cats.core.activation import CatsMLP, Layout, activation_name
from cats.errors import CatsError

_MULTIPLY = {operator.mul, operator.imul, torch.mul, "mul", "mul_"}

_HALVE = {torch.chunk, "chunk", torch.split, "split"}


class Lookalike(Exception):
    """A module with the parts of a gated MLP whose forward computes something else; the message says what."""


def layout_of(module: nn.Module) -> Layout | None:
    """The layout of a gated MLP, None for a module that has not its parts; raises Lookalike."""
    if isinstance(module, CatsMLP):
        return module.layout
    linears = {name: child for name, child in module.named_children() if _is_linear(child)}
    if not _has_parts(module, linears) or not _takes_one_input(module):
        return None
    if "forward" in module.__dict__ and not hasattr(module, "_hf_hook"):
        raise Lookalike("its forward was replaced by another library; load the model without that patch")
    graph = _trace(module)
    layout = _match(module, linears, graph)
    for name in {layout.gate, layout.up, layout.down}:
        if not linears[name].weight.is_floating_point():
            raise Lookalike(
                f"its {name} is quantized to {linears[name].weight.dtype}; load it in bfloat16 or float16"
            )
    return layout


def _is_linear(module: nn.Module) -> bool:
    """A Linear, or an adapter (PEFT) around one."""
    return isinstance(getattr(module, "base_layer", module), nn.Linear) and hasattr(module, "in_features")


def _has_parts(module: nn.Module, linears: dict[str, nn.Module]) -> bool:
    """Two or three Linears of the right shapes, an activation, and nothing else that holds weights."""
    if len(linears) not in (2, 3) or any(True for _ in module.parameters(recurse=False)):
        return False
    others = [child for name, child in module.named_children() if name not in linears]
    if any(True for child in others for _ in child.parameters()):
        return False
    shapes = sorted((linear.in_features, linear.out_features) for linear in linears.values())
    if len(shapes) == 2:
        return any(a[1] == 2 * b[0] and a[0] == b[1] for a, b in (shapes, shapes[::-1]))
    return any(
        a == b and c == a[::-1]
        for a, b, c in (shapes, (shapes[1], shapes[2], shapes[0]), (shapes[0], shapes[2], shapes[1]))
    )


def _takes_one_input(module: nn.Module) -> bool:
    """An attention with the same projections (Phi-3's, say, with fewer key and value heads) takes more."""
    parameters = inspect.signature(type(module).forward).parameters.values()
    return (
        sum(p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD for p in parameters) == 2
    )  # self and x


class _ChildrenAreLeaves(fx.Tracer):
    def is_leaf_module(self, module: nn.Module, qualified_name: str) -> bool:
        return True


def _trace(module: nn.Module) -> fx.Graph:
    try:
        return _ChildrenAreLeaves().trace(module)
    except Exception as error:  # whatever a forward may raise when it is fed a symbol
        raise Lookalike(f"its forward cannot be followed ({' '.join(str(error).split())[:120]})") from error


def _match(module: nn.Module, linears: dict[str, nn.Module], graph: fx.Graph) -> Layout:
    """Match the graph against down(act(gate(x)) * up(x)); every node must take part in it."""
    used: set[fx.Node] = set()

    def step(node, targets) -> fx.Node:
        if not isinstance(node, fx.Node) or node.target not in targets:
            raise Lookalike(f"its forward computes {_show(node)} where a plain gated MLP does not")
        used.add(node)
        return node

    inputs = [node for node in graph.nodes if node.op == "placeholder"]
    output = next(node for node in graph.nodes if node.op == "output")
    used.update((inputs[0], output))
    down = step(_skip(module, output.args[0], used), linears)
    product = step(_skip(module, down.args[0], used), _MULTIPLY)
    factors = [_skip(module, factor, used) for factor in product.args]

    def projection(node) -> tuple[str, int] | None:
        """(name, half) where node is a Linear of x, or one half of one."""
        half = 0
        if isinstance(node, fx.Node) and node.target is operator.getitem and node.args[1] in (0, 1):
            half = node.args[1]
            used.add(node)
            node = step(node.args[0], _HALVE)
            if not _halves(module, node):
                raise Lookalike(
                    f"its forward computes {_show(node)} where a plain gated MLP halves the last dimension"
                )
            used.add(node)
            node = node.args[0]
        if isinstance(node, fx.Node) and node.target in linears and node.args == (inputs[0],):
            used.add(node)
            return node.target, half
        return None

    if len(factors) != 2:
        raise Lookalike("its forward does not multiply two projections")
    projected = [projection(factor) for factor in factors]
    if sum(place is not None for place in projected) != 1:
        raise Lookalike("its forward does not multiply one plain and one activated projection")
    up, up_half = next(place for place in projected if place is not None)
    activated = factors[projected.index(None)]
    act = _activation(activated)
    used.add(activated)
    gated = projection(activated.args[0])
    if gated is None:
        raise Lookalike(f"its forward computes {_show(activated.args[0])} before the activation")
    gate, gate_half = gated
    for node in graph.nodes:
        if node not in used:
            raise Lookalike(f"its forward also computes {_show(node)}")
    if (gate == up) != (len(linears) == 2) or (gate == up and gate_half == up_half):
        raise Lookalike("its forward does not use each projection once")
    try:
        name = activation_name(module.get_submodule(act) if isinstance(act, str) else act)
    except CatsError as error:
        raise Lookalike(str(error)[0].lower() + str(error)[1:-1]) from None
    return Layout(gate, up, down.target, act, name, gate_half)


def _skip(module: nn.Module, node, used: set):
    """Step over modules that do nothing: Identity, and Dropout of probability zero."""
    while isinstance(node, fx.Node) and node.op == "call_module":
        child = module.get_submodule(node.target)
        if not (isinstance(child, nn.Identity) or (isinstance(child, nn.Dropout) and child.p == 0)):
            break
        used.add(node)
        node = node.args[0]
    return node


def _halves(module: nn.Module, node: fx.Node) -> bool:
    """Whether a chunk or split node cuts the last dimension in two equal parts."""
    size = node.args[1] if len(node.args) > 1 else node.kwargs.get("chunks", node.kwargs.get("split_size"))
    dim = node.args[2] if len(node.args) > 2 else node.kwargs.get("dim", 0)
    source = node.args[0]
    if not isinstance(source, fx.Node) or source.op != "call_module":
        return False
    wide = module.get_submodule(source.target).out_features
    whole = 2 if node.target in (torch.chunk, "chunk") else wide // 2
    return dim == -1 and size in (whole, [wide // 2] * 2, (wide // 2,) * 2)


def _activation(node):
    """The name of the child, or the function with its options, that a node calls on one tensor."""
    if isinstance(node, fx.Node) and len(node.args) == 1 and isinstance(node.args[0], fx.Node):
        if node.op == "call_module":
            return node.target
        if node.op == "call_function":
            return partial(node.target, **node.kwargs) if node.kwargs else node.target
    raise Lookalike(f"its forward computes {_show(node)} where the activation is expected")


def _show(node) -> str:
    if not isinstance(node, fx.Node):
        return repr(node)
    return f"{getattr(node.target, '__name__', node.target)!s}"
