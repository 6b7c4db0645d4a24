"""What is measured on a CPU: checked first, in turns, whole rows; never how fast."""

import pytest
import torch
import toys

import cats_cli
from cats import cli
from cats.benchmarking import cpu, cpu_timing
from cats.core.structure import cats_mlps
from cats.errors import CatsError
from cats.models import load as models
from cats.records import record as records


@pytest.fixture(autouse=True)
def little(monkeypatch):
    monkeypatch.setattr(cpu_timing, "ROTATED_BYTES", 2**16)
    monkeypatch.setattr(cpu_timing, "read_bandwidth", lambda: 10.0)


@pytest.mark.parametrize("batch_size", (1, 2))
@pytest.mark.parametrize("dtype", ("float32", "bfloat16"))
def test_rows_of_latency(dtype, batch_size):
    found = cpu_timing.mlp_latency(24, 40, (0.0, 0.5), dtype=dtype, batch_size=batch_size, seconds=0.0)
    assert [(row["variant"], row["sparsity"]) for row in found] == [
        ("dense_eager", 0.0), ("cats", 0.0), ("cats", 0.5), ("dense_best", 0.0),
    ]  # fmt: skip
    assert set(records.COLUMNS["mlp_latency"]) <= set(found[0])
    dense, _, half, best = found
    assert dense["latency_us"] == best["latency_us"] and best["speedup_over_best_dense"] == 1
    kept = 0.5 if batch_size == 1 else 0.75
    assert dense["union_density"] == 1 and half["union_density"] == pytest.approx(kept, abs=0.2)
    for row in found:
        density = row["union_density"] if row["variant"] == "cats" else 1
        read = 24 * 40 * torch.finfo(getattr(torch, dtype)).bits / 8 * (1 + 2 * density)
        assert row["bound_share"] == pytest.approx(read / 1e4 / row["latency_us"])


def test_wrong_results_are_not_timed(monkeypatch):
    monkeypatch.setattr(cpu_timing, "cats_mlp", lambda x, *rest: x * 0)
    with pytest.raises(CatsError, match="cats is wrong"):
        cpu_timing.mlp_latency(24, 40, (0.5,), seconds=0.0)
    with pytest.raises(CatsError, match="float8"):
        cpu_timing.mlp_latency(24, 40, dtype="float8")


def test_every_round_runs_every_variant_once():
    order = []
    steps = {name: lambda name=name: order.append(name) for name in "abc"}
    samples = cpu_timing.in_turns(steps, 0.0, 1)
    assert order == list("abc") * 4  # a warm-up and three rounds
    assert all(len(each) == 3 for each in samples.values())


def test_a_speed_up_is_of_the_same_round():
    assert cpu_timing.ratio([2, 20, 200], [1, 10, 100]) == 2


def test_rows_of_decoding_and_the_model_comes_back_dense():
    model = toys.toy("llama")
    info = {"id": "toy", "weights": "random", "dtype": "float32"}
    loaded = models.LoadedModel(model, None, info)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    strides = [value.stride() for value in model.state_dict().values()]
    found = cpu_timing.decode_rate(
        loaded, toys.constant_thresholds(model, most=0.5), toys.tokens(1, 8), (0.0, 0.4),
        new_tokens=4, rounds=2, progress=False,
    )  # fmt: skip
    assert [(row["sparsity"], row["runs"]) for row in found] == [(0.0, 2), (0.4, 2)]
    assert set(records.COLUMNS["decode"]) <= set(found[0])
    assert found[0]["speedup_over_best_dense"] == 1 and found[1]["bound_speedup"] > 1
    with pytest.raises(CatsError):
        cats_mlps(model)
    assert strides == [value.stride() for value in model.state_dict().values()]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.skipif(torch.cuda.is_available(), reason="the program is for a CPU")
def test_the_program_writes_two_records(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(cpu, "decode", lambda name, options: (
        [dict.fromkeys(records.COLUMNS["decode"], 1)], {"id": name, "weights": "random"}, {},
    ))  # fmt: skip
    arguments = ["--shapes", "24x40", "--models", "random:llama-2-7b", "--threads", "1", "2"]
    arguments += ["--output", str(tmp_path)]
    measure = ["measure", "cpu", "--quick"]
    cli.measure(cats_cli.parser().parse_args([*measure, *arguments]))
    rows = records.read("mlp_latency", folder=tmp_path, slug="cpu").rows
    assert sorted(set(rows.threads)) == [1, 2]
    assert records.read("decode", folder=tmp_path, slug="cpu-random-llama-2-7b").rows.shape[0] == 1
    assert "24x40" in capsys.readouterr().out
    with pytest.raises(CatsError, match="--new must be at least 3"):
        cli.measure(cats_cli.parser().parse_args([*measure, "--new", "2"]))
