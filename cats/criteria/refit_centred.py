"""`centred` with its matrix A fitted anew: by least squares, to what the masks take from the output.

The closed form of A stands for dropped neurons at their centres. What they do around their centres is partly
linear in x too, and a regression on x finds that part: another A, the same masks and the same bytes.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from cats.calibration.blocks import BatchState, block_inputs, blocks
from cats.calibration.centred import root_size
from cats.core.centred import FITTED
from cats.core.config import CatsConfig
from cats.core.sparsify import install
from cats.core.structure import GatedMLP, find_gated_mlps
from cats.criteria.centred import Centred, CentredFit
from cats.criteria.refit import Sums
from cats.criteria.rule import corpus_of, register
from cats.criteria.sites import Bypass, Site

RIDGE = 1.0  # of the diagonal of the second moments of x: a weaker one serves other text less well
_EVERY = 5  # every so many tokens are kept out of the fit, to choose by


@dataclass
class RefitCentredFit(CentredFit):
    """The rule `refit-centred`, calibrated on one model, and the text that every sparsity is fitted on.

    Block by block, with the blocks before sparse and fitted already; what is fitted to is what the dense MLP
    makes of the same input. A layer has centres where tokens kept out of the fit are nearer with them.
    """

    batches: list
    progress: bool = True

    @torch.no_grad()
    def sites(self, model: nn.Module, sparsity: float) -> list[Site]:
        if not sparsity:
            return []
        layers, mlps = blocks(model), find_gated_mlps(model)
        states = block_inputs(model, layers, self.batches)
        sites = []
        bar = tqdm(layers, desc="fitting A", unit="block", disable=None if self.progress else True)
        try:
            for number, block in enumerate(bar):
                inside = set(block.modules())
                for mlp in (mlp for mlp in mlps if mlp.module in inside):
                    site = self._fitted(mlp, sparsity, block, number, states)
                    site.attach()
                    sites.append(site)
                for state in states:
                    state.advance(block, number)
        finally:
            for site in sites:
                site.detach()
        return sites

    @torch.no_grad()
    def build(self, model: nn.Module, sparsity: float) -> nn.Module:
        sites = self.sites(model, sparsity)
        settings = [self.state.setting(site.layer, sparsity, site.weights_added > 0) for site in sites]
        added = [None if site.bypass is None else site.bypass.matrix.float() for site in sites]
        config = CatsConfig(sparsity, self.describe(), per="neuron")
        return install(model, find_gated_mlps(model), settings, config, added)

    def _fitted(
        self, mlp: GatedMLP, sparsity: float, block: nn.Module, number: int, states: list[BatchState]
    ) -> Site:
        """The site of one layer: with centres and a fitted A, or without, by the tokens kept out."""
        rule = self.definition
        plain = rule.site(mlp, self.state, sparsity, centred=False)
        if sparsity + self.state.centres.overhead(mlp.layer) >= 1:
            return plain
        centred = rule.site(mlp, self.state, sparsity, centred=True)
        weight = mlp.gate.weight
        sums = Sums.zeros(mlp.hidden_size, mlp.hidden_size, weight.device)
        kept_out = []
        for state in states:
            x = self._inputs(mlp, block, number, state)
            dense = mlp.module(x)
            lost = (dense - output_with(centred, mlp, x)).float()
            root = root_size(dense.float())
            out = torch.arange(len(x), device=x.device) % _EVERY == 0
            sums.add(*((part[~out] * root[~out]).to(x.dtype) for part in (x, lost)))
            without = (dense - output_with(plain, mlp, x)).float()
            kept_out.append([(part[out] * root[out]) for part in (x, lost, without)])
        added = sums.solve(RIDGE).t().contiguous()
        x, lost, without = (torch.cat(part) for part in zip(*kept_out, strict=True))
        if not _pays(lost - x.float() @ added, without):
            return plain
        centred.bypass = Bypass(mlp.module, added.to(weight.dtype))
        return centred

    @staticmethod
    def _inputs(mlp: GatedMLP, block: nn.Module, number: int, state: BatchState) -> Tensor:
        """[N, d]: what the MLP reads of the valid tokens of a batch."""
        seen = []
        handle = mlp.module.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
        try:
            state.output(block, number)
        finally:
            handle.remove()
        return seen[0].reshape(-1, mlp.hidden_size)[state.valid.reshape(-1)]

    def describe(self) -> dict:
        return super().describe() | {FITTED: "ridge regression on the input", "ridge": RIDGE}


def output_with(site: Site, mlp: GatedMLP, x: Tensor) -> Tensor:
    """What the MLP makes of x [N, d] with the site attached."""
    site.attach()
    try:
        return mlp.module(x)
    finally:
        site.detach()


def _pays(lost: Tensor, without: Tensor) -> bool:
    """Whether what is lost with centres and A is less than without them."""
    return bool(lost.pow(2).sum() < without.pow(2).sum())


@register
class RefitCentred(Centred):
    """The rule `refit-centred`."""

    name = "refit-centred"
    title = "CATS centred, fitted"
    what = (
        "`centred`, its d x d matrix by ridge regression on the input of what the masks take from the output"
    )
    trains = False  # its A is fitted to the weights as they are

    def calibrate(self, model, batches, *, source=None, progress=True) -> RefitCentredFit:
        batches = list(batches)
        self.check(model)
        state = self.measure(model, batches, progress)
        return RefitCentredFit(self, state, corpus_of(source), batches, progress)
