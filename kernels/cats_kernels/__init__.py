"""Triton kernels for CATS decoding: one public op, its plain-PyTorch reference, and its tuning table."""

from cats_kernels import reference
from cats_kernels.op import MAX_ROWS, cats_mlp

__all__ = ["MAX_ROWS", "cats_mlp", "reference"]
