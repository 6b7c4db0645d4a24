"""TEAL's block-wise greedy allocation (arXiv 2408.14690) for any rule that drops inputs.

Every block has the same model-level sparsity. Inside it, the Linear that adds least to the error of the
block's output gets the next step, until the block has its sparsity. Steps are sized by the weights of each
Linear as built: the released code's fixed table makes k and v of Llama-2-7B an eighth of q, where they are as
large, and those of Mistral-7B an eighth where they are a quarter. Ambiguous in the source: the step (here 2 %
of a block's weights, and at most a tenth of one Linear's inputs, which small k and v would overshoot), what
a block reads (here what it reads in the dense model), how unequal steps compare (here by the error that
they add for each weight dropped, which for equal steps is the source's rule) and on which tokens: the code
searches with the last half of a sequence masked, by the mean over channels of the error's norm on the last
quarter; here all tokens are masked and one norm is taken over them all.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from cats.calibration.blocks import BatchState, block_inputs, blocks
from cats.criteria.sited import BlockLinear, InputRule, block_linears

_TOKENS = 1024  # of calibration text on which errors are measured
_STEP = 0.02  # of a block's weights: some 10,000 forwards of a block for 28 of them, about as many as TEAL's
_MOST = 0.1  # of one Linear's inputs in a step
_CAP = 0.99  # of one Linear's inputs in all


@dataclass
class Path:
    """How shares of the Linears of one block grow: `sizes` are their weights, points are (level, shares)."""

    sizes: Sequence[int]
    points: list[tuple[float, list[float]]] = field(default_factory=list)

    def __post_init__(self):
        self.points = self.points or [(0.0, [0.0] * len(self.sizes))]

    def at(self, level: float, error: Callable[[list[float]], float]) -> list[float]:
        """Shares of mean `level` in [0, 1) over weights; `error(shares)` decides about further steps."""
        while self.points[-1][0] < level and self.extend(error):
            pass
        for (low, before), (high, after) in zip(self.points, self.points[1:], strict=False):
            if level <= high:
                part = (level - low) / (high - low)
                return [a + part * (b - a) for a, b in zip(before, after, strict=True)]
        return [max(level, share) for share in self.points[-1][1]]

    def extend(self, error: Callable[[list[float]], float]) -> bool:
        """Add the cheapest step; False where every Linear is at its cap."""
        level, shares = self.points[-1]
        before, total = error(shares), sum(self.sizes)
        best = None
        for number, size in enumerate(self.sizes):
            step = min(_STEP * total / size, _MOST, _CAP - shares[number])
            if step < 1e-6:
                continue
            tried = [*shares[:number], shares[number] + step, *shares[number + 1 :]]
            price = (error(tried) - before) / (step * size)
            if best is None or price < best[0]:
                best = (price, level + step * size / total, tried)
        if best is not None:
            self.points.append(best[1:])
        return best is not None


@dataclass
class GreedyState:
    """`inner`: what the rule of inputs measured; `sample`: the text that errors are measured on."""

    inner: Any
    sample: dict[str, Tensor]
    progress: bool
    paths: dict[int, Path] = field(default_factory=dict)


class GreedyRule(InputRule):
    """The rule `base` with shares of its own for each Linear of a block, allocated greedily."""

    base: InputRule

    def check(self, model: nn.Module) -> None:
        self.base.check(model)

    def measure(self, model: nn.Module, batches, progress: bool) -> GreedyState:
        first = next(iter(batches))
        rows = max(1, _TOKENS // first["input_ids"].shape[1])
        sample = {key: value[:rows, :_TOKENS] for key, value in first.items()}
        return GreedyState(self.base.measure(model, batches, progress), sample, progress)

    def keep(self, linear: BlockLinear, state: GreedyState, share: float) -> Callable:
        return self.base.keep(linear, state.inner, share)

    @torch.no_grad()
    def shares(self, model: nn.Module, state: GreedyState, sparsity: float) -> dict[tuple[int, str], float]:
        layers = blocks(model)
        (sample,) = block_inputs(model, layers, [state.sample])
        linears: dict[int, list[BlockLinear]] = {}
        for linear in block_linears(model):
            linears.setdefault(linear.layer, []).append(linear)
        result = {}
        bar = tqdm(layers, desc="allocating", unit="block", disable=None if state.progress else True)
        for number, block in enumerate(bar):
            here = linears[number]
            path = state.paths.setdefault(number, Path([linear.module.weight.numel() for linear in here]))
            shares = path.at(sparsity, self.error(block, number, here, sample, state))
            result.update({linear.key: share for linear, share in zip(here, shares, strict=True)})
            sample.advance(block, number)
        return result

    def error(
        self,
        block: nn.Module,
        number: int,
        linears: list[BlockLinear],
        sample: BatchState,
        state: GreedyState,
    ) -> Callable[[list[float]], float]:
        """From shares to the norm of what they change in the block's output, over valid tokens."""
        dense = sample.output(block, number)[sample.valid].float()

        def error(shares: list[float]) -> float:
            sites = [
                self.site(linear, state, share)
                for linear, share in zip(linears, shares, strict=True)
                if share > 0
            ]
            for site in sites:
                site.attach()
            try:
                return float((sample.output(block, number)[sample.valid].float() - dense).norm())
            finally:
                for site in sites:
                    site.detach()

        return error
