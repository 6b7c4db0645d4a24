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
    """What a `cats.masking.Masking` knows of the call under way.

    `valid` [B, T] bool, False for padding; `prompt` [B]: tokens of each row behind which tokens are generated
    or scored; None where nobody said.
    """

    phase: str
    valid: Tensor | None = None
    prompt: Tensor | None = None


@dataclass(eq=False)
class Site:
    """One Linear of which a rule drops inputs (`at` "input") or outputs ("output").

    `keep(x, call)`: x [..., n] → bool, False where x is replaced by `fill`, a number or [n]; call as above,
    None outside a Masking. `start` and `width`: the columns of the output that are meant, where projections
    are fused. `weights`: what one dropped activation saves a token; `extra`: what a masked token reads on
    top. `rest`, where set, adds what it makes of the dropped inputs to the output; `beside`, an MLP around
    and a matrix [d, d], adds its input times the matrix to what the MLP puts out for masked tokens.
    `neurons`: neurons of the MLP are dropped. `whole`: a sequence must be read in one call. `combine(keep)`,
    where set, decides last: `cats.masking` applies its policies and counts there.
    """

    layer: int
    name: str
    linear: nn.Linear
    keep: Callable[[Tensor, Call | None], Tensor]
    weights: int
    at: str = "input"
    start: int = 0
    width: int | None = None
    fill: float | Tensor = 0.0
    extra: int = 0
    rest: Callable[[Tensor], Tensor] | None = None
    beside: tuple[nn.Module, Tensor] | None = None
    neurons: bool = False
    whole: bool = False
    combine: Callable[[Tensor], Tensor] | None = field(default=None, repr=False)
    call: Callable[[], Call] | None = field(default=None, repr=False)
    _handles: list = field(default_factory=list, repr=False)

    def __post_init__(self):
        if self.width is None:
            self.width = self.linear.in_features if self.at == "input" else self.linear.out_features

    def attach(self) -> None:
        if self.at == "input":
            self._handles.append(self.linear.register_forward_pre_hook(self._before))
            if self.rest is not None:
                self._handles.append(self.linear.register_forward_hook(self._after))
        else:
            self._handles.append(self.linear.register_forward_hook(self._behind))
        if self.beside is not None:
            self._handles.append(self.beside[0].register_forward_hook(self._around))

    def detach(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _chosen(self, x: Tensor) -> Tensor:
        keep = self.keep(x, None if self.call is None else self.call())
        return keep if self.combine is None else self.combine(keep)

    def _before(self, _, args: tuple) -> tuple:
        x = args[0]
        kept = torch.where(self._chosen(x), x, self.fill)
        if self.rest is not None:
            self._dropped = x - kept
        return (kept, *args[1:])

    def _after(self, _, args: tuple, output: Tensor) -> Tensor:
        dropped, self._dropped = self._dropped, None
        return output + self.rest(dropped)

    def _behind(self, _, args: tuple, output: Tensor) -> Tensor:
        part = output.narrow(-1, self.start, self.width)
        keep = self._chosen(part)
        kept = torch.where(keep, part, self.fill)
        self._masked = None if self.beside is None else ~keep.all(-1, keepdim=True)
        if self.width == output.shape[-1]:
            return kept
        result = output.clone()
        result.narrow(-1, self.start, self.width).copy_(kept)
        return result

    def _around(self, _, args: tuple, output: Tensor) -> Tensor:
        masked, self._masked = self._masked, None
        return output + masked * (args[0] @ self.beside[1])


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
