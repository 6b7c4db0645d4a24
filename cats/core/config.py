"""How a model is sparsified, as Transformers keeps it in config.json under `quantization_config`."""

import os
from collections.abc import Sequence
from typing import Any

from transformers.utils.quantization_config import QuantizationConfigMixin

from cats.core.activation import PREFILL
from cats.core.thresholds import Thresholds, plain, sparsities
from cats.errors import CatsError


class CatsConfig(QuantizationConfigMixin):
    """CATS at gate sparsity `sparsity` in [0, 1), one number or one per layer.

    `thresholds`: a thresholds file or a Thresholds, to sparsify a dense model as it loads. Afterwards, and in
    config.json, what those were calibrated on: the values in use are saved with the weights. `prefill`:
    "masked" or "dense". `per`: "layer" or "neuron", read from the thresholds. `centred`: layers of the rule
    of that name, in a saved model. Raises CatsError for values that cannot be.
    """

    def __init__(
        self,
        sparsity: float | Sequence[float],
        thresholds: str | os.PathLike | Thresholds | dict[str, Any],
        *,
        prefill: str = "masked",
        per: str = "layer",
        centred: Sequence[int] = (),
        quant_method: str = "cats",
    ):
        self.quant_method = quant_method
        self.sparsity = plain(sparsity)
        self.prefill = prefill
        self.per = per
        self.centred = list(centred)
        self.calibrated: Thresholds | None = None
        if isinstance(thresholds, (str, os.PathLike)):
            thresholds = Thresholds.load(thresholds)
        if isinstance(thresholds, Thresholds):
            self.calibrated = thresholds
            self.per = thresholds.per
            thresholds = thresholds.provenance()
        if not isinstance(thresholds, dict):
            raise CatsError("CatsConfig needs thresholds: the path of a file that `cats calibrate` wrote.")
        self.thresholds = thresholds
        self.post_init()

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs):
        try:
            return super().from_dict(config_dict, return_unused_kwargs, **kwargs)
        except TypeError as error:
            raise CatsError(
                f"The quantization_config in config.json lacks or garbles a setting ({error}): "
                "save the sparsified model again."
            ) from error

    def post_init(self) -> None:
        """Validate, as Transformers' own configurations do."""
        if self.prefill not in PREFILL:
            raise CatsError(f"Unknown prefill {self.prefill!r}: use one of {', '.join(PREFILL)}.")
        has_centres = self.centred or (self.calibrated is not None and self.calibrated.centres is not None)
        if has_centres and self.prefill != "masked":
            raise CatsError(f"The rule centred masks every token: prefill={self.prefill!r} is not for it.")
        if self.calibrated is not None:
            layers = self.calibrated.layers
        else:
            layers = len(self.sparsity) if isinstance(self.sparsity, list) else 1
        sparsities(self.sparsity, layers)

    def applied(self) -> "CatsConfig":
        """The same without threshold values: what a model that has them in its weights keeps."""
        return CatsConfig(
            self.sparsity, self.thresholds, prefill=self.prefill, per=self.per, centred=self.centred
        )

    def to_dict(self) -> dict[str, Any]:
        return {
            "quant_method": self.quant_method,
            "sparsity": self.sparsity,
            "prefill": self.prefill,
            "per": self.per,
            **({"centred": self.centred} if self.centred else {}),
            "thresholds": self.thresholds,
        }
