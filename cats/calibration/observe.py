"""Watch a model's gate activations while it runs, padding left out; measure the sparsity it realises."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from cats.core.activation import CatsMLP
from cats.core.structure import cats_mlps
from cats.errors import CatsError


class Observation:
    """Context manager that calls `see(layer, module, z, up)` for each sparse MLP, in layer order.

    z = act(x W_gate) and up = x W_up, [N, m], are those of valid tokens, before masking, without gradient.

    Valid tokens: `valid` [B, T], or else the `attention_mask` of each call of `model`, of which the last T
    columns count (a cache holds the others); every token where there is neither. `keep(mask)` [B, T] may
    narrow it further. A call raises CatsError whose mask does not say which tokens are padding.
    """

    def __init__(
        self,
        model: nn.Module,
        see: Callable[[int, CatsMLP, Tensor, Tensor], None],
        *,
        valid: Tensor | None = None,
        keep: Callable[[Tensor], Tensor] | None = None,
    ):
        self.model = model
        self.modules = cats_mlps(model)
        self.see = see
        self.valid = valid
        self.keep = keep
        self.masking = True
        self._rows: Tensor | None = None
        self._mask: Tensor | None = None

    def __enter__(self):
        if any(module.observer is not None for module in self.modules):
            raise CatsError("This model is being observed already: leave the other measurement first.")
        for layer, module in enumerate(self.modules):
            module.observer = self._observer(layer, module)
        self._hook = self.model.register_forward_pre_hook(self._before, with_kwargs=True)
        return self

    def __exit__(self, *_):
        self._hook.remove()
        for module in self.modules:
            module.observer = None

    def _before(self, _, args: tuple, kwargs: dict) -> None:
        mask = self.valid
        if mask is None:
            mask = kwargs.get("attention_mask", args[1] if len(args) > 1 else None)
            mask = _by_token(mask, kwargs.get("past_key_values"))
        if mask is not None:
            mask = mask.bool()
            mask = mask if self.keep is None else self.keep(mask)
        self._mask, self._rows = mask, None

    def _observer(self, layer: int, module: CatsMLP) -> Callable[[Tensor, Tensor], None]:
        def observe(z: Tensor, up: Tensor) -> None:
            self.masking = module.masks(z)
            self.see(layer, module, self._select(z.detach()), self._select(up.detach()))

        return observe

    def _select(self, z: Tensor) -> Tensor:
        """z [..., m] → [N, m], rows of valid tokens."""
        flat = z.reshape(-1, z.shape[-1])
        if self._mask is None:
            return flat
        if self._rows is None or self._rows_of != len(flat):
            batch, length = self._mask.shape
            steps = len(flat) // batch
            if steps * batch != len(flat) or steps > length:
                raise CatsError(
                    f"A mask of shape {[batch, length]} does not fit {len(flat)} tokens: pass one per token."
                )
            chosen = self._mask[:, length - steps :].reshape(-1)
            self._rows = None if bool(chosen.all()) else chosen.nonzero().squeeze(1).to(z.device)
            self._rows_of = len(flat)
            if self._rows is None:
                self._mask = None
                return flat
        return flat.index_select(0, self._rows.to(z.device))


def _by_token(mask, cache) -> Tensor | None:
    """A mask [B, T] from what a model is given; for a static cache Transformers prepares [B, 1, T, K]."""
    if isinstance(mask, dict):  # one for each kind of layer
        mask = mask.get("full_attention", next(iter(mask.values())))
    if mask is None or (isinstance(mask, Tensor) and mask.ndim == 2):
        return mask
    if isinstance(mask, Tensor) and mask.ndim == 4:
        past, length = 0 if cache is None else int(cache.get_seq_length()), mask.shape[2]
        if length == 1:
            return None
        if past + length <= mask.shape[3]:
            own = mask[:, 0].diagonal(past, 1, 2)  # where padding may not look either
            return own if own.dtype == torch.bool else own == 0
    raise CatsError("The attention mask does not say which tokens are padding: pass them as `valid`, [B, T].")


class SparsityMeter:
    """Measures the share of gate activations that a sparsified model zeroes while it runs in this context.

    `by_layer` [L] and `overall`: fractions in [0, 1] of the activations of valid tokens (see Observation)
    that are zero after the mask, or by the rule `centred` at their centre, over the calls that mask.
    `per_token=True` also keeps `per_token` [L, N], a fraction for each token. `valid` may be set anew between
    calls. Raises CatsError for a dense model.
    """

    def __init__(self, model: nn.Module, valid: Tensor | None = None, *, per_token: bool = False):
        self._observation = Observation(model, self._see, valid=valid)
        layers = len(self._observation.modules)
        self._zeroed = [0] * layers
        self._seen = [0] * layers
        self._tokens: list[list[Tensor]] | None = [[] for _ in range(layers)] if per_token else None

    def __enter__(self):
        self._observation.__enter__()
        return self

    def __exit__(self, *exception):
        self._observation.__exit__(*exception)

    @property
    def valid(self) -> Tensor | None:
        return self._observation.valid

    @valid.setter
    def valid(self, mask: Tensor | None) -> None:
        self._observation.valid = mask

    @property
    def tokens(self) -> int:
        """Valid tokens seen, in the first layer."""
        return self._seen[0]

    @property
    def by_layer(self) -> Tensor:
        if not all(self._seen):
            raise CatsError("No masked token was seen: run the model on some text inside the SparsityMeter.")
        widths = [module.intermediate_size for module in self._observation.modules]
        return torch.tensor(
            [
                int(zeroed) / (seen * width)
                for zeroed, seen, width in zip(self._zeroed, self._seen, widths, strict=True)
            ],
            dtype=torch.float64,
        )

    @property
    def overall(self) -> float:
        """Over all gate activations of all layers."""
        widths = torch.tensor(
            [m.intermediate_size * n for m, n in zip(self._observation.modules, self._seen, strict=True)]
        )
        return float((self.by_layer * widths).sum() / widths.sum())

    @property
    def per_token(self) -> Tensor:
        return torch.stack([torch.cat(parts) for parts in self._tokens])

    def _see(self, layer: int, module: CatsMLP, z: Tensor, _: Tensor) -> None:
        if not self._observation.masking:
            return
        zeroed = ((z.abs() < module.threshold.reshape(-1)) | (z == 0)).sum(-1)
        self._zeroed[layer] = self._zeroed[layer] + zeroed.sum()
        self._seen[layer] += len(z)
        if self._tokens is not None:
            self._tokens[layer].append((zeroed.float() / z.shape[-1]).cpu())
