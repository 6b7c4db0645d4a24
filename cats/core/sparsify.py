"""Put CATS into a model and take it out again: swap its gated MLPs, store W_down by its columns (sec. 5)."""

import copy
from collections import Counter
from collections.abc import Container, Sequence
from functools import wraps

import torch
from torch import Tensor, nn

from cats.core.activation import CatsMLP
from cats.core.centred import CentredMLP
from cats.core.centres import Setting
from cats.core.config import CatsConfig
from cats.core.prefill import watch_prompts
from cats.core.structure import GatedMLP, cats_mlps, find_gated_mlps, sparse_children
from cats.core.thresholds import Thresholds, sparsities
from cats.errors import CatsError


def _outside_inference_mode(function):
    """What is made in inference mode can be neither written to nor trained later: only its models get it."""

    @wraps(function)
    def called(model: nn.Module, *args, **options):
        with torch.inference_mode(any(parameter.is_inference() for parameter in model.parameters())):
            return function(model, *args, **options)

    return called


@_outside_inference_mode
def sparsify(
    model: nn.Module,
    thresholds: Thresholds,
    sparsity: float | Sequence[float],
    *,
    prefill: str = "masked",
) -> nn.Module:
    """Replace every gated MLP of `model` by one that drops the share `sparsity` of its gate activations.

    `sparsity`: gate sparsity in [0, 1), one for all layers or one per layer; 0 computes what the dense model
    does. `prefill`: "masked" masks every token, "dense" leaves prompts unmasked (`cats.core.prefill`).
    Thresholds of the rule `centred` put CentredMLP in the layers where its centres pay at this sparsity. A
    model that is sparse already gets the new thresholds. Peak memory: the model and one W_down. Raises
    CatsError where the model, the thresholds or the sparsity do not fit, before anything is changed.
    """
    config = CatsConfig(sparsity, thresholds, prefill=prefill).applied()
    mlps = find_gated_mlps(model)
    check_weights(mlps)
    thresholds.check(mlps)
    return install(model, mlps, thresholds.settings(sparsity), config)


@_outside_inference_mode
def install(
    model: nn.Module,
    mlps: Sequence[GatedMLP],
    settings: Sequence[Setting],
    config: CatsConfig,
    added: Sequence[Tensor | None] | None = None,
) -> nn.Module:
    """Replace each of `mlps` by a CentredMLP, or where its setting has no centre by a CatsMLP.

    `config` says how; its `centred` is set here. `added`: by layer, what is added to A, for the rule
    `refit-centred`. Weights, settings and sizes are checked by the caller.
    """
    layers = [layer for layer, setting in enumerate(settings) if setting.centre is not None]
    present = {m.layer: isinstance(m.module, CentredMLP) for m in mlps if isinstance(m.module, CatsMLP)}
    if any(centred != (layer in layers) for layer, centred in present.items()):
        mlps = find_gated_mlps(restore(model))
    modules = swap_in(model, mlps, prefill=config.prefill, centred=layers)
    store_all_by_columns(modules)
    targets = sparsities(config.sparsity, len(modules)).tolist()
    set_thresholds(modules, [setting.threshold for setting in settings], targets)
    for layer in layers:
        modules[layer].set(*settings[layer], None if added is None else added[layer])
    config.centred = layers
    set_quantization_config(model, config)
    return model


def set_sparsity(model: nn.Module, thresholds: Thresholds, sparsity: float | Sequence[float]) -> nn.Module:
    """Change the thresholds of a sparsified model, without touching its weights; errors as `sparsify`."""
    modules = cats_mlps(model)
    return sparsify(model, thresholds, sparsity, prefill=modules[0].prefill)


@_outside_inference_mode
def restore(model: nn.Module) -> nn.Module:
    """Put the dense MLPs back, weights with the strides that they had; adapters attached meanwhile stay."""
    for parent, name, module in sparse_children(model):
        dense = module.dense
        for child_name, child in module.named_children():
            setattr(dense, child_name, child)
        weight = _down_weight(module)
        if module.down_stride is not None and weight.stride() != module.down_stride:
            weight.data = torch.empty_strided(
                weight.shape, module.down_stride, dtype=weight.dtype, device=weight.device
            ).copy_(weight.data)
        dense.train(module.training)
        setattr(parent, name, dense)
    watch_prompts(model)
    set_quantization_config(model, None)
    return model


def swap_in(
    model: nn.Module, mlps: Sequence[GatedMLP], *, prefill: str, centred: Container[int] = ()
) -> list[CatsMLP]:
    """Replace the dense modules of `mlps` by sparse ones of threshold zero; those already sparse stay.

    They are CentredMLP in the layers `centred`, CatsMLP in the others.
    """
    modules = []
    for mlp in mlps:
        module = mlp.module
        if isinstance(module, CatsMLP):
            module.prefill = prefill
        else:
            kind = CentredMLP if mlp.layer in centred else CatsMLP
            module = kind(module, mlp.layout, prefill=prefill)
            parent, _, name = mlp.name.rpartition(".")
            setattr(model.get_submodule(parent), name, module)
        modules.append(module)
    watch_prompts(model)
    return modules


def swap_out(model: nn.Module, mlps: Sequence[GatedMLP]) -> None:
    """Put the dense modules of `mlps` back, as they were before `swap_in`."""
    for mlp in mlps:
        parent, _, name = mlp.name.rpartition(".")
        setattr(model.get_submodule(parent), name, mlp.module)
    watch_prompts(model)


def store_by_columns(module: CatsMLP) -> None:
    """Give W_down [d, m] strides (1, d): its transpose [m, d] is contiguous then, without a second copy."""
    weight = _down_weight(module)
    if weight.device.type == "meta" or weight.t().is_contiguous():
        return
    weight.data = weight.data.t().contiguous().t()


def store_all_by_columns(modules: Sequence[CatsMLP]) -> None:
    """`store_by_columns`, but for a W_down that several modules share: safetensors could not save it then."""
    shared = Counter(id(_down_weight(module)) for module in modules)
    for module in modules:
        if shared[id(_down_weight(module))] == 1:
            store_by_columns(module)


def set_quantization_config(model: nn.Module, config: CatsConfig | None) -> None:
    """Note in the Transformers configuration how the model is sparsified, for saving; None takes it out."""
    for module in model.modules():
        if hasattr(module, "save_pretrained") and hasattr(module, "config"):
            if config is not None:
                if not isinstance(getattr(module.config, "quantization_config", None), CatsConfig):
                    _own_config(module)
                module.config.quantization_config = config
            elif _is_ours(getattr(module.config, "quantization_config", None)):
                del module.config.quantization_config
            return


def _is_ours(config: CatsConfig | dict | None) -> bool:
    """Whether a `quantization_config` is of CATS: an object, or as read from a config.json."""
    as_read = isinstance(config, dict) and config.get("quant_method") == "cats"
    return as_read or isinstance(config, CatsConfig)


def _own_config(model: nn.Module) -> None:
    """Give the model a copy of its configuration: another model may have been made of the same object."""
    shared, own = model.config, copy.copy(model.config)
    for module in model.modules():
        if module.__dict__.get("config") is shared:
            module.config = own


@torch.no_grad()
def set_thresholds(
    modules: Sequence[CatsMLP], thresholds: Sequence[Tensor], targets: Sequence[float]
) -> None:
    """Write thresholds [L] or [L, m], and the gate sparsities that they stand for, into sparse MLPs.

    The storage stays the same where the shape allows: a captured graph sees the new values.
    """
    for module, t, sparsity in zip(modules, thresholds, targets, strict=True):
        module.sparsity = sparsity
        if module.threshold.shape == t.shape:
            module.threshold.copy_(t)
        else:
            module.threshold = t.to(module.threshold.device)


def _down_weight(module: CatsMLP) -> nn.Parameter:
    down = getattr(module, module.layout.down)
    return getattr(down, "base_layer", down).weight


def check_weights(mlps: Sequence[GatedMLP]) -> None:
    """Raise CatsError where weights are not in memory."""
    for mlp in mlps:
        if any(parameter.is_meta for parameter in mlp.module.parameters()):
            raise CatsError(
                f"The weights of {mlp.name} are not in memory (offloaded or not loaded): "
                "load the model on one device."
            )
