"""Which tokens are masked while a model is evaluated, and how much of each phase that really zeroed."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import lru_cache, partial

import torch
from torch import Tensor, nn

from cats.activation import ACTIVATIONS, PREFILL, CatsMLP, cats, unrounded
from cats.errors import CatsError
from cats.structure import places

PHASES = ("prefill", "decode")


@dataclass(frozen=True)
class Policy:
    """Which tokens a mask applies to; the default is the paper's, every one.

    `prefill`: "dense" leaves the prompt alone (log-likelihood tasks are then dense altogether).
    `first_token`: "dense" leaves the first token of a sequence alone, BOS where there is one. `last_share`:
    only the last share of the prompt, in (0, 1], is masked, as some later papers evaluate. Raises CatsError
    for anything else.
    """

    prefill: str = "masked"
    first_token: str = "masked"
    last_share: float = 1.0

    def __post_init__(self):
        for name in ("prefill", "first_token"):
            if getattr(self, name) not in PREFILL:
                raise CatsError(
                    f"{name}={getattr(self, name)!r} is unknown: use one of {', '.join(PREFILL)}."
                )
        if not 0 < self.last_share <= 1:
            raise CatsError(
                f"last_share={self.last_share} is outside (0, 1]: it is the masked share of a prompt."
            )

    def describe(self) -> dict:
        return asdict(self)

    def chosen(self, valid: Tensor, before: Tensor | int = 0) -> Tensor | None:
        """The tokens of a prompt that are masked, [B, T] bool, None for all; `valid` [B, T] leaves padding
        out.

        `before`, [B, 1] or a number: tokens of the same prompts that an earlier call has read.
        """
        if self.prefill == "dense":
            return torch.zeros_like(valid)
        place = valid.cumsum(1) - 1 + before  # 0 at the first token, whichever side the padding is on
        masked = None
        if self.first_token == "dense":
            masked = place > 0
        if self.last_share < 1:
            total = valid.sum(1, keepdim=True) + before
            late = place >= total - torch.ceil(self.last_share * total)
            masked = late if masked is None else masked & late
        return masked


class Masking:
    """Context manager: the sparse MLPs of `model` mask under `policy`, and are counted, with no
    synchronisation.

    Announce each call by `begin`; without that every token is valid, and a call of one token a sequence is
    decode. `hold` [L]: gate sparsities that the thresholds are steered to while the model runs (see
    `cats.criteria.online`). A dense model may be given: nothing is masked and no sparsity is realised.
    """

    def __init__(self, model: nn.Module, policy: Policy | None = None, *, steer: Callable | None = None):
        self.model = model
        self.modules: list[CatsMLP] = [module for _, _, module in places(model)]
        self.policy = policy or Policy()
        self.steer = steer
        self._phase: str | None = None
        self._valid: Tensor | None = None
        self._masked: Tensor | None = None
        self._rows: list[Tensor] | None = None
        self.reset()

    def reset(self) -> None:
        """Forget what was counted."""
        layers = len(self.modules)
        device = self.modules[0].threshold.device if layers else "cpu"
        self._zeroed = {phase: torch.zeros(layers, dtype=torch.int64, device=device) for phase in PHASES}
        self._tokens = {phase: torch.zeros(layers, dtype=torch.int64, device=device) for phase in PHASES}

    def __enter__(self):
        if any(module.combine is not None for module in self.modules):
            raise CatsError("This model is inside another Masking: leave that one first.")
        for layer, module in enumerate(self.modules):
            module.combine = partial(self._combine, layer, module)
        return self

    def __exit__(self, *_):
        for module in self.modules:
            module.combine = None

    def begin(self, phase: str, valid: Tensor, *, before: Tensor | int = 0) -> None:
        """Announce the next call of the model: `valid` [B, T] bool, False for padding; `before` as
        Policy.chosen.
        """
        self._phase, self._valid = phase, valid
        self._masked = None
        if phase == "prefill" and self.policy != Policy():
            self._masked = self.policy.chosen(valid, before)

    def start_rows(self) -> None:
        """Keep what decoding zeroes by row, uncounted, until `count_rows`: rows end before their batch
        does.
        """
        self._rows = []

    def count_rows(self, lengths: Tensor) -> None:
        """Count the first `lengths` [B] decoding steps of each row since `start_rows`."""
        rows, self._rows = self._rows, None
        if rows:
            zeroed = torch.stack(rows).unflatten(0, (-1, len(self.modules)))  # [steps, L, B]
            steps = torch.arange(len(zeroed), device=zeroed.device)
            valid = steps[:, None] < lengths.to(zeroed.device)
            self._zeroed["decode"] += (zeroed * valid[:, None]).sum((0, 2))
            self._tokens["decode"] += valid.sum()

    def realised(self, gather: Callable = lambda value: [value]) -> dict[str, dict]:
        """For each phase that had tokens: tokens, gate_sparsity, and by_layer, shares of all gate
        activations.

        `gather` collects a value from every process of an evaluation.
        """
        result = {}
        for phase in PHASES:
            counts = torch.stack([self._zeroed[phase], self._tokens[phase]]).tolist()
            zeroed, tokens = torch.tensor(gather(counts), dtype=torch.float64).sum(0)
            if not self.modules or not tokens[0]:
                continue
            widths = torch.tensor([module.intermediate_size for module in self.modules])
            result[phase] = {
                "tokens": int(tokens[0]),
                "gate_sparsity": float(zeroed.sum() / (tokens * widths).sum()),
                "by_layer": [round(share, 5) for share in (zeroed / (tokens * widths)).tolist()],
            }
        return result

    def _combine(self, layer: int, module: CatsMLP, gate: Tensor, up: Tensor) -> Tensor:
        shape = gate.shape
        phase = self._phase or ("decode" if shape[-2] == 1 else "prefill")
        masked = self._masked
        if self._phase is None and phase == "prefill" and self.policy != Policy():
            everything = torch.ones(shape[:-1], dtype=torch.bool, device=gate.device).reshape(-1, shape[-2])
            masked = self.policy.chosen(everything)
        product = _product(module.activation, gate.device.type)
        h, zeroed = product(
            gate.reshape(-1, shape[-1]),
            up.reshape(-1, shape[-1]),
            module.threshold.reshape(-1),
            None if masked is None else masked.reshape(-1, 1).to(gate.device),
        )
        self._note(layer, phase, zeroed)
        if self.steer is not None:
            self.steer(layer, module, zeroed, self._valid)
        return h.reshape(shape)

    def _note(self, layer: int, phase: str, zeroed: Tensor) -> None:
        if self._rows is not None and phase == "decode":
            self._rows.append(zeroed.to(self._zeroed[phase].device, torch.int32))
            return
        home = self._zeroed[
            phase
        ].device  # another GPU's than the layer's, where a model is spread over several
        if self._valid is not None:
            valid = self._valid.reshape(-1).to(zeroed.device)
            zeroed = zeroed * valid
            self._tokens[phase][layer] += valid.sum().to(home)
        else:
            self._tokens[phase][layer] += len(zeroed)
        self._zeroed[phase][layer] += zeroed.sum().to(home)


def masked_product(activation: str, gate: Tensor, up: Tensor, threshold: Tensor, masked: Tensor | None):
    """(CATS_t(act(gate)) * up, zeros of each row): gate, up [N, m]; threshold [1] or [m]; `masked` [N, 1]
    or None.

    Rows where `masked` is False keep every activation. Zeros are counted after the mask, exact ones
    included.
    """
    z = ACTIVATIONS[activation](gate)
    kept = cats(z, threshold, unrounded(ACTIVATIONS[activation], gate, z))
    if masked is not None:
        kept = torch.where(masked, kept, z)
    return kept * up, (kept == 0).sum(-1)


@lru_cache
def _product(activation: str, device: str) -> Callable:
    """On a GPU one fused kernel: eager, mask and count would read and write z some eight times."""
    product = partial(masked_product, activation)
    if device != "cuda":
        return product
    limits = torch._dynamo.config  # one compilation for each shape of threshold, policy and kind of call
    limits.recompile_limit = max(limits.recompile_limit, 64)
    compiled = torch.compile(product)

    def fused(gate: Tensor, up: Tensor, threshold: Tensor, masked: Tensor | None):
        for tensor in (gate, up) if masked is None else (gate, up, masked):
            torch._dynamo.maybe_mark_dynamic(tensor, 0)  # the number of tokens differs from call to call
        return compiled(gate, up, threshold, masked)

    return fused
