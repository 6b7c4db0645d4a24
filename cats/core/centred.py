"""The MLP of rule `centred` (`cats.criteria.centred`) as a model keeps it, decodes with it and saves it."""

import torch
from cats_kernels.centred import at_centres, centred_mlp
from torch import Tensor, nn

from cats.core.activation import CatsMLP, Layout, cats, unrounded
from cats.errors import CatsError


class CentredMLP(CatsMLP):
    """y = x A + (z - c where |z - c| >= t, else 0) * (x W_up) W_down, with z = act(x W_gate).

    Buffers: `threshold` and `centre` [m] in fp32; `shared` [d, d], A of the rule, in the weights' dtype.
    Every token is masked. Whatever watches or replaces the activations of a CatsMLP is refused: those belong
    to the dense model. Unfolded, for training, it computes the same from the weights alone: c in place of z
    where it is near. Then it can be watched, an observer seeing z - c.
    """

    _exact = (*CatsMLP._exact, "centre")
    folded = True

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
        if name in ("observer", "combine") and value is not None and self.folded:
            raise CatsError(
                "This model has the rule centred built in, which can be run and saved but not watched or "
                "trained: cats.restore it, and measure or fine-tune the dense model by the rule."
            )
        super().__setattr__(name, value)

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., d] → y: [..., d]; one token on a GPU by the kernel, all others by dense products."""
        if self.folded and x.is_cuda and x.numel() == self.hidden_size and self.reads_survivors_only(x):
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
        if self.folded:
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
        """Compute without A, which is that of the weights as they are, until `fold`."""
        self.folded = False

    def fold(self) -> None:
        """Compute by A again, made anew from the weights."""
        self.folded = True
        self.set(self.threshold, self.centre)

    @torch.no_grad()
    def set(self, threshold: Tensor, centre: Tensor, added: Tensor | None = None) -> None:
        """Thresholds and centres [m]; A is computed from the weights, in fp32, plus `added` [d, d]."""
        self.threshold.copy_(threshold)
        self.centre.copy_(centre)
        shared = at_centres(self.w_up, self.w_down_t, self.centre)
        self.shared.copy_(shared if added is None else shared + added)
