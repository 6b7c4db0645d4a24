"""CATS (arXiv 2404.08763): contextually-aware thresholding of gated MLPs in Hugging Face models.

Importing this package registers the quantization method "cats" with Transformers.
"""

from cats.calibration import calibrate
from cats.errors import CatsError
from cats.hf import CatsConfig
from cats.observation import SparsityMeter
from cats.sparsify import cats_mlps, restore, set_sparsity, sparsify
from cats.structure import find_gated_mlps
from cats.thresholds import Thresholds

__all__ = [
    "CatsConfig",
    "CatsError",
    "SparsityMeter",
    "Thresholds",
    "calibrate",
    "cats_mlps",
    "find_gated_mlps",
    "restore",
    "set_sparsity",
    "sparsify",
]
