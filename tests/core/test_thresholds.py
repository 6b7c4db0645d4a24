"""The thresholds file: any sparsity from one calibration, read back as written, refused when not whole."""

import dataclasses
import json
import os
import resource

import pytest
import torch
from toys import batches, constant_thresholds, toy

from cats import CatsError, Thresholds, calibrate, paths, sparsify
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
    [beside] = tmp_path.glob("t.thresholds-*.safetensors")
    beside.write_bytes(beside.read_bytes()[:-4])
    with pytest.raises(CatsError, match=r"does not belong to t\.json, or is truncated"):
        Thresholds.load(tmp_path / "t.json")
    beside.unlink()
    with pytest.raises(CatsError, match=r"needs t\.thresholds-\w+\.safetensors beside it"):
        Thresholds.load(tmp_path / "t.json")


def test_what_stands_beside_the_file_is_its_own(tmp_path):
    """A model's weights, or another calibration's values, may have the name of the file."""
    (tmp_path / "t.safetensors").write_bytes(b"weights of a model")
    first, second = (by_hand(scale=torch.rand(2, 20_000)) for _ in range(2))
    first.save(tmp_path / "t.json")
    first.save(tmp_path / "other.json")
    second.save(tmp_path / "t.json")
    assert equal(Thresholds.load(tmp_path / "t.json"), second)
    assert equal(Thresholds.load(tmp_path / "other.json"), first)
    assert (tmp_path / "t.safetensors").read_bytes() == b"weights of a model"
    assert len(list(tmp_path.iterdir())) == 5, "what the first calibration left beside t.json is gone"
    by_hand().save(tmp_path / "t.json")
    assert len(list(tmp_path.iterdir())) == 4 and equal(Thresholds.load(tmp_path / "t.json"), by_hand())


def test_another_calibration_that_cannot_be_written_leaves_the_old_one_whole(tmp_path, monkeypatch):
    first = by_hand(scale=torch.rand(2, 20_000))
    first.save(tmp_path / "t.json")
    replace, calls = os.replace, []

    def fails_at_the_second(*paths):
        calls.append(paths)
        if len(calls) == 2:
            raise OSError(28, "No space left on device")
        replace(*paths)

    monkeypatch.setattr(os, "replace", fails_at_the_second)
    with pytest.raises(CatsError, match="no space left"):
        by_hand(scale=torch.rand(2, 20_000)).save(tmp_path / "t.json")
    assert equal(Thresholds.load(tmp_path / "t.json"), first)


@pytest.mark.parametrize("content", [b"{}", b"not JSON", b'{"schema": 1, "model_type": "llama"}'])
def test_another_file_is_not_overwritten(tmp_path, content):
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(CatsError, match="is no thresholds file and would be overwritten"):
        by_hand().save(tmp_path / "config.json")
    assert (tmp_path / "config.json").read_bytes() == content
    with pytest.raises(CatsError, match="is a folder"):
        by_hand().save(tmp_path)


def edited(path, **changes):
    document = json.loads(path.read_text())
    document.update(changes)
    path.write_text(json.dumps({key: value for key, value in document.items() if value is not None}))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"schema": 2}, "has schema 2, this version reads 1"),
        ({"schema": None}, "has schema None"),
        ({"values": None}, "lacks 'values'"),
        ({"model": None}, "lacks 'model'"),
        ({"model": {"intermediate_sizes": 96}}, "'intermediate_sizes' are not whole numbers"),
        ({"model": {"intermediate_sizes": [96.0, 96]}}, "'intermediate_sizes' are not whole numbers"),
        ({"model": {"gate_signs": 7}}, "'gate_signs' is not text"),
        ({"grid": "many"}, "'grid' is not a list"),
        ({"grid": [0.0, "0.5", 1.0]}, "'grid' holds something that is no number"),
        ({"values": [[0, True, 2], [0, 1, 2]]}, "'values' holds something that is no number"),
        ({"values": [[0, 1, 2], [0, 1]]}, "is inconsistent"),
        ({"tokens": -1}, "'tokens' is negative"),
        ({"tokens": 1.5}, "'tokens' is not a number"),
        ({"tokens": True}, "'tokens' is not a number"),
        ({"tokens": "10"}, "'tokens' is not a number"),
        ({"grid_error": -0.1}, "'grid_error' is no share"),
        ({"grid_error": "0"}, "'grid_error' is not a number"),
        ({"activation": "tanh"}, "activation 'tanh' is not known"),
        ({"activation": 3}, "'activation' is not a str"),
        ({"corpus": []}, "'corpus' is not a dict"),
        ({"values": [[0, 1, 2]]}, "is inconsistent"),
        ({"values": [[0, 2, 1], [0, 1, 2]]}, "is inconsistent"),
        ({"values": [[0, 1], [0, 1]], "shape": [2, 2]}, "is inconsistent"),
        ({"values": [[0, 1, -1], [0, 1, 2]]}, "is inconsistent"),
        ({"values": [[0, 1, float("inf")], [0, 1, 2]]}, "Infinity is no number"),
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


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        ('"tokens": 10', '"tokens": 10, "tokens": 11', "'tokens' stands in it twice"),
        ('"tokens": 10', '"tokens": 1e999', "1e999 is out of range"),
        ('"tokens": 10', f'"tokens": {10**400}', "is out of range"),
        ('"grid_error": 0.01', '"grid_error": NaN', "NaN is no number"),
        ('"policy": {', '"policy": {"a": ' + "[" * 100_000 + "]" * 100_000 + ", ", "nested too deeply"),
    ],
)
def test_numbers_and_names_that_json_does_not_have_are_refused(tmp_path, old, new, reason):
    path = tmp_path / "t.json"
    by_hand().save(path)
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))
    with pytest.raises(CatsError, match=f"not valid JSON.*{reason}"):
        Thresholds.load(path)


def test_a_byte_order_mark_is_read_over(tmp_path):
    path = tmp_path / "t.json"
    by_hand().save(path)
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert equal(Thresholds.load(path), by_hand())


def test_truncated_missing_and_foreign_files(tmp_path):
    path = tmp_path / "t.json"
    by_hand().save(path)
    text = path.read_text()
    for cut in (0, 10, len(text) // 2, len(text) - 3):
        path.write_text(text[:cut])
        with pytest.raises(CatsError, match=r"not valid JSON .it may be truncated"):
            Thresholds.load(path)
    path.write_text("[1, 2]")
    with pytest.raises(CatsError, match="no object of names and values"):
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


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"scale": torch.ones(3, 79)}, "intermediate size 79 in layer 0"),
        ({"values": torch.zeros(3, 7, 2)}, "intermediate size 7 in layer 0"),
        ({"model": {"intermediate_sizes": [80, 80]}}, "name 2 sizes for 3 layers"),
        ({"model": {}, "activation": "gelu"}, "gelu gates"),
    ],
)
def test_shapes_that_do_not_fit_are_refused_before_anything_is_changed(changes, reason):
    model = toy()
    thresholds = dataclasses.replace(constant_thresholds(model), **changes)
    with pytest.raises(CatsError, match=reason):
        sparsify(model, thresholds, 0.5)
    assert "CatsMLP" not in {type(module).__name__ for module in model.modules()}


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
        size, error = (300_000, 0.001) if thresholds.rule == "cats" else (500_000, 0.002)
        assert file.stat().st_size < size and thresholds.grid_error < error
        assert thresholds.model["id"] == file.stem.removesuffix("-centred")
        assert file.stem.endswith("-centred") == (thresholds.rule == "centred")
        assert thresholds.tokens >= 60_000 and thresholds.corpus["sha256"]


def test_shipped_thresholds_fit_the_embedded_model(smollm):
    for suffix in ("", "-centred"):
        Thresholds.load(paths.THRESHOLDS / f"{smollm.info['id']}{suffix}.json").check(smollm.model)
