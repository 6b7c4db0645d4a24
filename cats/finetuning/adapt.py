"""Make a model ready to be fine-tuned under a method, take its dense teacher, and put it together again."""

import copy
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from accelerate.state import AcceleratorState
from accelerate.utils import TorchDynamoPlugin
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM

from cats.core.centred import CentredMLP
from cats.core.config import CatsConfig
from cats.core.sparsify import restore, set_quantization_config, store_by_columns
from cats.core.structure import find_gated_mlps, sparse_mlps
from cats.criteria import Fit
from cats.errors import CatsError
from cats.finetuning.recipe import Recipe
from cats.models import load as models

BACKEND = "inductor"  # that layers are compiled with
_ATTENTION = ("q_proj", "v_proj", "qkv_proj")  # of those, what a model has: query and value, as in the paper


def apply(model: nn.Module, recipe: Recipe, fit: Fit | None, device: str = "cpu") -> nn.Module:
    """Make `model` sparse as the recipe says; a dense one stays.

    A rule that runs the model on text for this does so on `device`.
    """
    if fit is None:
        return model
    before = next(model.parameters()).device
    if fit.runs_model:
        model.to(device)
    fit.to_train(model, recipe.sparsity)
    model.to(before)
    for parameter in model.parameters():  # W_down by its columns is for decoding; FSDP takes no such strides
        if not parameter.is_contiguous():
            parameter.data = parameter.data.contiguous()
    return model


def adapt(model: nn.Module, recipe: Recipe) -> nn.Module:
    """The model with LoRA on query, value, gate, up and down, or with all weights to train, in fp32.

    Seeds torch: LoRA's matrices follow from the recipe's seed. With bf16 base weights the adapters are fp32.
    """
    torch.manual_seed(recipe.seed)
    if recipe.tuning == "full":
        return model.requires_grad_(True)
    leaves = {name.rpartition(".")[2] for name, _ in model.named_modules()}
    layouts = [mlp.layout for mlp in find_gated_mlps(model)]
    projections = {name for layout in layouts for name in (layout.gate, layout.up, layout.down)}
    config = LoraConfig(
        r=recipe.lora_r,
        lora_alpha=recipe.lora_alpha,
        lora_dropout=recipe.lora_dropout,
        bias="none",
        target_modules=sorted(projections | (leaves & set(_ATTENTION))),
        task_type="CAUSAL_LM",
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft asks for what Transformers has renamed
        return get_peft_model(model, config)


def trained_parameters(name: str, recipe: Recipe) -> tuple[int, int]:
    """Parameters that the recipe trains in a model of any name, and the model's own, from its geometry."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(models.config(name))
        own = sum(parameter.numel() for parameter in model.parameters())
        model = adapt(model, recipe)
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad), own


class Teacher:
    """The dense model as it was before training, to distil from.

    With LoRA it is the trained model itself, adapters and masks switched off, and costs no memory; with full
    fine-tuning it is a frozen copy, taken when this is made. Make it before `apply`.
    """

    def __init__(self, model: nn.Module, recipe: Recipe):
        self._layouts = [mlp.layout for mlp in find_gated_mlps(model)]
        self._copy = copy.deepcopy(model).requires_grad_(False).eval() if recipe.tuning == "full" else None

    @torch.no_grad()
    def logits(self, model: nn.Module, wrapped: nn.Module, inputs: dict) -> torch.Tensor:
        """[B, T, V] of the dense model; `wrapped` is `model` as several processes share it."""
        if self._copy is not None:
            self._copy.to(inputs["input_ids"].device)
            return self._copy(**inputs, use_cache=False).logits
        training = model.training
        model.eval()
        try:
            with model.disable_adapter(), self._unmasked(model):
                return wrapped(**inputs, use_cache=False).logits
        finally:
            model.train(training)

    @contextmanager
    def _unmasked(self, model: nn.Module) -> Iterator[None]:
        modules = sparse_mlps(model)
        kept = [(module.layout, module.combine, module.prefill) for module in modules]
        for module, layout in zip(modules, self._layouts if modules else [], strict=True):
            module.layout, module.combine, module.prefill = layout, None, "dense"
        try:
            yield
        finally:
            for module, (layout, combine, prefill) in zip(modules, kept, strict=True):
                module.layout, module.combine, module.prefill = layout, combine, prefill


def merged(model: nn.Module) -> nn.Module:
    """The plain Transformers model, adapters merged into its weights."""
    if isinstance(model, PeftModel):
        model = model.merge_and_unload()
    model.eval().requires_grad_(False)
    for module in sparse_mlps(model):
        store_by_columns(module)
        if isinstance(module, CentredMLP):
            module.fold()
    return model


def note_sparsity(model: nn.Module, fit: Fit) -> None:
    """Keep the gate sparsity of each layer, as it is now, in the configuration that is saved."""
    levels = [module.sparsity for module in sparse_mlps(model)]
    one = levels[0] if len(set(levels)) == 1 else levels
    set_quantization_config(model, CatsConfig(one, fit.thresholds.provenance(), per=fit.thresholds.per))


def as_relu(model: nn.Module) -> nn.Module:
    """Take the sparse MLPs of a ReLUfied model out: one whose own activation is ReLU computes the same.

    Its configuration says so, and it loads without CATS. Raises CatsError where the activation is no module.
    """
    restore(model)
    for mlp in find_gated_mlps(model):
        if not isinstance(mlp.layout.act, str):
            raise CatsError(
                f"{type(model).__name__} has its activation in code: a ReLUfied one cannot be saved."
            )
        setattr(mlp.module, mlp.layout.act, nn.ReLU())
    text = model.config.get_text_config()
    for name in ("hidden_act", "hidden_activation"):
        if getattr(text, name, None) is not None:
            setattr(text, name, "relu")
    return model


@contextmanager
def compiled_layers(state: AcceleratorState) -> Iterator[None]:
    """Let Accelerate compile the layers of the models that it prepares meanwhile: one graph for all."""
    before = state.dynamo_plugin
    state.dynamo_plugin = TorchDynamoPlugin(backend=BACKEND, use_regional_compilation=True)
    try:
        yield
    finally:
        state.dynamo_plugin = before
