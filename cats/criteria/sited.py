"""Rules that drop inputs or outputs of Linears by hooks: what they share, and the quantiles they measure."""

from abc import abstractmethod
from collections.abc import Callable, Iterable
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from cats.calibration.calibrate import GRID
from cats.calibration.histogram import Binning, count, interpolate, quantiles
from cats.core.accounting import Accounting
from cats.core.structure import GatedMLP, find_gated_mlps
from cats.criteria.pruning import blocks
from cats.criteria.rule import Fit, Rule
from cats.criteria.sites import Site, attach, detach, is_sparse
from cats.errors import CatsError

# bf16 has 7 bits of mantissa: each of its numbers has a bin of its own. 8,194 bins, near TEAL's 10,000.
_BINNING = Binning(mantissa_bits=7, lowest=-40, highest=24)


class Place(NamedTuple):
    """One Linear of the decoder's blocks: number of its block, and its name in there."""

    layer: int
    name: str
    linear: nn.Linear

    @property
    def key(self) -> tuple[int, str]:
        return self.layer, self.name


@dataclass
class SitedFit(Fit):
    """A rule calibrated on one model: `state` is what `owner` measured, `source` what it was measured on."""

    owner: "SitedRule" = None
    state: Any = None
    source: dict = field(default_factory=dict)

    def apply(self, model: nn.Module, sparsity: float) -> nn.Module:
        self.check(model, sparsity)
        return attach(model, self.sites(model, sparsity))

    def check(self, model: nn.Module, sparsity: float) -> None:
        """Raise CatsError for a sparsity outside [0, 1) and a model that is sparse already."""
        if not 0 <= sparsity < 1:
            raise CatsError(f"Sparsity {sparsity!r} is outside [0, 1): it is a share to drop.")
        if is_sparse(model):
            raise CatsError(f"{self.rule} is applied to a model that is sparse already: undo that first.")

    def sites(self, model: nn.Module, sparsity: float) -> list[Site]:
        """What drops the share `sparsity` of a dense model."""
        return self.owner.sites(model, self.state, sparsity)

    def undo(self, model: nn.Module) -> nn.Module:
        return detach(model)

    def gate_sparsity(self, sparsity: float) -> float | None:
        return sparsity if self.owner.neurons else None

    def model_sparsity(self, shape: Accounting, sparsity: float) -> float:
        return sparsity * self.owner.reach(shape)

    def bytes_per_token(self, shape: Accounting, sparsity: float, bytes_per_weight: float = 2) -> float:
        read = shape.block_weights * (1 - self.model_sparsity(shape, sparsity)) + shape.head_weights
        return read * bytes_per_weight

    def describe(self) -> dict:
        return {"criterion": self.owner.what, "corpus": self.source}


class SitedRule(Rule):
    """A rule of sites. `neurons`: its own sparsity is the share of the MLPs' neurons that a token drops."""

    neurons = False
    thresholds = trains = False

    def check(self, model: nn.Module) -> None:
        find_gated_mlps(model)
        blocks(model)
        if any(hasattr(module, "base_layer") for module in model.modules()):
            raise CatsError(f"{self.name} does not apply to a model with adapters: merge them first.")

    def calibrate(self, model, batches, *, source=None, progress=True) -> Fit:
        self.check(model)
        told = {key: value for key, value in (source or {}).items() if key != "model"}
        return SitedFit(
            self.name, None, owner=self, state=self.measure(model, batches, progress), source=told
        )

    @abstractmethod
    def measure(self, model: nn.Module, batches, progress: bool) -> Any:
        """What the rule needs, from the dense model on `batches`."""

    @abstractmethod
    def sites(self, model: nn.Module, state: Any, sparsity: float) -> list[Site]:
        """What drops the share `sparsity`, by the measure of the rule."""


class InputRule(SitedRule):
    """A rule that drops inputs of every Linear of the blocks; its own sparsity is the model-level one.

    One activation of an input saves the Linear a column of weights: `out_features` of them.
    """

    def reach(self, shape: Accounting) -> float:
        return 1.0

    def shares(self, model: nn.Module, state: Any, sparsity: float) -> dict[tuple[int, str], float]:
        """The share of inputs to drop of each Linear; their mean over weights is `sparsity`."""
        return {place.key: sparsity for place in linears(model)}

    @abstractmethod
    def keep(self, place: Place, state: Any, share: float) -> Callable:
        """The `keep` of a `cats.sites.Site` that drops `share` of the inputs of one Linear."""

    def sites(self, model, state, sparsity):
        shares = self.shares(model, state, sparsity)
        return [
            Site(
                place.layer,
                place.name,
                place.linear,
                self.keep(place, state, shares[place.key]),
                place.linear.out_features,
            )
            for place in linears(model)
        ]


def linears(model: nn.Module) -> list[Place]:
    """Every Linear of the decoder's blocks, in order; with grouped queries k and v are as small as they
    are.
    """
    return [
        Place(layer, name, module)
        for layer, block in enumerate(blocks(model))
        for name, module in block.named_modules()
        if isinstance(module, nn.Linear)
    ]


def parts(model: nn.Module) -> list[tuple[GatedMLP, nn.Linear, nn.Linear, nn.Linear]]:
    """(the MLP, its gate, up and down) of each layer; gate is up where both are one fused Linear."""
    return [
        (mlp, *(getattr(mlp.module, name) for name in (mlp.layout.gate, mlp.layout.up, mlp.layout.down)))
        for mlp in find_gated_mlps(model)
    ]


def _start(mlp: GatedMLP, part: str) -> int:
    """The first output column of the gate or up projection, which may be one fused Linear."""
    half = mlp.layout.gate_half if part == "gate" else 1 - mlp.layout.gate_half
    return half * mlp.intermediate_size if mlp.fused else 0


def _projection(mlp: GatedMLP, part: str) -> nn.Linear:
    return getattr(mlp.module, getattr(mlp.layout, part))


def neuron_site(mlp: GatedMLP, part: str, keep: Callable, **options) -> Site:
    """A site on the output of the gate (`part` "gate") or up projection of one MLP.

    act(0) = 0 for every activation here: a zero output is a neuron dropped, and two products of `hidden_size`
    weights go with it.
    """
    return Site(
        mlp.layer,
        part,
        _projection(mlp, part),
        keep,
        2 * mlp.hidden_size,
        at="output",
        start=_start(mlp, part),
        width=mlp.intermediate_size,
        neurons=True,
        **options,
    )


def at_least(threshold: float, centre: float = 0.0) -> Callable:
    """Keep x where |x - centre| >= threshold, or NaN; compared in fp32, to which the threshold is exact."""

    def keep(x: Tensor, call=None) -> Tensor:
        distance = (x.float() - centre).abs() if centre else x.abs().float()
        return ~(distance < threshold)

    return keep


def drop_lowest(score: Tensor, share: float) -> Tensor:
    """Keep all but the round(share n) lowest scores of each row [..., n], fp32 or fp64: exactly so many.

    Of equal scores the first are dropped.
    """
    drop = round(share * score.shape[-1])
    if drop == 0:
        return torch.ones_like(score, dtype=torch.bool)
    limit = score.kthvalue(drop, dim=-1, keepdim=True).values
    below, equal = score < limit, score == limit
    left = drop - below.sum(-1, keepdim=True)
    return ~(below | (equal & (equal.cumsum(-1, dtype=torch.int32) <= left)))


@contextmanager
def _evaluating(model: nn.Module):
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in training.items():
            module.training = mode


@torch.no_grad()
def watch(
    model: nn.Module,
    modules: Iterable[tuple[Any, nn.Linear]],
    batches,
    see: Callable[[Any, Tensor], None],
    *,
    at: str = "input",
    progress: bool = True,
) -> int:
    """Call `see(key, x)` with the input or output [N, n] of each Linear of (key, Linear), without padding.

    Returns the number of tokens.
    """
    valid: Tensor | None = None

    def hook(key):
        def note(module, args, output):
            x = args[0] if at == "input" else output
            flat = x.detach().reshape(-1, x.shape[-1])
            see(key, flat if valid is None else flat.index_select(0, valid.to(flat.device)))

        return note

    handles = [module.register_forward_hook(hook(key)) for key, module in modules]
    tokens = 0
    try:
        with _evaluating(model):
            for batch in tqdm(batches, desc="observing", unit="batch", disable=None if progress else True):
                ids, mask = batch["input_ids"].to(model.device), batch["attention_mask"].to(model.device)
                tokens += int(mask.sum())
                valid = None if bool(mask.all()) else mask.reshape(-1).nonzero().squeeze(1)
                model.get_decoder()(input_ids=ids, attention_mask=mask, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    if not tokens:
        raise CatsError("The batches hold no token to calibrate on: give text.")
    return tokens


def watch_neurons(
    model: nn.Module,
    which: tuple[str, ...],
    batches,
    see: Callable[[GatedMLP, str, Tensor], None],
    *,
    progress: bool = True,
) -> int:
    """Call `see(mlp, part, x)` with the output [N, m] of each projection in `which`, "gate" or "up", as
    `watch`.
    """

    def narrowed(key: tuple[GatedMLP, str], output: Tensor) -> None:
        mlp, part = key
        see(mlp, part, output.narrow(-1, _start(mlp, part), mlp.intermediate_size))

    modules = [((mlp, part), _projection(mlp, part)) for mlp in find_gated_mlps(model) for part in which]
    return watch(model, modules, batches, narrowed, at="output", progress=progress)


class Quantiles:
    """Quantiles of magnitudes by key, from a stream: `see` counts, `at` gives a threshold."""

    def __init__(self):
        self._counts: dict[Any, Tensor] = {}
        self._values: dict[Any, Tensor] = {}

    def see(self, key: Any, values: Tensor) -> None:
        if key not in self._counts:
            self._counts[key] = torch.zeros(_BINNING.bins, dtype=torch.int64, device=values.device)
        count(self._counts[key], values, _BINNING)

    def at(self, key: Any, share: float) -> float:
        """The magnitude below which `share` of what was seen lies."""
        if key not in self._values:
            self._values[key] = quantiles(self._counts.pop(key)[None].cpu(), GRID, _BINNING)[0]
        at = torch.tensor([share], dtype=torch.float64)
        return float(interpolate(GRID, self._values[key], at)[0].float())
