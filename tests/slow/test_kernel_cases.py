"""560 cases of the gated MLP's op, 70 of each kind, against its reference: on the CPU kernel and interpreted.

The second needs a call of its own, `TRITON_INTERPRET=1 pytest tests/slow/test_kernel_cases.py`.
"""

import math
from collections import Counter
from dataclasses import dataclass

import cats_kernels
import hardening
import hypothesis
import pytest
import torch
import triton
from cats_kernels import cpu, reference
from hypothesis import strategies

DEVICE = "cuda" if torch.cuda.is_available() and not triton.knobs.runtime.interpret else "cpu"
TOLERANCE = 1e-5  # of a float32 result, by what is added up for it
NEVER = 1e30
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
KINDS = ("tie", "between", "zero", "never", "NaN", "neurons", "mask", "masks")


@dataclass(frozen=True)
class Case:
    """What a case is made from: a few numbers, which are shown where it fails."""

    rows: int
    m: int
    d: int
    kind: str
    activation: str
    dtype: torch.dtype
    seed: int
    share: float  # of the magnitudes below the threshold, or of the neurons that a mask keeps
    in_x: float | None  # put at one place of x
    poisoned: bool  # NaN in all weights that no token needs


def cases(kind: str):
    """Cases of one kind: drawn among the others, hypothesis would come back to a few."""
    return strategies.builds(
        Case,
        rows=strategies.integers(1, 16),
        m=strategies.integers(1, 90),
        d=strategies.integers(1, 70),
        kind=strategies.just(kind),
        activation=strategies.sampled_from(sorted(reference.ACTIVATIONS)),
        dtype=strategies.sampled_from(DTYPES),
        seed=strategies.integers(0, 2**32 - 1),
        share=strategies.sampled_from((0.0, 0.1, 0.5, 0.9, 1.0)),
        in_x=strategies.sampled_from((None, None, math.nan, math.inf, -math.inf, -0.0)),
        poisoned=strategies.booleans(),
    )


def made(case: Case) -> tuple:
    """x [B, d], the weights [m, d], a threshold, an activation and a mask.

    Weights and x are small whole numbers: with relu every |z| is exact, so thresholds may equal it.
    """
    generator = torch.Generator().manual_seed(case.seed)
    shapes = ((case.rows, case.d), *[(case.m, case.d)] * 3)
    x, *weights = (
        torch.randint(-2, 3, shape, generator=generator).to(DEVICE, case.dtype) for shape in shapes
    )
    if case.in_x is not None:
        x[case.seed % case.rows, case.seed % case.d] = case.in_x
    activation = "relu" if case.kind == "tie" else case.activation
    z = reference.ACTIVATIONS[activation](x.double() @ weights[0].double().t())
    known = z.abs()[z.isfinite()].unique()
    place = round(case.share * (len(known) - 1))
    threshold, mask = torch.zeros((), device=DEVICE), None
    if case.kind == "tie" and len(known):
        threshold = known[place].float()
    elif case.kind == "between":
        threshold = _between(known, place)
    elif case.kind in ("never", "NaN"):
        threshold = torch.tensor(NEVER if case.kind == "never" else math.nan, device=DEVICE)
    elif case.kind == "neurons":
        values = torch.tensor([0.0, NEVER, math.nan, float(_between(known, place))])
        threshold = values[torch.randint(0, 4, (case.m,), generator=generator)].to(DEVICE)
    elif case.kind in ("mask", "masks"):
        shape = (case.m,) if case.kind == "mask" else (case.rows, case.m)
        mask = (torch.rand(shape, generator=generator) < case.share).to(DEVICE)
        if case.poisoned:
            for weight in weights:
                weight[~mask.reshape(-1, case.m).any(dim=0)] = math.nan
    return x, *weights, threshold, activation, mask


def _between(known: torch.Tensor, place: int) -> torch.Tensor:
    """Halfway to the next magnitude that is clearly larger: rounding cannot change who survives."""
    later = known[known > known[place] * 1.001 + 1e-3] if len(known) else known
    return ((known[place] + later[0]) / 2).float() if len(later) else torch.tensor(NEVER, device=DEVICE)


def terms(x, w_gate, w_up, w_down_t, threshold, activation, mask) -> torch.Tensor:
    """What is added up for each number of y, in absolute values: rounding is a share of it, not of y."""
    x, w_gate, w_up, w_down_t = (each.double().nan_to_num(0, 0, 0) for each in (x, w_gate, w_up, w_down_t))
    return ((x @ w_gate.t()) * (x @ w_up.t())).abs() @ w_down_t.abs()  # |act(z)| <= |z|, and is rounded as z


def check(case: Case, kinds: Counter) -> None:
    arguments = made(case)
    kinds[case.kind] += 1
    found = cats_kernels.cats_mlp(*arguments, out_dtype=torch.float32)
    expected = reference.cats_mlp(*arguments, out_dtype=torch.float64, accumulate=torch.float64)
    assert found.shape == expected.shape and found.dtype == torch.float32
    whole = expected.isfinite()
    assert torch.equal(found.isfinite(), whole)
    error = (found.double() - expected)[whole].abs()
    dense = case.dtype == torch.float16 and DEVICE == "cpu" and not triton.knobs.runtime.interpret
    tolerance = 4e-3 if dense else TOLERANCE  # a CPU has no kernel for float16, and multiplies in it
    assert bool((error <= tolerance * terms(*arguments)[whole]).all()), (
        f"an error of {float(error.max()):.1e}"
    )
    rounded = cats_kernels.cats_mlp(*arguments)
    assert rounded.dtype == case.dtype
    # One step of the dtype: Triton's interpreter rounds halves of bfloat16 another way than PyTorch.
    torch.testing.assert_close(
        rounded.float(),
        found.to(case.dtype).float(),
        rtol=torch.finfo(case.dtype).eps,
        atol=0,
        equal_nan=True,
    )


@pytest.mark.parametrize("part", hardening.PARTS)
@pytest.mark.parametrize("kind", KINDS)
def test_the_op_equals_its_reference(kind, part, record_property):
    if not triton.knobs.runtime.interpret and DEVICE == "cpu" and not cpu.compiled(torch.float32):
        pytest.skip("numba is not installed: there is no CPU kernel")
    kinds: Counter = Counter()
    settings = hypothesis.settings(
        max_examples=len(hardening.numbers(70, part)),
        database=None,
        deadline=None,
        phases=[hypothesis.Phase.generate],  # in the interpreter, looking for a smaller case takes minutes
    )
    test = hypothesis.given(cases(kind))(lambda case: check(case, kinds))
    hypothesis.seed(part)(settings(test))()
    where = "the interpreter" if triton.knobs.runtime.interpret else "the CPU kernel"
    record_property(f"kernel cases in {where}", dict(kinds))
