"""The MLP of rule `centred` (`cats.criteria.centred`) as a model keeps it, decodes with it and saves it."""

import torch
from cats_kernels.centred import at_centres, centred_mlp
from torch import Tensor, nn

from cats.core.activation import CatsMLP, Layout, cats, unrounded
from cats.errors import CatsError

# In what config.json says of a calibration: how A was fitted (rule `refit-centred`).
FITTED = "a"


class CentredMLP(CatsMLP):
    """y = (z where |z - c| >= t, else c) * (x W_up) W_down, with z = act(x W_gate).

    Buffers: `threshold` and `centre` [m] in fp32; `shared` [d, d], A of the rule, in the weights' dtype. The
    kernel reads A in place of the neurons at their centres: y = x A + ((z - c where kept) * (x W_up)) W_down.
    Dense products need no A, and follow adapters and training. Every token is masked. An observer sees z - c.

    `fitted`: A holds more than the centres (rule `refit-centred`), so that every call needs it. Such a module
    can be run and saved, not watched or trained. `folded`: A is that of the weights as they are; it is made
    anew before the kernel reads it, after `train()` or a change of the projections. Call `unfold` where the
    weights change otherwise.
    """

    _exact = (*CatsMLP._exact, "centre")
    folded = True
    fitted = False

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
        if name in ("observer", "combine") and value is not None and self.fitted:
            raise CatsError(
                "This model has the rule refit-centred built in, which can be run and saved but not watched "
                "or trained: cats.restore it, and measure or fine-tune the dense model by the rule."
            )
        super().__setattr__(name, value)
        if isinstance(value, nn.Module) and name in (self.layout.up, self.layout.down):
            self.folded = False  # an adapter comes or goes, perhaps merged into the weights

    def train(self, mode: bool = True) -> "CentredMLP":
        super().train(mode)
        if mode:
            self.folded = False
        return self

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., d] → y: [..., d]; one token on a GPU by the kernel, all others by dense products."""
        if x.is_cuda and x.numel() == self.hidden_size and self.reads_survivors_only(x):
            if not self.folded and not self.fitted:
                self.fold()
            y = centred_mlp(
                x.reshape(1, -1),
                *(self.w_gate, self.w_up, self.w_down_t),
                *(self.shared, self.centre, self.threshold),
                self.activation,
            )
            return y.view(x.shape)
        down = getattr(self, self.layout.down)
        gate, up = self._gate_up(x)
        if self.combine is not None:
            return down(self.combine(gate, up))
        z = self.gate_act(gate)
        exact = unrounded(self.gate_act, gate, z)
        if self.fitted:
            kept = cats(z - self.centre.to(z.dtype), self.threshold, exact - self.centre)
            return down(kept * up) + x @ self.shared
        if self.observer is not None:
            self.observer(exact - self.centre, up)
        if self.masks(x):
            z = cats(z, self.threshold, exact, self.centre)
        return down(z * up)

    @property
    def overhead(self) -> float:
        return self.hidden_size / (2 * self.intermediate_size)

    def unfold(self) -> None:
        """Say that the weights change: A is made anew when it is needed."""
        self.folded = False

    def fold(self) -> None:
        """Make A anew from the weights as they are."""
        self.set(self.threshold, self.centre)

    @torch.no_grad()
    def set(self, threshold: Tensor, centre: Tensor, added: Tensor | None = None) -> None:
        """Thresholds and centres [m]; A is computed from the weights, in fp32, plus `added` [d, d]."""
        self.threshold.copy_(threshold)
        self.centre.copy_(centre)
        shared = at_centres(self.w_up, self.w_down_t, self.centre)
        self.shared.copy_(shared if added is None else shared + added.to(shared))
        self.folded, self.fitted = not self.training, added is not None
