"""Static pruning of weights block by block, as the reference code of Wanda does it, and its undoing."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from cats.calibration.blocks import BatchState, block_inputs, blocks
from cats.core.accounting import Accounting
from cats.criteria.rule import Fit, Rule, corpus_of, register
from cats.errors import CatsError


@dataclass
class PrunedFit(Fit):
    """Weights set to zero once and for all, the share `sparsity` of every linear layer of the blocks.

    `score(weight [n, k], norms [k]) -> [n, k]`, lowest pruned, over each row where `by_row`; `norms` are
    those of the layer's inputs over `batches` of the text `corpus`, with the blocks before pruned already.
    """

    rule: str
    score: Callable[[Tensor, Tensor], Tensor]
    batches: list
    corpus: dict
    by_row: bool = True
    progress: bool = True
    _dense: dict[tuple[int, str], Tensor] = field(default_factory=dict, init=False)

    @torch.no_grad()
    def apply(self, model: nn.Module, sparsity: float) -> nn.Module:
        if self._dense:
            raise CatsError("The weights are pruned already: undo that first.")
        if not 0 <= sparsity < 1:
            raise CatsError(f"Sparsity {sparsity!r} is outside [0, 1): it is the share of weights to drop.")
        layers = blocks(model)
        states = block_inputs(model, layers, self.batches) if self.batches else []
        bar = tqdm(layers, desc="pruning", unit="block", disable=None if self.progress else True)
        for number, block in enumerate(bar):
            norms = _norms(block, states, number)
            for name, linear in _linears(block).items():
                self._dense[number, name] = linear.weight.detach().to("cpu", copy=True)
                _prune(
                    linear.weight, self.score(linear.weight.float(), norms.get(name)), sparsity, self.by_row
                )
            for state in states:
                state.advance(block, number)
        return model

    @torch.no_grad()
    def undo(self, model: nn.Module) -> nn.Module:
        layers = blocks(model)
        for (number, name), weight in self._dense.items():
            _linears(layers[number])[name].weight.copy_(weight)
        self._dense.clear()
        return model

    def gate_sparsity(self, sparsity):
        return None

    def model_sparsity(self, shape: Accounting, sparsity: float) -> float:
        return sparsity

    def bytes_per_token(self, shape: Accounting, sparsity: float, bytes_per_weight: float = 2) -> float:
        """Of the weights that are left; where they are comes on top, in any format for unstructured zeros."""
        return (shape.block_weights * (1 - sparsity) + shape.head_weights) * bytes_per_weight

    def describe(self) -> dict:
        return {"criterion": "static weights", "corpus": self.corpus, "tokens": _tokens(self.batches)}


def _linears(block: nn.Module) -> dict[str, nn.Linear]:
    return {name: module for name, module in block.named_modules() if isinstance(module, nn.Linear)}


def _norms(block: nn.Module, states: list[BatchState], number: int) -> dict[str, Tensor]:
    """Root of the sum of squares of every input of each linear layer of a block, over valid tokens."""
    sums: dict[str, Tensor] = {}
    current: list[BatchState] = []

    def watch(name: str):
        def hook(module, args, output):
            x = args[0].reshape(-1, args[0].shape[-1])[current[0].valid.reshape(-1)].float()
            sums[name] = sums.get(name, 0) + x.pow(2).sum(0)

        return hook

    hooks = [linear.register_forward_hook(watch(name)) for name, linear in _linears(block).items()]
    try:
        for state in states:
            current[:] = [state]
            state.output(block, number)
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


@register
class Wanda(Rule):
    """The rule `wanda` (arXiv 2306.11695): zeroes static weights of small |w| times input norm.

    The paper's rebuttal compares CATS with it.
    """

    name = "wanda"
    title = "Wanda (static weights)"
    what = (
        "the weights of lowest |W| times the norm of their input are zero, in each row of every linear layer"
    )
    thresholds = trains = False

    def check(self, model) -> None:
        blocks(model)

    def max_model_sparsity(self, shape):
        return 1.0

    def calibrate(self, model, batches, *, source=None, progress=True) -> PrunedFit:
        return PrunedFit(
            self.name,
            lambda weight, norms: weight.abs() * norms,
            batches=list(batches),
            corpus=corpus_of(source),
            progress=progress,
        )


@register
class Magnitude(Rule):
    """The rule `magnitude`: zeroes the smallest static weights; no activation is masked."""

    name = "magnitude"
    title = "Magnitude (static weights)"
    what = "the weights of lowest magnitude are zero, in every linear layer"
    thresholds = trains = False

    def check(self, model) -> None:
        blocks(model)

    def max_model_sparsity(self, shape):
        return 1.0

    def calibrate(self, model, batches=(), *, source=None, progress=True) -> PrunedFit:
        return PrunedFit(
            self.name,
            lambda weight, norms: weight.abs(),
            batches=[],
            corpus={},
            by_row=False,
            progress=progress,
        )
