"""The kernels of `cats_mlp` on a GPU: a new one, or one for another weight format, is a file and an entry."""

from dataclasses import dataclass
from types import ModuleType

import torch

from cats_kernels import batch, decode, few

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Kernel:
    """A module whose `launch` takes the arguments of `cats_mlp`, and the calls that it is for.

    `rows`: rows of x; `dtypes`: of x and the weights.
    """

    module: ModuleType
    rows: range
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16, torch.float16)


KERNELS = {
    "one_row": Kernel(decode, range(1, 2), DTYPES),
    "few_rows": Kernel(few, range(2, few.MOST_ROWS + 1)),
    "batch": Kernel(batch, range(few.MOST_ROWS + 1, 17)),
}
MAX_ROWS = max(kernel.rows[-1] for kernel in KERNELS.values())


def choose(rows: int, dtype: torch.dtype) -> Kernel | None:
    """The first kernel for so many rows of x and weights of this dtype; None where there is none."""
    fitting = (kernel for kernel in KERNELS.values() if rows in kernel.rows and dtype in kernel.dtypes)
    return next(fitting, None)
