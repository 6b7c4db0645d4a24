"""What a chapter measures itself with `-p source measure`."""

import pytest
import torch

from cats.benchmarking import timing
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
