"""The tests that run Triton kernels: on a GPU, or in Triton's interpreter by a call of their own.

TRITON_INTERPRET=1 must be set before Triton is imported, and would slow all other tests.
"""

import pytest
import torch
import triton
from cats_kernels import decode_attention as fused

from cats.decoding import attention


@pytest.fixture(autouse=True)
def gpu_or_interpreter():
    if not (torch.cuda.is_available() or triton.knobs.runtime.interpret):
        pytest.skip("needs a GPU, or a call of its own: TRITON_INTERPRET=1 pytest tests/interpreted")


@pytest.fixture
def fused_attention_everywhere(monkeypatch):
    """The fused attention for toy sizes too."""
    monkeypatch.setattr(attention, "supports", lambda head_dim, device_type: True)


@pytest.fixture
def calls(monkeypatch):
    """How often the fused attention ran."""
    seen = []
    torch.compiler.reset()  # what another test compiled would run without a note

    @torch.compiler.assume_constant_result  # noted at compilation: a list that grows would ask for another
    def note():
        seen.append(torch.is_grad_enabled())

    def count(*arguments):
        note()
        return fused.decode_attention(*arguments)

    monkeypatch.setattr(attention, "decode_attention", count)
    return seen
