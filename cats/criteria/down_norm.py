"""Scores weighted by what a neuron can write: the norm of its row of W_down, as Wanda weighs inputs."""

import torch

from cats.core.structure import find_gated_mlps
from cats.criteria.rule import WeightedRule, register


@register
class DownNorm(WeightedRule):
    """The rule `down-norm`: weights [L, m] are the norms of the rows of W_down transposed."""

    name = "down-norm"
    title = "CATS x |W_down|"
    what = "score |z| times the norm of the neuron's row of W_down, one threshold a layer on the score"

    def weights(self, model, batches, progress):
        return down_norms(model)


def down_norms(model) -> torch.Tensor:
    """Euclidean norms of the rows of W_down [m, d], fp32 [L, m], of a model whose layers have one m."""
    mlps = find_gated_mlps(model)
    norms = [mlp.module.get_submodule(mlp.layout.down).weight.detach().float().norm(dim=0) for mlp in mlps]
    return torch.stack([norm.cpu() for norm in norms])
