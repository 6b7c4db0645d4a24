"""Plans, comparisons in two processes and one, and their records."""

import json

import pandas as pd
import pytest
import torch
import two_processes
from finetuning_toys import PLAN
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import cats_cli
from cats import paths
from cats.core.structure import cats_mlps
from cats.finetuning import Recipe, plan, table
from cats.records import record as records


def test_thresholds_may_be_those_of_the_instructions(here, files, capsys):
    (here / "plan.yml").write_text(
        "runs:\n- {model: toy, record: task, methods: [cats: 0.5], device: cpu, dtype: float32, steps: 1,\n"
        f"   train: {files}/instructions.jsonl, heldout: {files}/held-instructions.jsonl, batch: 4,\n"
        "   rows_at_once: 4, sequence_length: 32, lora_r: 4, heldout_rows: 8,\n"
        f"   calibration: {{corpus: {files}/instructions.jsonl, tokens: 300, sequence_length: 16}}}}\n"
    )
    assert cats_cli.main(["finetune", "--plan", "plan.yml"]) == 0
    rows = records.read("finetuning", folder=here / "runs").rows
    assert rows.accuracy.between(0, 1).all() and rows.indomain_accuracy.between(0, 1).all() and len(rows) == 2
    assert rows.delta_acc.isna().all()  # there is no dense run to compare with


def test_the_checkpoint_kept_is_the_first_best_one_and_the_reference_sign_keeps_the_worst():
    curve = pd.DataFrame({"step": [0, 1, 2, 3, 4], "indomain_accuracy": [0.1, 0.7, 0.6, 0.9, 0.9]})
    assert table.kept(curve) == 3 and table.kept(curve, reference_sign=True) == 2


def test_accuracy_is_compared_with_the_dense_run_row_by_row():
    points = {"dense": [1, 1, 0, 0] * 2, "cats": [1, 0, 0, 0] * 2}
    done = [
        (Recipe(rule=rule, sparsity=0.5 if rule == "cats" else None), found)
        for rule, right in points.items()
        for found in [{"after": {}, "points": [answered(right)]}]
    ]
    first, second = table.rows("toy", done)
    assert first["delta_acc"] == 0 and second["delta_acc"] == -0.25 and second["delta_nll"] == 0
    assert second["delta_acc_low"] <= -0.25 <= second["delta_acc_high"]


def test_the_gap_to_dense_has_an_interval_over_seeds():
    """Student's t of two degrees of freedom is 4.3027 at 95 %."""
    gaps = {"dense": [0.0, 0.0, 0.0], "cats 0.5": [0.1, 0.2, 0.3], "once": [0.4]}
    row = {"realised_sparsity": None, "heldout_nll_nats": 1.0}
    rows = [
        {"method": method, "seed": seed, "step": step, "delta_nll": gap * step, **row}
        for method, found in gaps.items()
        for seed, gap in enumerate(found)
        for step in (0, 1)
    ]
    _, several, once = table.over_seeds(rows)
    half = 4.302653 * 0.1 / 3**0.5
    assert several == pytest.approx(
        {"method": "cats 0.5", "seeds": 3, "delta": 0.2, "low": 0.2 - half, "high": 0.2 + half}
    )
    assert once == {"method": "once", "seeds": 1, "delta": 0.4, "low": None, "high": None}
    assert table.ends(rows)[-1] == "cats 0.5: +0.2000 nats from dense [-0.0484, +0.4484] over 3 seeds"


def answered(right: list[int]) -> dict:
    rows = [[2.0, 1, each] for each in right]
    known = {"heldout_nll": 2.0, "indomain_nll": 2.0, "train_loss": None, "rows_trained": 0}
    return known | {"step": 0, "heldout_accuracy": sum(right) / len(right), "heldout_rows": rows}


def test_what_a_step_took_is_held_against_the_dense_run_of_its_seed():
    runs = [
        {"method": "cats 0.5", "seed": 1, "step_s": 3.0, "peak_memory_gb": 12.0},
        {"method": "dense", "seed": 0, "step_s": 2.0, "peak_memory_gb": 10.0},
        {"method": "dense", "seed": 1, "step_s": 4.0},
        {"method": "cats 0.5", "seed": 7, "step_s": 3.0},
        {"method": "cats 0.7", "seed": 0},
    ]
    found = table.costs(runs)
    assert [row["time_ratio"] for row in found] == [0.75, 1.0, 1.0, 1.5, None]
    assert [row["memory_ratio"] for row in found] == [None, 1.0, None, None, None]


@pytest.mark.parametrize("path", sorted(paths.DATA.glob("plans/finetuning/*.yml")), ids=lambda p: p.stem)
def test_the_plans_that_are_shipped_can_be_read(path):
    for each in plan.read(path):
        assert {recipe.rows_a_step() for recipe in each.recipes} == {16} or each.recipes[0].unequal
        assert all(recipe.accumulation(1) for recipe in each.recipes)


def test_thresholds_of_a_plan_are_found_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    each = plan.read(paths.DATA / "plans" / "finetuning" / "step.yml")[0]
    assert each.load_thresholds().layers == 30 and each.thresholds.startswith("data/")


def test_a_plan_is_recorded_once_and_compared_with_dense(here, capsys):
    (here / "plan.yml").write_text(PLAN)
    assert cats_cli.main(["finetune", "--plan", "plan.yml", "--dry-run"]) == 0
    assert "{dense, cats 0.5, cats 0.7, relufication} x 1 seed, 3 steps of" in capsys.readouterr().out
    assert not (here / "runs").exists()
    assert cats_cli.main(["finetune", "--plan", "plan.yml", "--minutes", "0"]) == 0
    assert "Time is up" in capsys.readouterr().out and not list(here.glob("runs/*.json"))
    assert cats_cli.main(["finetune", "--plan", "plan.yml"]) == 0
    assert "Everything is recorded." in capsys.readouterr().out
    [path] = (here / "runs").glob("finetuning-toy*.json")
    record = records.read("finetuning", folder=here / "runs", model="toy")
    rows = record.rows
    curves = rows[~rows.method.str.contains("recalibrated")]
    assert set(records.COLUMNS["finetuning"]) <= set(rows)
    assert len(curves) == 4 * 3 and set(curves.step) == {0, 2, 3}
    assert set(curves.groupby("step").rows_trained.unique().map(len)) == {1}
    assert (rows[rows.method == "dense"].delta_nll == 0).all()
    gaps = rows[(rows.method == "cats 0.7") & (rows.step == 0)]
    dense = rows[(rows.method == "dense") & (rows.step == 0)]
    assert gaps.delta_nll.to_numpy() == pytest.approx(
        gaps.heldout_nll_nats.to_numpy() - dense.heldout_nll_nats.to_numpy()
    )
    assert (gaps.delta_low <= gaps.delta_nll).all() and (gaps.delta_nll <= gaps.delta_high).all()
    assert len(rows[rows.method == "cats 0.5 recalibrated"]) == 1
    after = [each for each in record.content["parameters"]["runs"] if each["method"].startswith("cats")]
    assert {each["recalibrated_on_tokens"] for each in after} == {512}
    assert record.content["data"]["heldout"]["name"] == "other.txt"
    assert str(here) not in path.read_text()
    again = AutoModelForCausalLM.from_pretrained(here / "runs" / "toy" / "cats-0.7-seed0" / "model")
    assert [module.sparsity for module in cats_mlps(again)] == [0.7, 0.7]
    assert cats_cli.main(["finetune", "--plan", "plan.yml"]) == 0  # nothing is left, and nothing written
    assert [path] == list((here / "runs").glob("finetuning-toy*.json"))
    (here / "plan.yml").write_text(
        PLAN.replace("steps: 3", "steps: 4").replace("0.5, 0.7], relu", "0.5], relu")
    )
    assert cats_cli.main(["finetune", "--plan", "plan.yml"]) == 0  # more steps: from where the others ended
    longer = records.read("finetuning", folder=here / "runs", steps=4).rows
    assert set(longer.step) == {0, 2, 3, 4}
    same = longer[(longer.method == "dense") & (longer.step < 4)]
    assert same.heldout_nll_nats.tolist() == rows[rows.method == "dense"].heldout_nll_nats.tolist()


@pytest.mark.parametrize("device", two_processes.DEVICES)
def test_two_processes_follow_the_curve_of_one(here, device):
    """Each with the model, and each with a part of its weights."""
    common = (
        "defaults: {model: toy, methods: [cats: 0.5], dtype: float32, steps: 3, batch: 4, rows_at_once: 2,\n"
        "  train: train.txt, heldout: other.txt, heldout_rows: 7, lr: 0.01, sequence_length: 32, lora_r: 4,\n"
        "  calibration: {corpus: train.txt, split: all, tokens: 300, sequence_length: 64},\n"
        "  lora_dropout: 0.0, save: true}\n"
    )
    runs = {"whole": ["distil: 0.5"], "split": ["tuning: lora", "tuning: full"]}
    commands = {}
    for name, given in runs.items():
        lines = [f"- {{record: {name}-{number}, {what}}}\n" for number, what in enumerate(given)]
        (here / f"{name}.yml").write_text(f"{common}runs:\n{''.join(lines)}")
        commands[name] = ["finetune", "--plan", f"{name}.yml", "--device", device]
    two = ("--output", "two")
    two_processes.run("cats.finetuning.command", *commands["whole"], *two, sharded=[*commands["split"], *two])
    for name, given in runs.items():
        assert cats_cli.main([*commands[name], "--output", "one"]) == 0
        for number in range(len(given)):
            slug = f"{name}-{number}"
            ones, twos = (
                json.loads((here / n / f"finetuning-{slug}.json").read_text()) for n in ("one", "two")
            )
            for row, again in zip(ones["rows"], twos["rows"], strict=True):
                assert again["rows_trained"] == row["rows_trained"] == 4 * row["step"]
                columns = ("heldout_nll_nats", "indomain_nll_nats", "train_loss", "realised_sparsity")
                found, expected = ([each[column] or 0.0 for column in columns] for each in (again, row))
                assert found == pytest.approx(expected, rel=1e-5)
            for what in ("model", "checkpoint-3"):
                folders = [here / n / slug / "cats-0.5-seed0" / what for n in ("one", "two")]
                (weights,), (again,) = (sorted(folder.glob("*.safetensors")) for folder in folders)
                again = load_file(again)
                for key, value in load_file(weights).items():
                    torch.testing.assert_close(again[key], value, rtol=0, atol=1e-4)
