"""The programs of `cats measure` on toy shapes: they check before they time, and write whole records."""

import math
from types import SimpleNamespace

import pytest
import torch
from cats_kernels import centred as centred_kernel
from transformers import LlamaConfig, LlamaForCausalLM

import cats_cli
from cats import cli
from cats.benchmarking import checks, decode, latency, overlap, timing, workload
from cats.calibration import calibrate as calibration
from cats.errors import CatsError
from cats.models import load as models
from cats.records import record as records

CPU = not torch.cuda.is_available()


def run(program, *arguments):
    """`cats measure PROGRAM --quick ...`; what a user gets wrong is raised."""
    cli.measure(cats_cli.parser().parse_args(["measure", program, "--quick", *map(str, arguments)]))


def toy_model() -> LlamaForCausalLM:
    shape = LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, vocab_size=64, max_position_embeddings=64,
    )  # fmt: skip
    torch.manual_seed(0)
    return LlamaForCausalLM(shape).eval().to("cpu" if CPU else "cuda")


def test_mlp_writes_a_record(monkeypatch, tmp_path, capsys):
    run("mlp", "--shapes", "16x64", "--sparsity", 0.5, "--dense", "dense_eager", "dense_fused",
        "--output", tmp_path)  # fmt: skip
    rows = records.read("mlp_latency", folder=tmp_path).rows
    assert {"dense_best", "dense_fused", "cats", "cats_mask_dense", "cats_gather", "cats_separate"} <= set(
        rows.variant
    )
    best = rows[rows.variant == "dense_best"].iloc[0]
    dense = rows[rows.variant.str.startswith("dense") & (rows.variant != "dense_best")]
    assert best.latency_us == dense.latency_us.min() and best.speedup_over_best_dense == 1
    cats = rows[rows.variant == "cats"]
    assert (cats.realised_sparsity - 0.5).abs().max() <= 24 / 64
    assert torch.tensor(cats.speedup_over_best_dense.tolist()).allclose(
        torch.tensor((best.latency_us / cats.latency_us).tolist())
    )
    assert "16x64" in capsys.readouterr().out


def test_around_centres_at_the_same_bytes(monkeypatch, tmp_path):
    run("centred", "--shapes", "16x128", "--sparsity", 0.5, "--dense", "dense_eager",
        "--output", tmp_path)  # fmt: skip
    rows = records.read("mlp_latency", folder=tmp_path).rows.set_index("variant")
    assert {"dense_best", "cats", "centred"} <= set(rows.index)
    cats, around = (rows.loc[[name]].iloc[0] for name in ("cats", "centred"))
    assert around.bytes_mb == pytest.approx(cats.bytes_mb, rel=0.2), "as near as ranks of 128 neurons allow"
    assert around.union_density < cats.union_density and around.relative_error < 1e-2
    monkeypatch.setattr(centred_kernel, "centred_mlp", lambda x, *rest: torch.zeros_like(x))
    with pytest.raises(CatsError, match="centred is wrong by"):
        run("centred", "--shapes", "16x64", "--sparsity", 0.5, "--dense", "dense_eager")
    with pytest.raises(CatsError, match="leaves no neuron beside A"):
        run("centred", "--shapes", "16x64", "--sparsity", 0.9, "--dense", "dense_eager")


def test_batches_and_launch_settings(monkeypatch, tmp_path, capsys):
    run("batch", "--shape", "16x64", "--batch-sizes", 3, "--sparsity", 0.5, "--dense", "dense_eager",
        "--output", tmp_path)  # fmt: skip
    rows = records.read("mlp_latency", folder=tmp_path).rows
    cats = rows[rows.variant == "cats"].set_index("correlation").union_density
    assert (rows.batch == 3).all()
    assert cats[0.9].mean() < cats[0.0].mean(), "inputs alike need fewer neurons together"
    run("tune", "--shape", "16x64", "--batch-sizes", 2, "--sparsity", 0.5)
    assert "gate_up" in capsys.readouterr().out


def test_a_wrong_kernel_is_not_reported(monkeypatch, tmp_path):
    wrong = {"cats": (lambda x, *rest: torch.zeros_like(x), ("eager",), None)}
    monkeypatch.setattr(latency, "sparse_variants", lambda batch_size: wrong)
    with pytest.raises(CatsError, match="cats is wrong by"):
        run("mlp", "--shapes", "16x64", "--sparsity", 0.5, "--dense", "dense_eager",
            "--output", tmp_path)  # fmt: skip
    assert not list(tmp_path.iterdir())


def test_nan_is_wrong():
    assert workload.relative_error(torch.tensor([math.nan]), torch.ones(1)) == math.inf


@pytest.mark.parametrize("sparsity", (0.0, 0.3, 0.9))
def test_thresholds_are_exact_quantiles(sparsity):
    layers = workload.random_layers(4096, 16, 2, dtype=torch.float32, device="cpu")
    workload.set_sparsity(layers, sparsity)
    for layer in layers:
        assert abs(layer.sparsity - sparsity) <= workload.CLEAR_GAP / 4096
        assert layer.bytes_read() == pytest.approx(4096 * 16 * 4 * (1 + 2 * (1 - layer.sparsity)), rel=1e-6)


@pytest.mark.parametrize("text", ("4096", "axb", "0x5", "1x2x3"))
def test_a_wrong_shape_is_said(text):
    with pytest.raises(CatsError, match="is no shape"):
        workload.shape(text)


def test_decoding_writes_a_record(monkeypatch, tmp_path):
    net = toy_model()
    info = {"id": "toy", "weights": "random", "parameters": 0}
    monkeypatch.setattr(models, "load", lambda *_, **__: models.LoadedModel(net, None, info))
    run("decode", "--models", "llama-2-7b", "--dtype", "float32", "--prompt", 8, "--new", 4,
        "--sparsity", 0.5, "--dense", "generate_eager", "loop", "--sparse", "generate_greedy", "loop",
        "--output", tmp_path)  # fmt: skip
    rows = records.read("decode", folder=tmp_path).rows
    assert list(rows.variant) == ["dense_generate_eager", "dense_loop", "cats_loop", "cats_generate_greedy"]
    dense, cats = rows[:2], rows[2:]
    assert dense.speedup_over_best_dense.max() == 1
    assert (cats.realised_sparsity - 0.5).abs().max() < 0.2
    assert (cats.bound_speedup > 1).all()
    assert (rows.tokens_per_s > 0).all() and (rows.first_token_s > 0).all()


def test_a_token_rate_and_its_first_token_come_from_one_call(monkeypatch):
    clock = iter(range(0, 1000, 5))
    monkeypatch.setattr(decode.time, "perf_counter", lambda: next(clock))
    net = toy_model()
    prompt = torch.arange(8, device=net.device)[None]
    bench = SimpleNamespace(model=net, prompt=prompt, device=net.device, length=14)
    rate, first, tokens = decode.generate(bench, 6)
    assert (rate, first) == (5 / 5, 5) and tokens.shape == (1, 14)
    rate, first, greedy = decode.generate_greedy(bench, 6)
    assert (rate, first) == (5 / 5, 15) and torch.equal(greedy, tokens)


def test_a_step_by_its_kernels(monkeypatch, tmp_path):
    net = toy_model()
    info = {"id": "toy", "weights": "random", "parameters": 0}
    monkeypatch.setattr(models, "load", lambda *_, **__: models.LoadedModel(net, None, info))
    run("step", "--dtype", "float32", "--prompt", 8, "--new", 7, "--sparsity", 0.5,
        "--output", tmp_path)  # fmt: skip
    rows = records.read("decode_step", folder=tmp_path).rows
    for sparsity in (0.0, 0.5):
        found = rows[rows.sparsity == sparsity]
        assert list(found.order) == list(range(len(found))) and len(found) > 10
        assert (found.us > 0).any() and (found.gap_us >= 0).all()


def test_kernels_that_overlap_are_counted_once():
    step = [(0, 10, "a"), (8, 15, "b"), (18, 20, "c")]  # b waits for a, then adds 5; idle from 15 to 18
    events = [(start + at, end + at, name) for at in (0, 30, 60) for start, end, name in step]
    found = timing._one_step(events, 3)
    assert [each["us"] for each in found] == [10, 5, 2]
    assert [each["gap_us"] for each in found] == [10, 0, 3], "the gap before a: from the step before"
    with pytest.raises(CatsError, match="do not repeat"):
        timing._one_step([*events[:-1], (78, 80, "d")], 3)


def test_a_report_of_the_checks(monkeypatch, tmp_path, capsys):
    run(
        "checks",
        "--tools",
        "plain",
        "--select",
        "test_what_does_not_fit_is_said",
        "--output",
        tmp_path,
    )
    row = records.read("checks", folder=tmp_path).rows.iloc[0]
    assert (row.file, row.outcome) == (
        "test_kernels",
        "passed",
    ) and "1 of 1 passed" in capsys.readouterr().out


def test_what_the_sanitizer_counted():
    assert checks.findings("x\n========= ERROR SUMMARY: 0 errors\n") == 0
    assert checks.findings("========= RACECHECK SUMMARY: 3 hazards displayed (3 errors, 0 warnings)\n") == 3
    with pytest.raises(CatsError, match="no summary"):
        checks.findings("Segmentation fault")


def test_union_densities(monkeypatch):
    net = toy_model()
    batches = [{"input_ids": torch.randint(0, 64, (1, 16), device=net.device)} for _ in range(8)]
    ones = [{**each, "attention_mask": torch.ones_like(each["input_ids"])} for each in batches]
    thresholds = calibration.calibrate(net, ones, progress=False)
    rows = overlap.unions(net, thresholds, 0.5, batches, [1, 4])
    density = {(row["kind"], row["rows"]): row["union_density"] for row in rows}
    for kind in ("consecutive", "different"):
        assert 0.3 < density[kind, 1] < density[kind, 4] <= 1
    assert rows[0]["independent_density"] == pytest.approx(1 - rows[0]["realised_sparsity"])
