"""Run a model over batches of text while something watches its gated MLPs or its Linears."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from cats.calibration.checkpoint import Checkpoint
from cats.calibration.observe import Observation
from cats.core.activation import CatsMLP
from cats.core.sparsify import check_weights, swap_in, swap_out
from cats.core.structure import GatedMLP, find_gated_mlps
from cats.errors import CatsError


def read(
    batches: Iterable[dict[str, Tensor]],
    device: torch.device,
    *,
    saved: Checkpoint | None = None,
    label: str = "observing",
    progress: bool = True,
) -> Iterator[tuple[Tensor, Tensor]]:
    """(token ids, attention mask) of each batch on `device`, int64 [B, T], under a bar that counts tokens.

    `saved` skips batches that are counted already. Raises CatsError for batches of another form, and in the
    end where there was no token.
    """
    total = getattr(batches, "info", {}).get("tokens")
    tokens = 0
    with tqdm(total=total, desc=label, unit="tok", disable=None if progress else True) as bar:
        for batch in checked(batches) if saved is None else saved.rest(checked(batches)):
            if saved is not None and tokens == 0:
                bar.update(saved.tokens)
            ids, mask = batch["input_ids"], batch.get("attention_mask")
            mask = torch.ones_like(ids) if mask is None else mask
            count = int(mask.sum())
            yield ids.to(device), mask.to(device)
            tokens += count
            bar.update(count)
    if tokens == 0 and (saved is None or saved.tokens == 0):
        raise CatsError("The batches hold no token to calibrate on: give text.")


def checked(batches: Iterable[dict[str, Tensor]]) -> Iterator[dict[str, Tensor]]:
    for batch in batches:
        ids = batch.get("input_ids") if isinstance(batch, Mapping) else None
        if not isinstance(ids, Tensor) or ids.ndim != 2 or ids.numel() == 0:
            raise CatsError(
                'A batch must be {"input_ids": …, "attention_mask": …}, tensors [B, T] with a token or more: '
                "give a list of those, or what corpora.batches makes."
            )
        yield batch


def check_decoder(model: nn.Module) -> None:
    """Raise CatsError for an encoder-decoder."""
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        raise CatsError(f"{type(model).__name__} is an encoder-decoder: CATS here calibrates decoders alone.")


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model in evaluation mode; afterwards each of its modules in the mode that it had."""
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in training.items():
            module.training = mode


@contextmanager
def watched(model: nn.Module) -> Iterator[None]:
    """The model in evaluation mode, its dense MLPs replaced for a while by ones that can be observed."""
    mlps = [mlp for mlp in find_gated_mlps(model) if not isinstance(mlp.module, CatsMLP)]
    check_weights(mlps)
    with evaluating(model):
        swap_in(model, mlps, prefill="dense")  # threshold 0 masks nothing: "dense" saves comparing
        try:
            yield
        finally:
            swap_out(model, mlps)


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

    `see(layer, module, z, up)` as `cats.calibration.observe.Observation` calls it; options as
    `cats.calibration.calibrate.calibrate`. Raises CatsError for batches of another form, no token, and a
    layer that was not called on every one.
    """

    def keep(mask: Tensor) -> Tensor:
        return mask & (mask.cumsum(1) > skip_first)

    check_decoder(model)
    if not isinstance(skip_first, int) or skip_first < 0:
        raise CatsError(f"skip_first={skip_first} is not a number of tokens: give 0 or more.")
    mlps = find_gated_mlps(model)
    seen = [0] * len(mlps)

    def count(layer: int, module: CatsMLP, z: Tensor, up: Tensor) -> None:
        seen[layer] += len(z)
        see(layer, module, z, up)

    decoder = model.get_decoder() if hasattr(model, "get_decoder") else model
    device = next(decoder.parameters()).device
    streamed = 0
    with watched(model), Observation(decoder, count, keep=keep), torch.no_grad():
        for ids, mask in read(batches, device, saved=saved, label="calibrating", progress=progress):
            tokens = int(keep(mask.bool()).sum())
            decoder(input_ids=ids, attention_mask=mask, use_cache=False)
            streamed += tokens
            if min(seen) < streamed:  # a layer that serves twice has more
                raise CatsError(
                    f"{mlps[seen.index(min(seen))].name} was not called on every token, so it has no "
                    "thresholds: load the model without what skips or replaces it."
                )
            if saved is not None:
                saved.counted(tokens)
    if saved is not None:
        saved.write()
        streamed = saved.tokens
    if streamed == 0:
        raise CatsError("The batches hold no token to calibrate on: give text, or a smaller skip_first.")
    return streamed


@torch.no_grad()
def watch(
    model: nn.Module,
    modules: Iterable[tuple[Any, nn.Linear]],
    batches: Iterable[dict[str, Tensor]],
    see: Callable[..., None],
    *,
    at: str = "input",
    saved: Checkpoint | None = None,
    progress: bool = True,
) -> int:
    """Call `see(key, x)` with the input or output [N, n] of each Linear of (key, Linear), without padding.

    `at` "both" calls `see(key, input, output)`. `saved` goes on with what is counted already. Returns the
    number of tokens; errors as `read`.
    """
    valid: Tensor | None = None

    def hook(key):
        def note(module, args, output):
            seen = {"input": args[:1], "output": (output,), "both": (args[0], output)}[at]
            flat = [x.detach().reshape(-1, x.shape[-1]) for x in seen]
            see(key, *(x if valid is None else x.index_select(0, valid.to(x.device)) for x in flat))

        return note

    handles = [module.register_forward_hook(hook(key)) for key, module in modules]
    tokens = 0
    try:
        with evaluating(model):
            for ids, mask in read(batches, model.device, saved=saved, progress=progress):
                count = int(mask.sum())
                tokens += count
                valid = None if bool(mask.all()) else mask.reshape(-1).nonzero().squeeze(1)
                model.get_decoder()(input_ids=ids, attention_mask=mask, use_cache=False)
                if saved is not None:
                    saved.counted(count)
    finally:
        for handle in handles:
            handle.remove()
    if saved is None:
        return tokens
    saved.write()
    return saved.tokens


def watch_neurons(
    model: nn.Module,
    which: tuple[str, ...],
    batches: Iterable[dict[str, Tensor]],
    see: Callable[[GatedMLP, str, Tensor], None],
    *,
    progress: bool = True,
) -> int:
    """As `watch`, `see(mlp, part, x)` with the output [N, m] of each "gate" or "up" projection in `which`."""

    def narrowed(key: tuple[GatedMLP, str], output: Tensor) -> None:
        mlp, part = key
        see(mlp, part, output.narrow(-1, mlp.first_output(part), mlp.intermediate_size))

    modules = [((mlp, part), mlp.projection(part)) for mlp in find_gated_mlps(model) for part in which]
    return watch(model, modules, batches, narrowed, at="output", progress=progress)
