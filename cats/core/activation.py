"""The CATS activation (paper eq. 5) and the gated MLP that applies it."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from cats_kernels import MAX_ROWS, cats_mlp, crossover
from torch import Tensor, nn

from cats.errors import CatsError

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
}

PREFILL = ("masked", "dense")
# Most tokens a call of the sparse kernel, by device; on a CPU it paid at every number of rows up to four.
ROWS = {"cuda": MAX_ROWS, "cpu": 4}

# Other names of the same functions in Transformers' `hidden_act`.
_ALIASES = {
    "swish": "silu",
    "gelu_python": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_accurate": "gelu_tanh",
    "gelu_python_tanh": "gelu_tanh",
}


def activation_name(act: str | Callable[[Tensor], Tensor]) -> str:
    """The key of ACTIVATIONS for a Transformers `hidden_act` or for an activation module or function.

    A callable is recognised by its values, not by its class. Raises CatsError for any other function.
    """
    if isinstance(act, str):
        name = _ALIASES.get(act, act)
        if name in ACTIVATIONS:
            return name
    else:
        # float64: the two GELUs differ by up to 5e-4, two spellings of one function by less than 1e-6
        probe = torch.linspace(-8, 8, 257, dtype=torch.float64, device="cpu")
        try:
            with torch.no_grad():
                values = act(probe.clone())
            for name, known in ACTIVATIONS.items():
                if values.shape == probe.shape and torch.allclose(values, known(probe), rtol=0, atol=1e-5):
                    return name
        except (RuntimeError, TypeError, ValueError, AttributeError):
            pass  # it has parameters elsewhere or wants other arguments: not one of ours
    shown = act if isinstance(act, str) else getattr(act, "__name__", type(act).__name__)
    raise CatsError(f"The activation {shown!r} is not supported: CATS here knows {', '.join(ACTIVATIONS)}.")


def cats(
    z: Tensor, threshold: Tensor | float, exact: Tensor | None = None, centre: Tensor | None = None
) -> Tensor:
    """CATS_t(z), paper eq. 5: z where |z| >= t or z is NaN, else 0; around a `centre`, as `dropped`, else c.

    z: [..., m], any floating dtype; threshold: fp32, [] or [m] (one per neuron). The comparison is made in
    fp32 (fp64 for fp64 z), with `exact` in place of z where given (see `unrounded`). The gradient is that of
    a constant mask: exactly zero where z was masked, none to the threshold.
    """
    return replaced(z, dropped(z if exact is None else exact, threshold, centre), centre)


def dropped(exact: Tensor, threshold: Tensor | float, centre: Tensor | None = None) -> Tensor:
    """Which of z [..., m] the mask drops, bool: |z| < t, or with a centre c, fp32 [m], |z - c| < t."""
    threshold = torch.as_tensor(threshold, dtype=torch.float32, device=exact.device).detach()
    away = exact.detach() if centre is None else exact.detach() - centre
    # at least one dimension: PyTorch would otherwise round t to the dtype of z before comparing
    return away.abs() < threshold.reshape(-1)


def replaced(z: Tensor, drop: Tensor, centre: Tensor | None = None) -> Tensor:
    """z [..., m] with what is dropped set to zero, or to its centre."""
    return z.masked_fill(drop, 0) if centre is None else torch.where(drop, centre.to(z.dtype), z)


def unrounded(act: Callable[[Tensor], Tensor], gate: Tensor, z: Tensor) -> Tensor:
    """act(gate) to compare with a threshold: fp32 where gate [..., m] has 16 bits, else z = act(gate) itself.

    Rounded to bf16, 5 % of a layer's SiLU values are one number, just below its minimum's magnitude 0.278: no
    threshold could drop a share in between. The decode kernels compare in fp32 too.
    """
    if gate.dtype not in (torch.bfloat16, torch.float16):
        return z.detach()
    with torch.no_grad():
        return act(gate.float())


class Layout(NamedTuple):
    """Where a gated MLP keeps its parts: names of its children, the activation, and its key in ACTIVATIONS.

    Fused: `gate` == `up` is one Linear of 2m rows, of which half number `gate_half` is the gate.
    """

    gate: str
    up: str
    down: str
    act: Callable[[Tensor], Tensor] | str
    activation: str
    gate_half: int = 0

    @property
    def fused(self) -> bool:
        return self.gate == self.up


class CatsMLP(nn.Module):
    """A gated MLP y = (CATS_t(act(x W_gate)) * (x W_up)) W_down; holds the children of the one it replaces.

    `threshold`: fp32 buffer, [] or [m], which stays fp32 when the model is cast. `prefill`: "masked" masks
    every token (the paper), "dense" leaves prompts unmasked (`cats.core.prefill`). `observer`,
    when set, is called with z = act(x W_gate) (in fp32 for 16-bit models) and x W_up, both [..., m], before
    masking. `combine`, when set, computes CATS_t(act(gate)) * up from gate and up, [..., m], instead of this
    module: `cats.criteria.masking` counts and applies its policies there.
    """

    _exact = ("threshold",)
    overhead = 0.0  # what every token reads on top of surviving rows, as a share of all rows of up and down

    def __init__(self, dense: nn.Module, layout: Layout, *, prefill: str = "masked"):
        super().__init__()
        # in a tuple, so that it is not a submodule: its parameters would be counted and saved twice
        self._dense = (dense,)
        self.down_stride = getattr(dense, layout.down).weight.stride()
        self.layout = layout
        self.activation = layout.activation
        self.prefill = prefill
        self.reading_prompt: bool | None = None  # None: not known, see cats.core.prefill
        self.observer: Callable[[Tensor, Tensor], None] | None = None
        self.combine: Callable[[Tensor, Tensor], Tensor] | None = None
        for name, child in dense.named_children():
            if name == layout.act and hasattr(self, name):  # a name of ours: called from the layout instead
                self.layout = layout._replace(act=child)
            else:
                self.add_module(name, child)
        gate = getattr(self, layout.gate)
        self.intermediate_size = gate.out_features // (2 if layout.fused else 1)
        self.hidden_size = gate.in_features
        self.sparsity = 0.0  # the gate sparsity that the threshold was set for
        self.register_buffer("threshold", torch.zeros((), dtype=torch.float32, device=gate.weight.device))
        self.train(dense.training)

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., d] → y: [..., d].

        Few tokens at a time, as in decoding, take `cats_kernels.cats_mlp`, which reads surviving rows only;
        all others, and whatever needs gradients or the activations, dense products with the mask.
        """
        if self.reads_survivors_only(x):
            y = cats_mlp(
                x.reshape(-1, self.hidden_size),
                self.w_gate,
                self.w_up,
                self.w_down_t,
                self.threshold,
                self.activation,
            )
            return y.view(x.shape)
        gate, up = self._gate_up(x)
        if self.combine is not None:
            return getattr(self, self.layout.down)(self.combine(gate, up))
        act = self.gate_act
        z = act(gate)
        masks = self.masks(z)
        if masks or self.observer is not None:
            exact = unrounded(act, gate, z)
            if self.observer is not None:
                self.observer(exact, up)
            if masks:
                z = cats(z, self.threshold, exact)
        return getattr(self, self.layout.down)(z * up)

    def reads_survivors_only(self, x: Tensor) -> bool:
        """Whether a call with x [..., T, d] is one for the sparse kernel, and one that it is faster for."""
        rows = x.numel() // self.hidden_size
        if torch.is_grad_enabled() or self.observer is not None or self.combine is not None:
            return False
        if not 1 <= rows <= ROWS.get(x.device.type, 0) or not self.masks(x):
            return False
        parts = {getattr(self, name) for name in (self.layout.gate, self.layout.up, self.layout.down)}
        act = self.gate_act
        return (
            all(_is_plain(part, x) for part in parts)
            and not (isinstance(act, nn.Module) and is_hooked(act))
            and self.w_down_t.is_contiguous()
            and not torch.is_autocast_enabled(x.device.type)
            and 0 < self.sparsity  # at 0 the layer stays the dense one, bit for bit
            and (x.device.type == "cpu" or crossover.sparse_pays(rows, self.sparsity, self.hidden_size))
        )

    def masks(self, x: Tensor) -> bool:
        """Whether a call with x [..., T, ·] masks: not where `prefill` is "dense" and it reads a prompt."""
        if self.prefill == "masked":
            return True
        several = x.ndim > 1 and x.shape[-2] > 1
        return not (several if self.reading_prompt is None else self.reading_prompt)

    def _gate_up(self, x: Tensor) -> tuple[Tensor, Tensor]:
        gate = getattr(self, self.layout.gate)(x)
        if not self.layout.fused:
            return gate, getattr(self, self.layout.up)(x)
        halves = gate.chunk(2, dim=-1)
        return halves[self.layout.gate_half], halves[1 - self.layout.gate_half]

    @property
    def gate_act(self) -> Callable[[Tensor], Tensor]:
        """The model's own activation, a module or a function."""
        act = self.layout.act
        return getattr(self, act) if isinstance(act, str) else act

    @property
    def dense(self) -> nn.Module:
        """The module that this one replaces, which shares its children."""
        return self._dense[0]

    @property
    def w_gate(self) -> Tensor:
        """[m, d], a view of the weight (without a wrapped adapter's part)."""
        return self._rows(self.layout.gate, self.layout.gate_half)

    @property
    def w_up(self) -> Tensor:
        """[m, d], a view of the weight (without a wrapped adapter's part)."""
        return self._rows(self.layout.up, 1 - self.layout.gate_half)

    @property
    def w_down_t(self) -> Tensor:
        """[m, d], a view of the weight, contiguous because `sparsify` stores W_down by its columns."""
        return getattr(self, self.layout.down).weight.t()

    def _rows(self, name: str, half: int) -> Tensor:
        weight = getattr(self, name).weight
        return weight.chunk(2)[half] if self.layout.fused else weight

    def _apply(self, fn, recurse=True):
        kept = {name: getattr(self, name) for name in self._exact}
        super()._apply(fn, recurse)
        for name, before in kept.items():
            after = getattr(self, name)
            if after.dtype != torch.float32:  # .half(), .to(bfloat16): move with the model, stay exact
                exact = before.to(after.device) if before.device.type != "meta" else after.float()
                setattr(self, name, exact)
        return self

    def extra_repr(self) -> str:
        return f"activation={self.activation}, prefill={self.prefill}, threshold={list(self.threshold.shape)}"


def _is_plain(linear: nn.Module, x: Tensor) -> bool:
    """Whether the kernel may read this weight in place of calling the module: no adapter, bias or hook."""
    return (
        type(linear) is nn.Linear
        and linear.bias is None
        and type(linear.weight) is nn.Parameter
        and linear.weight.dtype == x.dtype
        and linear.weight.device == x.device
        and not is_hooked(linear)
    )


def is_hooked(module: nn.Module) -> bool:
    """Whether something waits for calls of the module, which then has to be called."""
    return bool(module._forward_hooks or module._forward_pre_hooks or hasattr(module, "_hf_hook"))
