"""Places where a rule drops activations: inputs or outputs of Linears, by hooks that leave weights alone."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn

from cats.core.activation import CatsMLP
from cats.errors import CatsError

_ATTRIBUTE = "cats_sites"


class Call(NamedTuple):
    """What a `cats.criteria.masking.Masking` knows of the call under way.

    `valid` [B, T] bool, False for padding; `prompt` [B]: tokens of each row behind which tokens are generated
    or scored; None where nobody said.
    """

    phase: str
    valid: Tensor | None = None
    prompt: Tensor | None = None


class Bypass(NamedTuple):
    """A matrix [d, d] beside an MLP: for masked tokens, x times it is added to what the MLP makes of x."""

    mlp: nn.Module
    matrix: Tensor


@dataclass(eq=False)
class Site:
    """One Linear of which a rule drops inputs (`at` "input") or outputs ("output").

    `keep(x, call)`: x [..., n] → bool, False where x is replaced by `fill`, a number or [n]; `call` is None
    outside a Masking. `start` and `width`: the columns of the output that are meant, where projections are
    fused. `weights_saved`: what one dropped activation saves a token; `weights_added`: what a masked token
    reads on top. `dropped_output`, where set, gives what the Linear still puts out for the dropped inputs.
    `neurons`: neurons of the MLP are dropped. `whole_sequence`: a sequence must be read in one call.
    `combine(keep)`, where set, decides last: `cats.criteria.masking` applies its policies and counts there.
    """

    layer: int
    name: str
    linear: nn.Linear
    keep: Callable[[Tensor, Call | None], Tensor]
    weights_saved: int
    at: str = "input"
    start: int = 0
    width: int | None = None
    fill: float | Tensor = 0.0
    weights_added: int = 0
    dropped_output: Callable[[Tensor], Tensor] | None = None
    bypass: Bypass | None = None
    neurons: bool = False
    whole_sequence: bool = False
    combine: Callable[[Tensor], Tensor] | None = field(default=None, repr=False)
    call: Callable[[], Call] | None = field(default=None, repr=False)
    _handles: list = field(default_factory=list, repr=False)

    def __post_init__(self):
        if self.width is None:
            self.width = self.linear.in_features if self.at == "input" else self.linear.out_features

    def attach(self) -> None:
        if self.at == "input":
            self._handles.append(self.linear.register_forward_pre_hook(self._mask_input))
            if self.dropped_output is not None:
                self._handles.append(self.linear.register_forward_hook(self._add_dropped_output))
        else:
            self._handles.append(self.linear.register_forward_hook(self._mask_output))
        if self.bypass is not None:
            self._handles.append(self.bypass.mlp.register_forward_hook(self._add_bypass))

    def detach(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _kept(self, x: Tensor) -> Tensor:
        keep = self.keep(x, None if self.call is None else self.call())
        return keep if self.combine is None else self.combine(keep)

    def _mask_input(self, _, args: tuple) -> tuple:
        x = args[0]
        masked = torch.where(self._kept(x), x, self.fill)
        if self.dropped_output is not None:
            self._dropped = x - masked
        return (masked, *args[1:])

    def _add_dropped_output(self, _, args: tuple, output: Tensor) -> Tensor:
        dropped, self._dropped = self._dropped, None
        return output + self.dropped_output(dropped)

    def _mask_output(self, _, args: tuple, output: Tensor) -> Tensor:
        part = output.narrow(-1, self.start, self.width)
        keep = self._kept(part)
        masked = torch.where(keep, part, self.fill)
        self._masked_tokens = None if self.bypass is None else ~keep.all(-1, keepdim=True)
        if self.width == output.shape[-1]:
            return masked
        result = output.clone()
        result.narrow(-1, self.start, self.width).copy_(masked)
        return result

    def _add_bypass(self, _, args: tuple, output: Tensor) -> Tensor:
        masked_tokens, self._masked_tokens = self._masked_tokens, None
        return output + masked_tokens * (args[0] @ self.bypass.matrix)


def attach(model: nn.Module, sites: Sequence[Site]) -> nn.Module:
    """Let `sites` drop what they drop whenever `model` runs; CatsError where it is sparse already."""
    if is_sparse(model):
        raise CatsError("This model is sparse already: undo that first.")
    for site in sites:
        site.attach()
    setattr(model, _ATTRIBUTE, list(sites))
    return model


def is_sparse(model: nn.Module) -> bool:
    """Whether sites are attached or sparse MLPs built in."""
    return bool(attached(model)) or any(isinstance(module, CatsMLP) for module in model.modules())


def attached(model: nn.Module) -> list[Site]:
    """The sites of a model, in the order in which they were attached; none for a dense one."""
    return model.__dict__.get(_ATTRIBUTE, [])


def detach(model: nn.Module) -> nn.Module:
    """Take every site away: the model computes what it did before, bit for bit."""
    for site in attached(model):
        site.detach()
    model.__dict__.pop(_ATTRIBUTE, None)
    return model
