"""A sparse model on disk: what is saved is what the modules are, and what is loaded is whole."""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from functools import wraps

import torch
from safetensors import safe_open
from torch import nn
from transformers import PreTrainedModel

from cats.core.activation import CatsMLP
from cats.core.centred import CentredMLP
from cats.core.config import CatsConfig
from cats.core.sparsify import set_quantization_config
from cats.core.structure import find_gated_mlps, sparse_mlps
from cats.errors import CatsError

# The buffers that CATS adds to an MLP; a checkpoint holds them beside its weights.
BUFFERS = ("threshold", "centre", "shared")
_TELLING = (
    4  # the last parts of a name, "layers.0.mlp.threshold": what is before them differs between classes
)


def describe_by_modules(model: nn.Module) -> None:
    """Make the configuration of `model` say how its modules are sparsified, whichever part was.

    Raises CatsError where only some of its gated MLPs are sparse: loading could not tell which.
    """
    modules = sparse_mlps(model)
    if not modules:
        set_quantization_config(model, None)
        return
    dense = [mlp.name for mlp in find_gated_mlps(model) if not isinstance(mlp.module, CatsMLP)]
    if dense:
        raise CatsError(
            f"{len(dense)} gated MLPs of this model are dense (such as {dense[0]}) "
            f"and {len(modules)} sparse, "
            "which a saved model cannot tell apart: sparsify the whole model, or save the part alone."
        )
    for module in modules:
        if isinstance(module, CentredMLP) and not (module.folded or module.fitted):
            module.fold()
    calibrated = next((config.thresholds for config in _configs(model)), {})
    targets = [module.sparsity for module in modules]
    config = CatsConfig(
        targets[0] if len(set(targets)) == 1 else targets,
        calibrated,
        prefill=modules[0].prefill,
        per="neuron" if any(module.threshold.ndim for module in modules) else "layer",
        centred=[layer for layer, module in enumerate(modules) if isinstance(module, CentredMLP)],
    )
    set_quantization_config(model, config)


def _configs(model: nn.Module) -> Iterator[CatsConfig]:
    for module in model.modules():
        config = getattr(getattr(module, "config", None), "quantization_config", None)
        if isinstance(config, CatsConfig):
            yield config


def describe_before_saving() -> None:
    """Let Transformers' `save_pretrained` begin with `describe_by_modules`: it has no hook for that."""
    save = PreTrainedModel.save_pretrained

    @wraps(save)
    def save_pretrained(self, *arguments, **options):
        describe_by_modules(self)
        return save(self, *arguments, **options)

    PreTrainedModel.save_pretrained = save_pretrained


def check_buffers(files: Iterable[str], modules: dict[str, CatsMLP]) -> None:
    """Raise CatsError unless a checkpoint holds each buffer of `modules` (by name) once, and no other.

    Transformers would fill what a checkpoint lacks with whatever is in memory.
    """
    wanted = Counter(
        (_tail(f"{name}.{buffer}"), tuple(tensor.shape))
        for name, module in modules.items()
        for buffer, tensor in module.named_buffers(recurse=False)
        if buffer in BUFFERS
    )
    found = Counter(
        (_tail(name), shape)
        for file in files
        for name, shape in _shapes(file)
        if name.split(".")[-1] in BUFFERS
    )
    if found == wanted:
        return
    thresholds = sum(count for (name, _), count in found.items() if name.endswith(".threshold"))
    if thresholds != len(modules):
        what = f"has {thresholds} thresholds for {len(modules)} layers"
    elif missing := wanted - found:
        name, shape = next(iter(missing))
        what = f"lacks {name} of shape {list(shape)}"
    else:
        name, shape = next(iter(found - wanted))
        what = f"has {name} of shape {list(shape)}, which this model has no place for"
    raise CatsError(
        f"The checkpoint {what}: save the sparsified model again, "
        "or remove quantization_config from its config.json to load it dense."
    )


def check_values(modules: Sequence[CatsMLP]) -> None:
    """Raise CatsError where a loaded threshold is negative, or a buffer of CATS not finite."""
    for layer, module in enumerate(modules):
        for name, tensor in module.named_buffers(recurse=False):
            if name not in BUFFERS:
                continue
            if not bool(tensor.isfinite().all()) or (name == "threshold" and bool((tensor < 0).any())):
                raise CatsError(
                    f"The checkpoint's {name} of layer {layer} is negative or not finite: "
                    "save the sparsified model again."
                )


def _tail(name: str) -> str:
    return ".".join(name.split(".")[-_TELLING:])


def _shapes(file: str) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes of the tensors in a file of a checkpoint, without reading them."""
    if str(file).endswith(".safetensors"):
        with safe_open(file, framework="pt") as checkpoint:
            for name in checkpoint.keys():  # noqa: SIM118, not a dict
                yield name, tuple(checkpoint.get_slice(name).get_shape())
    else:
        for name, tensor in torch.load(file, weights_only=True, mmap=True, map_location="cpu").items():
            yield name, tuple(tensor.shape)
