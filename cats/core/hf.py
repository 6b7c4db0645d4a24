"""CATS as a Transformers quantization method: `from_pretrained` and `save_pretrained` with no remote code."""

import torch
from torch import nn
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer

from cats.core.centred import FITTED, CentredMLP
from cats.core.config import CatsConfig
from cats.core.saved import check_buffers, check_values, describe_before_saving
from cats.core.sparsify import set_quantization_config, sparsify, store_all_by_columns, swap_in
from cats.core.structure import cats_mlps, find_gated_mlps
from cats.core.thresholds import sparsities
from cats.errors import CatsError


@register_quantizer("cats")
class CatsQuantizer(HfQuantizer):
    """Sparsifies a dense checkpoint as it loads, or rebuilds a saved sparse one.

    The loaded model is an ordinary one: it casts, trains, compiles, takes adapters and saves as if `sparsify`
    had been called on it, because nothing in it is quantized. Raises CatsError where they do not fit.
    """

    def _process_model_before_weight_loading(self, model: nn.Module, checkpoint_files=None, **_) -> None:
        config = self.quantization_config
        mlps = find_gated_mlps(model)
        if not self.pre_quantized:
            if config.calibrated is None:
                raise CatsError(
                    "A dense model needs threshold values: pass CatsConfig the path of a thresholds file."
                )
            config.calibrated.check(mlps, weights=False)
            return
        targets = sparsities(config.sparsity, len(mlps)).tolist()
        if not set(config.centred) <= set(range(len(mlps))):
            raise CatsError(
                f"The layers {config.centred} are centred by config.json, but the model has {len(mlps)}: "
                "save the sparsified model again."
            )
        modules = swap_in(model, mlps, prefill=config.prefill, centred=config.centred)
        for module, sparsity in zip(modules, targets, strict=True):
            module.sparsity = sparsity
            shape = (module.intermediate_size,) if config.per == "neuron" else ()
            module.threshold = torch.zeros(shape, dtype=torch.float32, device=module.threshold.device)
        names = (mlp.name for mlp in mlps)
        check_buffers(checkpoint_files or (), dict(zip(names, modules, strict=True)))

    def _process_model_after_weight_loading(self, model: nn.Module, **_) -> None:
        config = self.quantization_config
        self.remove_quantization_config(
            model
        )  # its marks would forbid .half(), training and merging adapters
        if self.pre_quantized:
            modules = cats_mlps(model)
            check_values(modules)
            store_all_by_columns(modules)
            for module in modules:
                if isinstance(module, CentredMLP):
                    module.folded, module.fitted = True, FITTED in config.thresholds
            set_quantization_config(model, config)
        else:
            sparsify(model, config.calibrated, config.sparsity, prefill=config.prefill)

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True


register_quantization_config("cats")(CatsConfig)
describe_before_saving()
