"""Plans: what is checked before anything loads, and what is run, recorded and not repeated."""

from dataclasses import replace

import pytest
import torch
import toys
import yaml
from evaluation_toys import loaded

import cats_cli
from cats import criteria
from cats.errors import CatsError
from cats.evaluation import plan as plans
from cats.evaluation.distributed import Processes
from cats.evaluation.method import Method
from cats.models import load as models
from cats.models import memory
from cats.paths import ROOT
from cats.records import record as records


def test_what_is_finished_of_a_plan_is_recorded_on_request(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(models, "load", lambda *args, **options: loaded())
    monkeypatch.setattr(models, "config", lambda name: toys.toy().config)
    text = {"corpus": "python-docs", "tokens": 1024}
    given = {"model": "toy", "record": "part", "tasks": ["piqa"], "dtype": "float32", "device": "cpu"}
    path = tmp_path / "plan.yml"

    def plan(rules):
        path.write_text(yaml.safe_dump({"runs": [{**given, "calibration": text, "rules": rules}]}))
        return plans.read(path)

    options = {"processes": Processes(0, 1, "cpu"), "data_dir": str(folder), "records": tmp_path / "records"}
    assert plans.execute(plan(["dense", {"cats": [0.5]}]), tmp_path / "runs", **options)
    (tmp_path / "runs" / "part" / "recorded").unlink()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    more = [replace(run, device="cuda") for run in plan(["dense", {"cats": [0.5, 0.7]}])]  # needs none
    assert not plans.execute(more, tmp_path / "runs", so_far=True, **options)
    record = records.read("zero_shot", folder=tmp_path / "records", slug="part")
    assert record.path.name == "zero_shot-part-2.json"
    assert record.content["parameters"]["methods"] == ["dense", "cats 0.5"]
    assert plans.execute(plan(["dense", {"cats": [0.5, 0.7]}]), tmp_path / "runs", **options)
    assert len(records.read("zero_shot", folder=tmp_path / "records", slug="part").rows) == 3


def test_memory_is_estimated_before_loading(monkeypatch):
    config = models.config("random:llama-2-7b")
    assert memory.estimate(config, "bfloat16").weights == pytest.approx(13.48, abs=0.05)
    monkeypatch.setattr(memory, "available", lambda device: 11.0)
    with pytest.raises(CatsError, match=r"needs about 1\d\.\d GB .* cpu has 11\.0 GB free"):
        memory.check("llama", config, "bfloat16", "cpu")


@pytest.mark.parametrize("path", sorted((ROOT / "data" / "plans").glob("*.yml")), ids=lambda path: path.stem)
def test_shipped_plans_are_whole(path):
    runs = plans.read(path)
    assert len({run.record for run in runs}) == len(runs)
    for run in runs:
        assert run.methods[0] == Method()
        assert all(each.rule == "dense" or each.rule in criteria.RULES for each in run.methods)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("runs: [{model: m, record: r, tasks: [piqa], rules: [dense], extra: 1}]", "Unknown key 'extra'"),
        ("runs: [{model: m, record: r, tasks: [piqa]}]", "lacks rules"),
        ("runs: [{model: m, record: r, tasks: [pika], rules: [dense]}]", "Unknown task 'pika'"),
        ("runs: [{model: m, record: r, tasks: [piqa], rules: [{catz: 0.5}]}]", "Unknown rule 'catz'"),
        ("runs: [{model: m, record: r, tasks: [piqa], rules: [cats]}]", "cats needs a sparsity"),
        (
            "runs: [{model: m, record: r, tasks: [piqa], rules: [dense], policy: {mask: 1}}]",
            "Unknown key .mask. in the policy",
        ),
        ("models: []", "needs a list `runs`"),
        ("runs: []", "needs a list `runs`"),
        ("{defaullts: {}, runs: [{model: m}]}", "Unknown key 'defaullts' in .*: use defaults, runs"),
        ("{defaults: 5, runs: [{model: m}]}", "defaults in .* is 5, but must be keys with values"),
        ("runs: {model: m}", "must be a list, each of keys with values"),
        ("runs: [smollm2]", "must be a list, each of keys with values"),
        ("\xff", "not valid YAML"),
        ("runs: [", "not valid YAML"),
    ],
)
def test_a_wrong_plan_says_where(tmp_path, text, message):
    path = tmp_path / "plan.yml"
    path.write_text(text, encoding="latin-1")
    with pytest.raises(CatsError, match=message):
        plans.read(path)


@pytest.mark.parametrize(
    ("value", "message"),
    {
        "tasks: 5": "tasks in plan.yml is 5, but must be a list of names",
        "tasks: piqa": "but must be a list of names",
        "tasks: [5]": "but must be a list of names",
        "tasks: []": "but must be a list of names",
        "rules: cats": "but must be a list, each a name",
        "rules: [{5: 0.5}]": "is a name, or a name with a list",
        "model: 5": "model in plan.yml is 5, but must be text",
        "record: 5": "but must be text",
        "batch_tokens: big": "but must be a whole number",
        "batch_tokens: 0": "too small",
        "documents: many": "but must be a whole number",
        "documents: true": "but must be a whole number",
        "text_tokens: -4": "text_tokens=-4 is too small",
        "seed: abc": "but must be a whole number",
        "chat: maybe": "but must be true or false",
        "dtype: fp32": "Unknown dtype 'fp32': use one of float32",
        "calibration: python-docs": "but must be keys with values",
        "calibration: {corpsu: x}": "Unknown key 'corpsu' in the calibration of plan.yml",
        "calibration: {tokens: many}": "tokens in the calibration of plan.yml is 'many'",
        "calibration: {tokens: -4}": "tokens=-4 is too small",
        "policy: {last_share: 1e999}": "last_share in the policy of plan.yml is inf, but must be a number",
        "documents: 1e3": "documents in plan.yml is 1000.0, but must be a whole number",
        f"seed: {10**40}": "but must be a whole number",
        "record: 2026-11-30, documents: 0": "too small",
        "tasks:": "but must be a list of names",
        "policy: {last_share: all}": "last_share in the policy of plan.yml is 'all', but must be a number",
    }.items(),
)
def test_a_wrong_value_in_a_plan_says_what_it_must_be(tmp_path, value, message):
    path = tmp_path / "plan.yml"
    path.write_text(f"defaults: {{model: m, record: r, tasks: [piqa], rules: [dense]}}\nruns: [{{{value}}}]")
    with pytest.raises(CatsError, match=message):
        plans.read(path)


def test_a_plan_is_run_recorded_and_not_repeated(folder, tmp_path, monkeypatch, capsys):
    path = tmp_path / "plan.yml"
    path.write_text(
        "defaults:\n"
        "  {model: toy, dtype: float32, device: cpu, calibration: {corpus: python-docs, tokens: 1024}}\n"
        "runs:\n"
        "  - {record: one, tasks: [piqa], rules: [dense, cats: [0.5]]}\n"
        "  - {record: two, tasks: [arc_easy], rules: [dense], documents: 3}\n"
    )
    monkeypatch.setattr(models, "load", lambda *args, **options: loaded())
    monkeypatch.setattr(models, "config", lambda name: toys.toy().config)
    arguments = [
        "evaluate",
        "--plan",
        str(path),
        "--data-dir",
        str(folder),
        "--output",
        str(tmp_path / "runs"),
    ]
    assert cats_cli.main([*arguments, "--dry-run"]) == 0
    assert "one: toy in float32, 1 task x {dense, cats 0.5}; about 0.0 GB" in capsys.readouterr().out
    assert cats_cli.main([*arguments, "--minutes", "0"]) == 0
    assert "Something is left" in capsys.readouterr().out
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert cats_cli.main([*arguments, "--device", "cuda"]) == 2
    assert "PyTorch sees no GPU here: use device=cpu." in capsys.readouterr().err
    path.write_text(path.read_text().replace("device: cpu", "device: cuda"))
    assert cats_cli.main([*arguments, "--device", "cpu"]) == 0
    assert "Everything is recorded" in capsys.readouterr().out
    recorded = sorted(path.name for path in (tmp_path / "runs").glob("*.json"))
    assert recorded == ["zero_shot-one.json", "zero_shot-two.json"]
    assert cats_cli.main(arguments) == 0
    assert sorted(path.name for path in (tmp_path / "runs").glob("*.json")) == recorded


def test_a_plan_that_is_not_there_is_one_sentence(capsys):
    assert cats_cli.main(["evaluate", "--plan", "/nowhere/plan.yml"]) == 2
    assert "cannot be read" in capsys.readouterr().err
