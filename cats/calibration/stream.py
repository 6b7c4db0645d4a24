"""Run a model over batches of text while something watches its gated MLPs."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from cats.calibration.checkpoint import Checkpoint
from cats.calibration.observe import Observation
from cats.core.activation import CatsMLP
from cats.core.sparsify import check_weights, swap_in, swap_out
from cats.core.structure import find_gated_mlps
from cats.errors import CatsError


def stream(
    model: nn.Module,
    batches: Iterable[dict[str, Tensor]],
    see: Callable[[int, CatsMLP, Tensor, Tensor], None],
    *,
    skip_first: int = 0,
    saved: Checkpoint | None = None,
    progress: bool = True,
) -> int:
    """Run every batch through the decoder (its head is not needed); returns the number of tokens seen.

    `see(layer, module, z, up)` as `cats.observation.Observation` calls it; options as
    `cats.calibration.calibrate`. Raises CatsError for batches of another form, no token, and a layer that
    was not called on every one.
    """

    def keep(mask: Tensor) -> Tensor:
        return mask & (mask.cumsum(1) > skip_first)

    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        raise CatsError(f"{type(model).__name__} is an encoder-decoder: CATS here calibrates decoders alone.")
    if not isinstance(skip_first, int) or skip_first < 0:
        raise CatsError(f"skip_first={skip_first} is not a number of tokens: give 0 or more.")
    mlps = find_gated_mlps(model)
    rows = [0] * len(mlps)

    def counted(layer: int, module: CatsMLP, z: Tensor, up: Tensor) -> None:
        rows[layer] += len(z)
        see(layer, module, z, up)

    decoder = model.get_decoder() if hasattr(model, "get_decoder") else model
    device = next(decoder.parameters()).device
    expected = getattr(batches, "info", {}).get("tokens")
    batches = _tensors(batches)
    tokens = streamed = 0
    with (
        watched(model),
        Observation(decoder, counted, keep=keep),
        torch.no_grad(),
        tqdm(total=expected, desc="calibrating", unit="tok", disable=None if progress else True) as bar,
    ):
        if saved is not None:
            batches = saved.rest(batches)
        for batch in batches:
            if saved is not None and tokens == 0:
                tokens = saved.tokens
                bar.update(tokens)
            ids = batch["input_ids"]
            mask = batch.get("attention_mask")
            mask = torch.ones_like(ids) if mask is None else mask
            new = int(keep(mask.bool()).sum())
            decoder(input_ids=ids.to(device), attention_mask=mask.to(device), use_cache=False)
            tokens += new
            streamed += new
            if min(rows) < streamed:  # a layer that serves twice has more
                raise CatsError(
                    f"{mlps[rows.index(min(rows))].name} was not called on every token, so it has no "
                    "thresholds: load the model without what skips or replaces it."
                )
            bar.update(new)
            if saved is not None:
                saved.counted(tokens)
    if saved is not None:
        saved.write()
        tokens = saved.tokens
    if tokens == 0:
        raise CatsError("The batches hold no token to calibrate on: give text, or a smaller skip_first.")
    return tokens


def _tensors(batches: Iterable[dict[str, Tensor]]) -> Iterator[dict[str, Tensor]]:
    for batch in batches:
        ids = batch.get("input_ids") if isinstance(batch, Mapping) else None
        if not isinstance(ids, Tensor) or ids.ndim != 2 or ids.numel() == 0:
            raise CatsError(
                'A batch must be {"input_ids": …, "attention_mask": …}, tensors [B, T] with a token or more: '
                "give a list of those, or what corpora.batches makes."
            )
        yield batch


@contextmanager
def watched(model: nn.Module):
    """The model in evaluation mode, its dense MLPs replaced for a while by ones that can be observed."""
    mlps = [mlp for mlp in find_gated_mlps(model) if not isinstance(mlp.module, CatsMLP)]
    check_weights(mlps)
    training = {module: module.training for module in model.modules()}
    model.eval()
    swap_in(model, mlps, prefill="dense")  # threshold 0 masks nothing: "dense" saves comparing
    try:
        yield
    finally:
        swap_out(model, mlps)
        for module, mode in training.items():
            module.training = mode
