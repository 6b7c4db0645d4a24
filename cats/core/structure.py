"""Recognise a gated MLP, y = down(act(gate(x)) * up(x)), by the graph of its forward, not by its class."""

from dataclasses import dataclass

import torch
from torch import nn

from cats.core.activation import CatsMLP, Layout
from cats.core.layout import Lookalike, layout_of
from cats.errors import CatsError


@dataclass
class GatedMLP:
    """One gated MLP of a model: its dotted name, its number among them, sizes [d] and [m], and activation."""

    name: str
    module: nn.Module
    layer: int
    hidden_size: int
    intermediate_size: int
    activation: str
    fused: bool
    layout: Layout

    @property
    def gate(self) -> nn.Module:
        """The gate projection, which is the up projection too where both are one fused Linear."""
        return self.projection("gate")

    @property
    def up(self) -> nn.Module:
        return self.projection("up")

    @property
    def down(self) -> nn.Module:
        return self.projection("down")

    def projection(self, part: str) -> nn.Module:
        """The Linear "gate", "up" or "down", or what stands in its place."""
        return getattr(self.module, getattr(self.layout, part))

    def first_output(self, part: str) -> int:
        """The first output column of "gate" or "up" in its Linear, which may be fused of both."""
        half = self.layout.gate_half if part == "gate" else 1 - self.layout.gate_half
        return half * self.intermediate_size if self.fused else 0


def find_gated_mlps(model: nn.Module) -> list[GatedMLP]:
    """Every gated MLP of the text decoder, in layer order; of an already sparsified model, the sparse ones.

    Raises CatsError, naming what was found, where there is none, where there are experts, or where a module
    has the parts of a gated MLP but does something else with them.
    """
    title = type(model).__name__
    experts = [name for name, module in model.named_modules() if _is_experts(name, module)]
    if experts:
        raise CatsError(
            f"{title} is a mixture of experts "
            f"({type(model.get_submodule(experts[0])).__name__} at {experts[0]}, "
            f"{len(experts)} in all): CATS here works on dense gated MLPs, choose a dense model."
        )
    found: list[GatedMLP] = []
    for name, module in _slots(model):
        try:
            layout = layout_of(module)
        except Lookalike as reason:
            raise CatsError(
                f"{title} cannot be sparsified: {type(module).__name__} at {name} has the parts of a "
                f"gated MLP, but {reason}."
            ) from None
        if layout is None:
            continue
        if name.endswith("._orig_mod") and not isinstance(module, CatsMLP):
            raise CatsError(
                f"{name.removesuffix('._orig_mod')} was compiled by itself and would stay dense: "
                "calibrate and sparsify the model first, then compile it."
            )
        gate = module.get_submodule(layout.gate)
        found.append(
            GatedMLP(
                name=name,
                module=module,
                layer=len(found),
                hidden_size=gate.in_features,
                intermediate_size=gate.out_features // (2 if layout.fused else 1),
                activation=layout.activation,
                fused=layout.fused,
                layout=layout,
            )
        )
    if not found:
        raise CatsError(
            f"{title} has no gated MLP "
            "(two projections of the input, one through an activation, multiplied): "
            f"found {_summary(model)}."
        )
    return found


def cats_mlps(model: nn.Module) -> list[CatsMLP]:
    """The sparse MLPs of a sparsified model, in layer order; raises CatsError where there are none."""
    modules = sparse_mlps(model)
    if not modules:
        raise CatsError(f"{type(model).__name__} is not sparsified: call cats.sparsify on it first.")
    return modules


def sparse_mlps(model: nn.Module) -> list[CatsMLP]:
    """The sparse MLPs of any model, in layer order; none of a dense one."""
    return [module for _, _, module in sparse_children(model)]


def sparse_children(model: nn.Module) -> list[tuple[nn.Module, str, CatsMLP]]:
    """(parent, name of the child, child) of every sparse MLP in the model, in layer order."""
    return [
        (parent, name, child)
        for parent in list(model.modules())
        if not isinstance(parent, CatsMLP)
        for name, child in parent._modules.items()
        if isinstance(child, CatsMLP)
    ]


def _slots(model: nn.Module):
    """(name, module) of every child in the text decoder: a module shared by two parents comes twice."""
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else model
    prefix = next((name for name, module in model.named_modules() if module is decoder), "")
    for parent_name, parent in (model.get_submodule(prefix) if prefix else model).named_modules():
        for child_name, child in parent._modules.items():
            if child is not None:
                yield ".".join(filter(None, (prefix, parent_name, child_name))), child


def _is_experts(name: str, module: nn.Module) -> bool:
    last = name.rpartition(".")[2].lower()
    return ("expert" in last or "experts" in type(module).__name__.lower()) and any(
        True for _ in module.parameters()
    )


def _summary(model: nn.Module) -> str:
    """What a model has instead: the classes that hold its Linears (or Conv1D), most frequent first."""
    counts: dict[str, int] = {}
    for _, module in _slots(model):
        if any(
            isinstance(getattr(child, "weight", None), torch.Tensor) and child.weight.ndim == 2
            for child in module.children()
        ):
            counts[type(module).__name__] = counts.get(type(module).__name__, 0) + 1
    top = sorted(counts.items(), key=lambda item: -item[1])[:4]
    return ", ".join(f"{count} {name}" for name, count in top) or "no linear layers"
