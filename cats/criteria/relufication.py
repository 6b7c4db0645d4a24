"""ReLUfication, the paper's baseline: ReLU in place of the activation, zeros without a threshold."""

import torch.nn.functional as F
from torch import nn

from cats.core.sparsify import store_by_columns, swap_in
from cats.core.structure import find_gated_mlps
from cats.criteria.rule import Fit, Rule, register
from cats.errors import CatsError


class ReluFit(Fit):
    """Nothing is calibrated, and `sparsity` is ignored."""

    rule = "relufication"

    def apply(self, model: nn.Module, sparsity: float | None = None) -> nn.Module:
        for module in swap_in(model, find_gated_mlps(model), prefill="masked"):
            module.layout = module.layout._replace(act=F.relu, activation="relu")
            module.activation = "relu"
            module.threshold.zero_()
            store_by_columns(module)
        return model

    def gate_sparsity(self, sparsity):
        return None

    def model_sparsity(self, shape, sparsity):
        return None

    def bytes_per_token(self, shape, sparsity, bytes_per_weight=2):
        return None

    def describe(self) -> dict:
        return {"criterion": "none: ReLU in place of the activation"}


@register
class Relufication(Rule):
    """The rule `relufication`: takes no sparsity, ReLU decides what is zero."""

    name = ReluFit.rule
    title = "ReLUfication"
    what = "ReLU in place of the activation, no threshold (the paper's baseline)"
    adjustable = False
    thresholds = False

    def check(self, model) -> None:
        if find_gated_mlps(model)[0].activation == "relu":
            raise CatsError("relufication does not apply: this model's gates are ReLU already, use cats.")

    def calibrate(self, model, batches=None, *, source=None, progress=True) -> ReluFit:
        self.check(model)
        return ReluFit()
