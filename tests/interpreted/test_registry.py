"""Every kernel of the registry equals the reference, at both ends of its batches, in each of its dtypes."""

import cats_kernels
import pytest
import torch
from cats_kernels import reference, registry

from cats.records import identity

CASES = [
    (name, rows, dtype)
    for name, kernel in registry.KERNELS.items()
    for rows in {kernel.rows[0], kernel.rows[-1]}
    for dtype in kernel.dtypes
]


@pytest.mark.parametrize(("name", "rows", "dtype"), CASES)
def test_a_kernel_equals_the_reference(name, rows, dtype):
    generator = torch.Generator().manual_seed(rows)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    x, *weights = (
        torch.randn(size, 72, generator=generator).to(device, dtype) / 8 for size in (rows, 50, 50, 50)
    )
    assert registry.choose(rows, dtype) is registry.KERNELS[name]
    t = torch.tensor(0.01, device=device)
    y = cats_kernels.cats_mlp(x, *weights, t, out_dtype=torch.float32)
    expected = reference.cats_mlp(x, *weights, t, out_dtype=torch.float64, accumulate=torch.float64)
    assert (y.double() - expected).norm() <= 1e-4 * expected.norm()


@pytest.mark.parametrize("name", registry.KERNELS)
def test_records_name_a_kernel_and_its_version(name):
    assert identity.today(name)


def test_calls_that_no_kernel_takes_are_dense_products():
    assert registry.choose(registry.MAX_ROWS + 1, torch.float32) is None
    assert registry.choose(4, torch.float64) is None
    device = "cuda" if torch.cuda.is_available() else "cpu"
    x, *weights = (torch.randn(size, 24, device=device, dtype=torch.float64) for size in (4, 30, 30, 30))
    t = torch.tensor(0.1, device=device)
    expected = reference.cats_mlp(x, *weights, t, accumulate=torch.float64)
    torch.testing.assert_close(cats_kernels.cats_mlp(x, *weights, t), expected)
