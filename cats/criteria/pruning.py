"""Static pruning of weights block by block, as the reference code of Wanda does it, and its undoing."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from cats.core.accounting import Accounting
from cats.criteria.rule import Fit
from cats.errors import CatsError


@dataclass
class PrunedFit(Fit):
    """Weights set to zero once and for all, the share `sparsity` of every linear layer of the blocks.

    `score(weight [n, k], norms [k]) -> [n, k]`, lowest pruned, over each row where `by_row`; `norms` are
    those of the layer's inputs over the calibration tokens, with the blocks before pruned already.
    """

    batches: list = field(default_factory=list)
    score: Callable[[Tensor, Tensor], Tensor] = None
    by_row: bool = True
    progress: bool = True
    source: dict = field(default_factory=dict)
    _kept: dict = field(default_factory=dict)

    @torch.no_grad()
    def apply(self, model: nn.Module, sparsity: float) -> nn.Module:
        if self._kept:
            raise CatsError("The weights are pruned already: undo that first.")
        if not 0 <= sparsity < 1:
            raise CatsError(f"Sparsity {sparsity!r} is outside [0, 1): it is the share of weights to drop.")
        layers = blocks(model)
        states = block_inputs(model, layers, self.batches)
        bar = tqdm(layers, desc="pruning", unit="block", disable=None if self.progress else True)
        for number, block in enumerate(bar):
            norms = _norms(block, states, number)
            for name, linear in _linears(block).items():
                self._kept[number, name] = linear.weight.detach().to("cpu", copy=True)
                _prune(
                    linear.weight, self.score(linear.weight.float(), norms.get(name)), sparsity, self.by_row
                )
            for state in states:
                state.advance(block, number)
        return model

    @torch.no_grad()
    def undo(self, model: nn.Module) -> nn.Module:
        layers = blocks(model)
        for (number, name), weight in self._kept.items():
            _linears(layers[number])[name].weight.copy_(weight)
        self._kept.clear()
        return model

    def gate_sparsity(self, sparsity):
        return None

    def model_sparsity(self, shape: Accounting, sparsity: float) -> float:
        return sparsity

    def bytes_per_token(self, shape: Accounting, sparsity: float, bytes_per_weight: float = 2) -> float:
        """Of the weights that are left; what says where they are comes on top, in any format for
        unstructured zeros.
        """
        return (shape.block_weights * (1 - sparsity) + shape.head_weights) * bytes_per_weight

    def describe(self) -> dict:
        return {"criterion": "static weights", "corpus": self.source, "tokens": _tokens(self.batches)}


@dataclass
class State:
    """One batch on its way through the blocks: hidden states [B, T, d], valid tokens, and each block's
    arguments.
    """

    hidden: Tensor
    valid: Tensor
    arguments: list[tuple[tuple, dict]]

    def advance(self, block: nn.Module, number: int) -> None:
        self.hidden = self.output(block, number)

    def run(self, block: nn.Module, number: int) -> None:
        self.output(block, number)

    def output(self, block: nn.Module, number: int) -> Tensor:
        rest, options = self.arguments[number]
        out = block(self.hidden, *rest, **options)
        return out[0] if isinstance(out, tuple) else out


def blocks(model: nn.Module) -> nn.ModuleList:
    """The decoder's blocks in order; CatsError where the model keeps them elsewhere."""
    layers = getattr(model.get_decoder(), "layers", None) if hasattr(model, "get_decoder") else None
    if not isinstance(layers, nn.ModuleList):
        raise CatsError(
            f"Pruning does not apply to {type(model).__name__}: its decoder has no list of layers."
        )
    return layers


def _linears(block: nn.Module) -> dict[str, nn.Linear]:
    return {name: module for name, module in block.named_modules() if isinstance(module, nn.Linear)}


def block_inputs(model: nn.Module, blocks: nn.ModuleList, batches) -> list[State]:
    """Hidden states before the first block, and the arguments with which the model calls each block."""
    states: list[State] = []
    calls: list[tuple[tuple, dict]] = []

    def note(module, args, kwargs):
        calls.append((args, kwargs))

    hooks = [block.register_forward_pre_hook(note, with_kwargs=True) for block in blocks]
    try:
        for batch in batches:
            calls.clear()
            ids = batch["input_ids"].to(model.device)
            valid = batch["attention_mask"].to(model.device)
            model.get_decoder()(input_ids=ids, attention_mask=valid, use_cache=False)
            options = [
                (args[1:], {k: v for k, v in kwargs.items() if k != "hidden_states"})
                for args, kwargs in calls
            ]
            first = calls[0][0][0] if calls[0][0] else calls[0][1]["hidden_states"]
            states.append(State(first, valid.bool().cpu(), options))
    finally:
        for hook in hooks:
            hook.remove()
    return states


def _norms(block: nn.Module, states: list[State], number: int) -> dict[str, Tensor]:
    """Root of the sum of squares of every input of each linear layer of a block, over valid tokens."""
    sums: dict[str, Tensor] = {}
    current: list[State] = []

    def watch(name: str):
        def hook(module, args, output):
            x = args[0].reshape(-1, args[0].shape[-1])[current[0].valid.reshape(-1)].float()
            sums[name] = sums.get(name, 0) + x.pow(2).sum(0)

        return hook

    hooks = [linear.register_forward_hook(watch(name)) for name, linear in _linears(block).items()]
    try:
        for state in states:
            current[:] = [state]
            state.run(block, number)
    finally:
        for hook in hooks:
            hook.remove()
    return {name: total.sqrt() for name, total in sums.items()}


def _prune(weight: Tensor, score: Tensor, sparsity: float, by_row: bool) -> None:
    """Zero the lowest scores, in place: the same number in every row, or over the whole matrix."""
    flat = score if by_row else score.reshape(1, -1)
    count = int(sparsity * flat.shape[1])
    lowest = flat.argsort(dim=1, stable=True)[:, :count]
    drop = torch.zeros_like(flat, dtype=torch.bool).scatter_(1, lowest, True)
    weight.masked_fill_(drop.reshape(weight.shape), 0)


def _tokens(batches) -> int:
    return sum(int(batch["attention_mask"].sum()) for batch in batches)
