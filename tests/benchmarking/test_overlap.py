"""Unions of masks: counted by hand on a toy model, and refused where there is too little text."""

import pytest
import torch
import toys

from cats.benchmarking import overlap
from cats.calibration.calibrate import calibrate
from cats.calibration.observe import Observation
from cats.core.sparsify import restore
from cats.errors import CatsError


@pytest.fixture(scope="module")
def toy():
    model = toys.toy("llama")
    return model, calibrate(model, toys.batches(), progress=False)


def sequences(count: int = 8, length: int = 6, size: int = 2) -> list[dict]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, toys.VOCABULARY, (count, length), generator=generator)
    return [{"input_ids": part} for part in ids.split(size)]


def masks(model, batches) -> dict[int, torch.Tensor]:
    """Layer -> keep [stretches, T, m] of the sparsified model."""
    seen: dict[int, list] = {}

    def see(layer, module, z, _):
        seen.setdefault(layer, []).append(z.abs() >= module.threshold)

    with torch.no_grad(), Observation(model, see):
        for batch in batches:
            model(**batch)
    length = batches[0]["input_ids"].shape[1]
    return {layer: torch.cat(parts).unflatten(0, (-1, length)) for layer, parts in seen.items()}


def test_densities_are_those_of_the_masks_counted_one_by_one(toy):
    model, thresholds = toy
    batches = sequences()
    rows = overlap.unions(model, thresholds, 0.6, batches, [1, 3])
    keep = masks(model, batches)
    found = {(row["layer"], row["kind"], row["rows"]): row for row in rows}
    assert len(found) == len(rows) == 2 * 2 * len(keep)
    for layer, mask in keep.items():
        next_tokens = sum(len(set(each[-3:].nonzero()[:, 1].tolist())) for each in mask) / len(mask)
        groups = [mask[0:3, -1], mask[3:6, -1]]
        other_texts = sum(len(set(each.nonzero()[:, 1].tolist())) for each in groups) / 2
        width = mask.shape[-1]
        assert found[layer, "consecutive", 3]["union_density"] == pytest.approx(next_tokens / width)
        assert found[layer, "different", 3]["union_density"] == pytest.approx(other_texts / width)
        assert found[layer, "different", 3]["groups"] == 2
        dropped = 1 - mask.double().mean().item()
        assert found[layer, "consecutive", 1]["realised_sparsity"] == pytest.approx(dropped, abs=1e-6)
        assert found[layer, "consecutive", 3]["independent_density"] == pytest.approx(
            1 - dropped**3, abs=1e-6
        )
    restore(model)


def test_batches_of_any_size_give_the_same(toy):
    model, thresholds = toy
    one, all_at_once = (
        overlap.unions(model, thresholds, 0.5, sequences(size=size), [1, 4]) for size in (1, 8)
    )
    for a, b in zip(one, all_at_once, strict=True):
        assert a["union_density"] == pytest.approx(b["union_density"], abs=1e-3)
    restore(model)


def test_more_masks_than_tokens_or_sequences_are_refused(toy):
    model, thresholds = toy
    with pytest.raises(CatsError, match="sequences of as many tokens, not 6"):
        overlap.unions(model, thresholds, 0.5, sequences(), [8])
    with pytest.raises(CatsError, match="as many sequences, not 2"):
        overlap.unions(model, thresholds, 0.5, sequences(count=2), [4])
    restore(model)
