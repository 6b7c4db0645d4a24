"""The MLP of rule `centred` (`cats.criteria.centred`) as a model keeps it, decodes with it and saves it."""

import torch
from cats_kernels.centred import at_centres, centred_mlp
from torch import Tensor, nn

from cats.activation import CatsMLP, Layout, cats, unrounded
from cats.errors import CatsError


class CentredMLP(CatsMLP):
    """y = x A + (z - c where |z - c| >= t, else 0) * (x W_up) W_down, with z = act(x W_gate).

    Buffers: `threshold` and `centre` [m] in fp32; `shared` [d, d], A of the rule, in the weights' dtype.
    Every token is masked. Whatever watches or replaces the activations of a CatsMLP is refused: those belong
    to the dense model.
    """

    _exact = (*CatsMLP._exact, "centre")

    def __init__(self, dense: nn.Module, layout: Layout, *, prefill: str = "masked"):
        if prefill != "masked":
            raise CatsError(f"The rule centred masks every token: prefill={prefill!r} is not for it.")
        super().__init__(dense, layout)
        weight = getattr(self, layout.gate).weight
        m, d, device = self.intermediate_size, self.hidden_size, weight.device
        self.threshold = torch.zeros(m, dtype=torch.float32, device=device)
        self.register_buffer("centre", torch.zeros(m, dtype=torch.float32, device=device))
        self.register_buffer("shared", torch.zeros(d, d, dtype=weight.dtype, device=device))

    def __setattr__(self, name: str, value) -> None:
        if name in ("observer", "combine") and value is not None:
            raise CatsError(
                "This model has the rule centred built in, which can be run and saved but not watched or "
                "trained: cats.restore it, and measure the dense model with the rule."
            )
        super().__setattr__(name, value)

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., d] → y: [..., d]; one token on a GPU by the kernel, all others by dense products."""
        if x.is_cuda and x.numel() == self.hidden_size and self.reads_survivors_only(x):
            y = centred_mlp(
                x.reshape(1, -1),
                *(self.w_gate, self.w_up, self.w_down_t),
                *(self.shared, self.centre, self.threshold),
                self.activation,
            )
            return y.view(x.shape)
        gate, up = self._gate_up(x)
        z = self.gate_act(gate)
        away = unrounded(self.gate_act, gate, z) - self.centre
        kept = cats(z - self.centre.to(z.dtype), self.threshold, away)
        return getattr(self, self.layout.down)(kept * up) + x @ self.shared

    @torch.no_grad()
    def set(self, threshold: Tensor, centre: Tensor, more: Tensor | None = None) -> None:
        """Thresholds and centres [m] of the rule; A is computed from the weights, in fp32, and `more` [d, d]
        added to it."""
        self.threshold.copy_(threshold)
        self.centre.copy_(centre)
        shared = at_centres(self.w_up, self.w_down_t, self.centre)
        self.shared.copy_(shared if more is None else shared + more)
