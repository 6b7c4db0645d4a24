"""What a chapter measures itself with `-p source measure`."""

import pytest
import torch
from cats_kernels import reference

from cats.benchmarking import dense, timing, workload
from cats.errors import CatsError
from cats.records import record as records

TOY = ("--shapes", "16x64", "--sparsity", 0.5, "--dense", "dense_eager", "--variants", "cats")


def test_records_are_taken_as_they_are():
    assert timing.prefix("recorded", [("no such program", "x")]) == "h100"
    with pytest.raises(CatsError, match='take "recorded", or "measure"'):
        timing.prefix("measured", [])


def test_measuring_writes_the_record_that_the_chapter_reads(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("TRITON_INTERPRET", "0" if torch.cuda.is_available() else "1")
    begin = timing.prefix("measure", [("mlp", "16x64", *TOY, "--quick")], folder=tmp_path)
    found = records.read("mlp_latency", slug=f"{begin}-16x64", folder=tmp_path)
    assert "cats" in set(found.rows.variant) and "16x64" in capsys.readouterr().out


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu_the_program_says_so(tmp_path):
    with pytest.raises(CatsError, match="No CUDA device is visible"):
        timing.prefix("measure", [("mlp", "16x64", *TOY)], folder=tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_ratio_above_the_bytes_is_no_speedup(capsys):
    assert timing.speedup(1.49, 1.5, "dense_eager") == 1.49
    assert timing.speedup(1.51, 1.5, "dense_eager") == 1.51, "within the spread of a timing"
    assert capsys.readouterr().out == ""
    assert timing.speedup(1.6, 1.5, "dense_eager") is None
    said = capsys.readouterr().out
    assert "1.60 x is above the byte ratio 1.50" in said and "dense_eager is weak" in said


def test_the_op_at_threshold_zero_is_a_dense_baseline():
    layers = workload.random_layers(40, 24, 2, dtype=torch.float32, device="cpu")
    baseline = dense.build("dense_by_op", layers)
    for layer in layers:
        expected = reference.cats_mlp(*layer.arguments())
        torch.testing.assert_close(baseline.compute(layer), expected)
    workload.set_sparsity(layers, 0.9)
    never = (*layers[0].arguments()[:4], torch.zeros(()), layers[0].activation)
    torch.testing.assert_close(baseline.step(0), reference.cats_mlp(*never))
