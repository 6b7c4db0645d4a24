import sys

import torch
from cats_kernels import reference

from cats.benchmarking import published

# The two functions by their signatures: x [B, 1, d], z [B, 1, m], kept [B, 1, m], weights [m, d].
SOURCE = """
def gather_gemv_elemul_flag_3d(x, x_1, wup, idx):
    assert x.ndim == 3 and x.shape[1] == 1
    return x_1.masked_fill(~idx, 0) * (x @ wup.t())

def gather_transposed_gemv_flag_3d(x, weight, idx):
    return x.masked_fill(~idx, 0) @ weight
"""


def test_without_the_repository_there_is_no_variant():
    assert published.find() is None
    assert published.variants(128, 2048, 1, 0.1) == {}


def test_the_kernels_are_called_as_the_method_is_defined(tmp_path, monkeypatch):
    file = tmp_path / "simple_cats" / "kernels" / "triton_kernel" / "mm_kernels.py"
    file.parent.mkdir(parents=True)
    file.write_text(SOURCE)
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path)])
    function, launches, tolerance = published.variants(128, 2048, 2, 0.1)[published.NAME]
    assert launches == ("graph", "eager") and tolerance == 0.1
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(128, 2048, generator=generator) / 45 for _ in range(3)]
    x = torch.randn(2, 2048, generator=generator)
    arguments = (x, *weights, torch.tensor(0.2), "silu")
    torch.testing.assert_close(function(*arguments), reference.cats_mlp(*arguments), rtol=1e-4, atol=1e-4)


def test_shapes_that_the_kernels_would_read_beyond_are_left_out():
    assert published.fits(11008, 4096, 4) and published.fits(14336, 4096, 1)
    assert not published.fits(13824, 5120, 1)  # 5,120 columns are two blocks and a half
    assert not published.fits(1536, 576, 1)
    assert not published.fits(11008, 4096, 5)
