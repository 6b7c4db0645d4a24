"""CATS (arXiv 2404.08763): contextually-aware thresholding of gated MLPs in Hugging Face models.

Importing this package registers the quantization method "cats" with Transformers.
"""

from cats.calibration.calibrate import calibrate
from cats.calibration.centred import calibrate_centred
from cats.calibration.observe import SparsityMeter
from cats.core.hf import CatsConfig
from cats.core.sparsify import cats_mlps, restore, set_sparsity, sparsify
from cats.core.structure import find_gated_mlps
from cats.core.thresholds import Thresholds
from cats.errors import CatsError

__all__ = [
    "CatsConfig",
    "CatsError",
    "SparsityMeter",
    "Thresholds",
    "calibrate",
    "calibrate_centred",
    "cats_mlps",
    "find_gated_mlps",
    "restore",
    "set_sparsity",
    "sparsify",
]


def __getattr__(name: str):
    """`cats.attention`, the public name of version 0.1 for `cats.decoding.attention`."""
    if name == "attention":
        from cats.decoding import attention

        return attention
    raise AttributeError(f"module 'cats' has no attribute {name!r}")
