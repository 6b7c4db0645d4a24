"""Which tokens are masked while a model is evaluated, and how much of each phase that really zeroed."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial

import torch
from torch import Tensor, nn

from cats.core.activation import PREFILL, CatsMLP
from cats.core.structure import sparse_mlps
from cats.criteria.product import product_for
from cats.criteria.sites import Call, Site, attached
from cats.errors import CatsError

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
        """The tokens of a prompt that are masked, [B, T] bool, None for all.

        `valid` [B, T] leaves padding out; `before`, [B, 1] or a number: tokens of the same prompts that an
        earlier call has read.
        """
        if self.prefill == "dense":
            return torch.zeros_like(valid)
        position = valid.cumsum(1) - 1 + before  # 0 at the first token, whichever side the padding is on
        masked = None
        if self.first_token == "dense":
            masked = position > 0
        if self.last_share < 1:
            total = valid.sum(1, keepdim=True) + before
            late = position >= total - torch.ceil(self.last_share * total)
            masked = late if masked is None else masked & late
        return masked


class Masking:
    """Context manager in which a sparse `model` masks under `policy` and is counted, with no synchronisation.

    What masks are its sparse MLPs, or the sites of a rule that has others (`cats.criteria.sites`). Announce
    each call by `begin`, or those that read text by `announcing`; without that every token is valid, and a
    call of one token a sequence is decode. `steer(layer, module, zeroed, valid)` moves thresholds while the
    model runs (see `cats.criteria.online`). In a dense model nothing is masked and no sparsity is realised.
    """

    def __init__(self, model: nn.Module, policy: Policy | None = None, *, steer: Callable | None = None):
        self.model = model
        self.modules: list[CatsMLP | Site] = sparse_mlps(model) or attached(model)
        self.policy = policy or Policy()
        self.steer = steer
        self._phase: str | None = None
        self._valid: Tensor | None = None
        self._masked: Tensor | None = None
        self._prompt: Tensor | None = None
        self._rows: list[Tensor] | None = None
        self._noted: list[tuple[int, str, Tensor, Tensor | None]] = []
        self.reset()

    def reset(self) -> None:
        """Forget what was counted."""
        self._noted.clear()
        layers = len(self.modules)
        device = _device(self.modules[0]) if layers else "cpu"
        self._zeroed = {phase: torch.zeros(layers, dtype=torch.int64, device=device) for phase in PHASES}
        self._tokens = {phase: torch.zeros(layers, dtype=torch.int64, device=device) for phase in PHASES}
        self._sparse = {phase: torch.zeros(layers, dtype=torch.int64, device=device) for phase in PHASES}

    def __enter__(self):
        if any(module.combine is not None for module in self.modules):
            raise CatsError("This model is inside another Masking: leave that one first.")
        for layer, module in enumerate(self.modules):
            if isinstance(module, Site):
                module.combine = partial(self._keep, layer)
                module.call = self._call
            else:
                module.combine = partial(self._combine, layer, module)
        return self

    @property
    def whole_sequence(self) -> bool:
        """Whether what is masked depends on all of a sequence, so that it must be read in one call."""
        return self.policy.last_share < 1 or any(
            isinstance(module, Site) and module.whole_sequence for module in self.modules
        )

    def __exit__(self, *_):
        for module in self.modules:
            module.combine = None
            if isinstance(module, Site):
                module.call = None

    def begin(
        self,
        phase: str,
        valid: Tensor,
        *,
        before: Tensor | int = 0,
        prompt: Tensor | None = None,
        dense: bool = False,
    ) -> None:
        """Announce the next call of the model.

        `valid` [B, T] bool, False for padding; `before` as Policy.chosen; `prompt` as
        `cats.criteria.sites.Call`; `dense` masks no token of it.
        """
        self._count()
        self._phase, self._valid, self._prompt = phase, valid, prompt
        self._masked = torch.zeros_like(valid) if dense else None
        if not dense and phase == "prefill" and self.policy != Policy():
            self._masked = self.policy.chosen(valid, before)

    @contextmanager
    def announcing(self) -> Iterator[None]:
        """Announce each call of the model inside as one that reads text, by its attention mask."""

        def announce(module, args: tuple, kwargs: dict) -> None:
            self.begin("prefill", kwargs["attention_mask"].bool())

        hook = self.model.register_forward_pre_hook(announce, with_kwargs=True)
        try:
            yield
        finally:
            hook.remove()

    def start_rows(self) -> None:
        """Keep what decoding zeroes by row, uncounted, until `count_rows`: rows end before their batch."""
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
            self._sparse["decode"] += valid.sum()

    def keep_rows(self, rows: Tensor) -> None:
        """Decoding goes on with these rows [B] of its batch alone; a rule that chose for each row follows."""
        for module in self.modules:
            select = getattr(module.keep, "select", None) if isinstance(module, Site) else None
            if select is not None:
                select(rows)

    def realised(self, gather: Callable = lambda value: [value]) -> dict[str, dict]:
        """What was zeroed in each phase that had tokens, over the processes of an evaluation by `gather`.

        tokens; gate_sparsity, the share of the rows of W_up and W_down, None where a rule drops other weights
        too; by_layer, the share of what could be dropped, counted in weights; and skipped_weights, the
        weights that a token did without, on average. What a rule reads on top is taken off.
        """
        self._count()
        result = {}
        for phase in PHASES:
            counts = torch.stack([self._zeroed[phase], self._sparse[phase], self._tokens[phase]]).tolist()
            zeroed, sparse, tokens = torch.tensor(gather(counts), dtype=torch.float64).sum(0)
            if not self.modules or not tokens[0]:
                continue
            shares = _shares(self.modules, zeroed / tokens, sparse / tokens)
            result[phase] = {"tokens": int(tokens[0]), **shares}
        return result

    def _call(self) -> Call | None:
        return None if self._phase is None else Call(self._phase, self._valid, self._prompt)

    def _now(self, shape: torch.Size, device) -> tuple[str, Tensor | None]:
        """The phase of a call on activations of `shape` [..., T, n], and which of its tokens are masked."""
        phase = self._phase or ("decode" if shape[-2] == 1 else "prefill")
        masked = self._masked
        if self._phase is None and phase == "prefill" and self.policy != Policy():
            everything = torch.ones(shape[:-1], dtype=torch.bool, device=device).reshape(-1, shape[-2])
            masked = self.policy.chosen(everything)
        return phase, masked

    def _keep(self, number: int, keep: Tensor) -> Tensor:
        phase, masked = self._now(keep.shape, keep.device)
        if masked is not None:
            keep = keep | ~masked.reshape(*keep.shape[:-1], 1).to(keep.device)
        self._note(number, phase, (~keep).reshape(-1, keep.shape[-1]).sum(-1), masked)
        return keep

    def _combine(self, layer: int, module: CatsMLP, gate: Tensor, up: Tensor) -> Tensor:
        shape = gate.shape
        phase, masked = self._now(shape, gate.device)
        product = product_for(module.activation, gate.device.type)
        h, zeroed = product(
            gate.reshape(-1, shape[-1]),
            up.reshape(-1, shape[-1]),
            module.threshold.reshape(-1),
            None if masked is None else masked.reshape(-1, 1).to(gate.device),
            getattr(module, "centre", None),
        )
        self._note(layer, phase, zeroed, masked)
        if self.steer is not None:
            self.steer(layer, module, zeroed, self._valid)
        return h.reshape(shape)

    def _note(self, layer: int, phase: str, zeroed: Tensor, masked: Tensor | None) -> None:
        """Keep the zeros of each row [N] of a call until it is over.

        `masked`: which of its tokens are, None for all. Counted layer by layer, they would take as many
        launches as the layers.
        """
        if self._rows is not None and phase == "decode":
            self._rows.append(zeroed.to(self._zeroed[phase].device, torch.int32))
            return
        if self._noted and self._noted[0][0] == layer:
            self._count()  # a call that nobody announced
        self._noted.append((layer, phase, zeroed, masked))

    def _count(self) -> None:
        """Count what the call before has zeroed, padding excluded."""
        for phase in PHASES:
            noted = [(layer, zeroed, masked) for layer, of, zeroed, masked in self._noted if of == phase]
            if not noted:
                continue
            home = self._zeroed[phase].device  # layers may be on other GPUs
            rows = torch.stack([zeroed.to(home) for _, zeroed, _ in noted])
            valid = rows.new_ones(rows.shape[1]) if self._valid is None else self._valid.reshape(-1).to(home)
            masked = noted[0][2]  # alike for every layer of a call
            sparse = valid if masked is None else valid * masked.reshape(-1).to(home)
            layers = [layer for layer, _, _ in noted]
            where = slice(None) if layers == list(range(len(self.modules))) else layers
            self._zeroed[phase][where] += (rows * valid).sum(1)
            self._tokens[phase][where] += valid.sum()  # no layer is there twice
            self._sparse[phase][where] += sparse.sum()
        self._noted.clear()


def _device(module: CatsMLP | Site) -> torch.device:
    return module.linear.weight.device if isinstance(module, Site) else module.threshold.device


def _shares(modules: list[CatsMLP | Site], zeroed: Tensor, sparse: Tensor) -> dict:
    """gate_sparsity, by_layer and skipped_weights of a phase.

    `zeroed`: zeros a token; `sparse`: the share of tokens that were masked; both fp64 [modules].
    """
    sites = isinstance(modules[0], Site)
    widths = torch.tensor([m.width if sites else m.intermediate_size for m in modules])
    weights = torch.tensor([m.weights_saved if sites else 2 * m.hidden_size for m in modules])
    added = torch.tensor(
        [m.weights_added if sites else m.overhead * m.intermediate_size * 2 * m.hidden_size for m in modules]
    )
    layers = torch.tensor([module.layer for module in modules] if sites else range(len(modules)))
    skipped, total = (
        torch.zeros(int(layers.max()) + 1, dtype=torch.float64).index_add_(0, layers, part.double())
        for part in (zeroed * weights - sparse * added, widths * weights)
    )
    neurons = not sites or all(module.neurons for module in modules)
    return {
        "gate_sparsity": float(skipped.sum() / total.sum()) if neurons else None,
        "by_layer": [round(share, 5) for share in (skipped / total).tolist()],
        "skipped_weights": float(skipped.sum()),
    }
