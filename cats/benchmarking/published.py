"""The authors' own two Triton kernels as one more variant, where their repository is on the path.

No wheel of simple-cats (0.1 to 0.1.3) holds them: the folder triton_kernel is not packed, and it is imported
under another name, so `import simple_cats` fails. They stand in `src` of the branch cats_package.
"""

import importlib.util
import sys
from pathlib import Path

import torch.nn.functional as F
from cats_kernels.reference import ACTIVATIONS

NAME = "cats_published"
_FILE = Path("simple_cats", "kernels", "triton_kernel", "mm_kernels.py")
# The kernels load without masks: whole blocks of columns and of neurons, as large as autotuning tries.
_COLUMNS, _NEURONS, _BATCH = 2048, 128, 4


def find() -> Path | None:
    """The file with the kernels in the first folder of sys.path that has it."""
    return next((Path(folder) / _FILE for folder in sys.path if (Path(folder) / _FILE).is_file()), None)


def fits(m: int, d: int, batch_size: int) -> bool:
    """Whether the kernels stay inside the weights [m, d] and know the batch size."""
    return d % _COLUMNS == 0 and m % _NEURONS == 0 and batch_size <= _BATCH


def variants(m: int, d: int, batch_size: int, tolerance: float) -> dict:
    """The entry for `latency.sparse_variants`, empty where the file is not there or the shape does not fit.

    The first call tunes and must come before a capture; after it both kernels run in a CUDA graph.
    """
    file = find()
    if file is None or not fits(m, d, batch_size):
        return {}
    spec = importlib.util.spec_from_file_location("cats_published_kernels", file)
    kernels = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(kernels)  # the file alone: the package around it wants bitsandbytes and evaluate

    def published(x, w_gate, w_up, w_down_t, threshold, activation):
        x = x[:, None]  # [B, 1, d]
        z = ACTIVATIONS[activation](F.linear(x, w_gate))
        kept = z.abs() > threshold  # theirs drops at equality
        h = kernels.gather_gemv_elemul_flag_3d(x, z, w_up, kept)
        return kernels.gather_transposed_gemv_flag_3d(h, w_down_t, kept)[:, 0]

    return {NAME: (published, ("graph", "eager"), tolerance)}
