"""The thresholds file: any sparsity from one calibration, read back as written, refused when not whole."""

import json
import os
import resource

import pytest
import torch
from toys import batches, constant_thresholds, toy

from cats import CatsError, Thresholds, calibrate, paths
from cats.paths import write_atomically


def by_hand(**changes) -> Thresholds:
    """Two layers: t = 2 s in the first, bent at s = 0.5 in the second."""
    parts = dict(
        model={"id": "hand"},
        activation="silu",
        criterion="by hand",
        corpus={"name": "none"},
        tokens=10,
        policy={"padding": "excluded"},
        grid=torch.tensor([0.0, 0.5, 1.0]),
        values=torch.tensor([[0.0, 1.0, 2.0], [0.0, 0.1, 3.1]]),
        grid_error=0.01,
    )
    return Thresholds(**{**parts, **changes})


def equal(a: Thresholds, b: Thresholds) -> bool:
    same = torch.equal(a.values, b.values) and torch.equal(a.grid, b.grid)
    if (a.scale is None) != (b.scale is None) or (a.scale is not None and not torch.equal(a.scale, b.scale)):
        return False
    return same and a.provenance() == b.provenance()


def test_lookup_is_linear_between_grid_points():
    thresholds = by_hand()
    assert thresholds.at(0.0).tolist() == [0.0, 0.0]
    assert thresholds.at(0.5).tolist() == pytest.approx([1.0, 0.1])
    assert thresholds.at(0.25).tolist() == pytest.approx([0.5, 0.05])
    assert thresholds.at(0.75).tolist() == pytest.approx([1.5, 1.6])
    assert thresholds.at([0.25, 0.75]).tolist() == pytest.approx([0.5, 1.6])
    assert thresholds.at(torch.tensor([0.0, 0.5])).tolist() == pytest.approx([0.0, 0.1])
    assert thresholds.at(0.5).dtype == torch.float32


def test_lookup_per_neuron_and_by_scale():
    neurons = by_hand(values=torch.tensor([[[0.0, 1.0, 2.0], [0.0, 2.0, 4.0]]] * 2))
    assert neurons.per == "neuron"
    assert neurons.at([0.25, 0.75]).tolist() == [[0.5, 1.0], [1.5, 3.0]]
    scaled = by_hand(scale=torch.tensor([[1.0, 2.0, 0.0], [1.0, 0.5, 1.0]]))
    assert scaled.per == "neuron"
    assert scaled.at(0.5).tolist() == [[1.0, 0.5, torch.inf], pytest.approx([0.1, 0.2, 0.1])]
    assert scaled.at(0.0).tolist() == [[0.0] * 3] * 2


@pytest.mark.parametrize("sparsity", [1.0, -0.01, 1.2, float("nan"), [0.5], [0.5] * 3, "half", None, True])
def test_sparsity_outside_its_range(sparsity):
    with pytest.raises(CatsError):
        by_hand().at(sparsity)


@pytest.mark.parametrize("options", [{}, {"per": "neuron"}, {"weights": torch.rand(3, 80)}])
def test_file_reads_back_as_written(options, tmp_path):
    thresholds = calibrate(toy(), batches(), progress=False, **options)
    thresholds.save(tmp_path / "t.json")
    again = Thresholds.load(str(tmp_path / "t.json"))
    assert equal(again, thresholds)
    assert torch.equal(again.at(0.37), thresholds.at(0.37))
    assert os.listdir(tmp_path) == ["t.json"], "of this size, one readable file"
    document = json.loads((tmp_path / "t.json").read_text())
    assert document["schema"] == 1 and document["grid_error"] == thresholds.grid_error
    assert "/" not in json.dumps(document["corpus"])


def test_large_scales_go_beside_the_file(tmp_path):
    thresholds = by_hand(scale=torch.rand(2, 20_000))
    thresholds.save(tmp_path / "t.json")
    assert (tmp_path / "t.json").stat().st_size < 2_000
    assert equal(Thresholds.load(tmp_path / "t.json"), thresholds)
    (tmp_path / "t.safetensors").write_bytes((tmp_path / "t.safetensors").read_bytes()[:-4])
    with pytest.raises(CatsError, match=r"does not belong to t\.json, or is truncated"):
        Thresholds.load(tmp_path / "t.json")
    (tmp_path / "t.safetensors").unlink()
    with pytest.raises(CatsError, match=r"needs t\.safetensors beside it"):
        Thresholds.load(tmp_path / "t.json")


def edited(path, **changes):
    document = json.loads(path.read_text())
    document.update(changes)
    path.write_text(json.dumps({key: value for key, value in document.items() if value is not None}))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"schema": 2}, "has schema 2, this version reads 1"),
        ({"schema": None}, "has schema None"),
        ({"values": None}, "lacks or garbles 'values'"),
        ({"model": None}, "lacks or garbles 'model'"),
        ({"model": {"intermediate_sizes": 96}}, "lacks or garbles"),
        ({"grid": "many"}, "lacks or garbles"),
        ({"values": [[0, 1, 2]]}, "is inconsistent"),
        ({"values": [[0, 2, 1], [0, 1, 2]]}, "is inconsistent"),
        ({"values": [[0, 1], [0, 1]], "shape": [2, 2]}, "is inconsistent"),
        ({"values": [[0, 1, -1], [0, 1, 2]]}, "is inconsistent"),
        ({"values": [[0, 1, float("inf")], [0, 1, 2]]}, "is inconsistent"),
        ({"grid": [0.0, 0.5, 0.9]}, "is inconsistent"),
        ({"grid": [0.0, 0.5, 0.5, 1.0]}, "is inconsistent"),
        ({"scale": [[1.0], [-1.0]]}, "is inconsistent"),
        ({"scale": [[1.0]]}, "is inconsistent"),
        ({"values": {"file": "../other.safetensors", "sha256": ""}}, "needs other.safetensors beside it"),
    ],
)
def test_wrong_files_are_refused(tmp_path, changes, reason):
    path = tmp_path / "t.json"
    by_hand().save(path)
    assert equal(Thresholds.load(path), by_hand())
    edited(path, **changes)
    with pytest.raises(CatsError, match=reason):
        Thresholds.load(path)


def test_truncated_missing_and_foreign_files(tmp_path):
    path = tmp_path / "t.json"
    by_hand().save(path)
    text = path.read_text()
    for cut in (0, 10, len(text) // 2, len(text) - 3):
        path.write_text(text[:cut])
        with pytest.raises(CatsError, match="not valid JSON, it may be truncated"):
            Thresholds.load(path)
    path.write_text("[1, 2]")
    with pytest.raises(CatsError, match="has schema None"):
        Thresholds.load(path)
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(CatsError, match="not valid JSON"):
        Thresholds.load(path)
    with pytest.raises(CatsError, match="cannot be read: no such file"):
        Thresholds.load(tmp_path / "missing.json")
    with pytest.raises(CatsError, match="cannot be read: is a directory"):
        Thresholds.load(tmp_path)


def test_check_compares_layers_sizes_activation_and_weights():
    model = toy()
    thresholds = constant_thresholds(model)
    thresholds.check(model)
    thresholds.check(model.bfloat16())
    for other, reason in [
        (toy(seed=2), "calibrated on other weights"),
        (toy(num_hidden_layers=4), "are for 3 layers"),
        (toy(intermediate_size=64), "intermediate size 80"),
        (toy(hidden_act="relu"), "silu gates"),
    ]:
        with pytest.raises(CatsError, match=reason):
            thresholds.check(other)
    thresholds.check(toy(seed=2), weights=False)


def test_nothing_half_written_is_left_or_read(tmp_path, monkeypatch):
    path = tmp_path / "t.json"
    by_hand().save(path)
    before = path.read_bytes()

    def fails(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", fails)
    with pytest.raises(CatsError, match=r"t\.json cannot be written: no space left"):
        by_hand(tokens=11).save(path)
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["t.json"]


def test_full_disk(tmp_path):
    """A limit on the size of files stops a write in its middle, as a full disk does."""
    path = tmp_path / "large.bin"
    write_atomically(path, b"old")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, hard))
        with pytest.raises(CatsError, match=r"large\.bin cannot be written: file too large"):
            write_atomically(path, bytes(1 << 20))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["large.bin"]


def test_shipped_thresholds_are_small_and_whole():
    files = sorted(paths.THRESHOLDS.glob("*.json"))
    assert files
    for file in files:
        thresholds = Thresholds.load(file)
        assert file.stat().st_size < 300_000
        assert thresholds.model["id"] == file.stem and thresholds.grid_error < 0.001
        assert thresholds.tokens >= 60_000 and thresholds.corpus["sha256"]


def test_shipped_thresholds_fit_the_embedded_model(smollm):
    Thresholds.load(paths.THRESHOLDS / f"{smollm.info['id']}.json").check(smollm.model)
