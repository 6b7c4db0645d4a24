"""`cats finetune`: what it prints, and what it refuses before anything is trained."""

import json
import shutil

import pytest
import two_processes
from finetuning_toys import COMMAND, PLAN

import cats_cli
from cats import paths
from cats.errors import CatsError
from cats.finetuning import plan


@pytest.mark.parametrize(
    ("value", "message"),
    {
        "stepps: 3": "Unknown key 'stepps' in plan.yml",
        "methods: dense": "methods in plan.yml is 'dense', but must be a list",
        "methods: [{5: 0.5}]": "is a name, or a name with sparsities",
        "steps: many": "steps in plan.yml is 'many', but must be a whole number",
        "lr: 1e": "lr in plan.yml is '1e', but must be a number",
        "seeds: []": "but must be a list of whole numbers",
        "seeds: [-1]": "cannot be negative",
        "grid: [one]": "but must be a whole number or a list",
        "save: maybe": "but must be true or false",
        "heldout_rows: 0": "too small: use 1",
        "thresholds: 5": "but must be text",
        'thresholds: ""': "thresholds in plan.yml is empty",
        "train:": "train in plan.yml is None, but must be text",
        "weight_decay: .inf": "weight_decay in plan.yml is inf, but must be a number",
        "calibration: {tokens: 0}": "calibration tokens=0 is too small",
        "zero_shot: {documents: 0}": "zero_shot documents=0 is too small",
        "calibration: {corpsu: x}": "Unknown key 'corpsu' in the calibration of plan.yml: use corpus, se",
        "zero_shot: {tasks: piqa}": "tasks in the zero_shot of plan.yml is 'piqa', but must be a list",
    }.items(),
)
def test_a_wrong_value_in_a_plan_says_what_it_must_be(tmp_path, value, message):
    (tmp_path / "plan.yml").write_text(
        f"defaults: {{model: toy, record: toy, methods: [dense]}}\nruns: [{{{value}}}]"
    )
    with pytest.raises(CatsError, match=message):
        plan.read(tmp_path / "plan.yml")


def test_a_dry_run_reads_the_text_to_calibrate_on(here, capsys):
    (here / "plan.yml").write_text(PLAN.replace("corpus: train.txt", "corpus: nosuch"))
    assert cats_cli.main(["finetune", "--plan", "plan.yml", "--dry-run"]) == 2
    assert "Unknown corpus 'nosuch'" in capsys.readouterr().err


@pytest.mark.parametrize(("batch", "rows"), [(1, 1), (6, 3), (8, 4)])
def test_rows_at_once_follow_the_batch(here, monkeypatch, batch, rows):
    found = []
    monkeypatch.setattr(plan, "check", lambda wanted: found.extend(wanted[0].recipes) or [])
    assert cats_cli.main([*COMMAND.split(), "--batch", str(batch), "--dry-run"]) == 0
    assert {recipe.rows_at_once for recipe in found} == {rows}


def test_the_command_fine_tunes_and_prints_the_end_of_each_curve(here, capsys):
    assert cats_cli.main([*COMMAND.split(), "--steps", "2", "--distil", "0.5", "--method", "cats:0.5"]) == 0
    printed = capsys.readouterr()
    assert "cats 0.5" in printed.out and "finetuning-toy.json" in printed.out
    assert "step 2 of 2, held-out" in printed.err


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"FSDP_VERSION": "1"}, "Set fsdp_version to 2"),
        ({"FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT"}, "to FULL_STATE_DICT: the model is put together"),
        ({"FSDP_CPU_RAM_EFFICIENT_LOADING": "true"}, "to false: every process loads"),
    ],
)
def test_settings_of_fsdp_that_do_not_work_here_are_refused(here, capsys, monkeypatch, setting, message):
    for name, value in {**two_processes.SHARDED, **setting}.items():
        monkeypatch.setenv(name, value)
    assert cats_cli.main(COMMAND.split()) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--method cats", "cats needs a sparsity: cats:0.5"),
        ("--output train.txt", "The folder train.txt cannot be made (file exists)"),
        ("--output train.txt/runs", "cannot be made (not a directory)"),
        ("--method cats:half", "no number after its colon"),
        ("--method relufication:0.5", "takes no sparsity"),
        ("--method nosuch:0.5", "Unknown rule"),
        ("--method relufication --anneal 0.5", "no thresholds to anneal"),
        ("--anneal 0.5 --learn-thresholds", "choose one"),
        ("--tuning qlora", "Unknown tuning"),
        ("--distil 2", "outside [0, 1]"),
        ("--lr 0", "outside (0, 1)"),
        ("--steps -1", "cannot be negative"),
        ("--batch 5 --rows-at-once 2", "no multiple of 2"),
        ("--train nosuch", "Unknown corpus"),
        ("--train other.txt", "the training text itself"),
        ("--train sampled:many", "how many texts"),
        ("--train sampled: --dry-run", "how many texts"),
        ("--batch 3 --rows-at-once 2 --dry-run", "no multiple of 2"),
        ("--thresholds good.json --dry-run", "thresholds are for 30 layers"),
        ("--best accuracy --dry-run", "train on task:<name>"),
        ("--device nosuch --dry-run", "use cpu or cuda"),
        ("--model nosuch", "Unknown model"),
        ("--device cuda:1", "use cpu or cuda"),
        ("--thresholds absent.json", "cannot be read"),
        ("--method wanda:0.5 --dry-run", "cannot be fine-tuned"),
        ("--method refit-centred:0.5 --dry-run", "cannot be fine-tuned"),
        ("--method centred:0.5 --anneal 0.5 --dry-run", "no thresholds to anneal"),
        ("--method cats:0.5 cats:0.5 --dry-run", "names a method twice"),
        ("--sequence-length 100000 --dry-run", "can read: use "),
        ("--output train.txt/runs --dry-run", "cannot be made (not a directory)"),
        ("--records train.txt --dry-run", "The folder train.txt cannot be made (file exists)"),
        ("--output taken --dry-run", "The folder taken/toy cannot be made (file exists)"),
        ("--plan= --dry-run", "--plan is empty"),
        ("--thresholds= --dry-run", "--thresholds is empty"),
        ("--records= --dry-run", "--records is empty"),
        ("--lr 1e999 --dry-run", "lr in the command line is inf, but must be a number"),
        ("--distil nan --dry-run", "distil in the command line is nan, but must be a number"),
        ("--steps 1000000000 --dry-run", "too many to have in memory"),
        (f"--batch {10**400} --rows-at-once 1 --dry-run", "is more than 2,147,483,647"),
        (f"--heldout-rows {10**9 + 1} --dry-run", "heldout_rows is more than 1,000,000,000"),
        (f"--seed {2**32} --dry-run", "4294967296 is more than 2,147,483,647"),
        (f"--recalibrate {10**12} --dry-run", "recalibrate is more than"),
        (
            "--train gap-instructions.jsonl --heldout other-instructions.jsonl",
            "Row 2 of gap-",
        ),
        (
            "--train other-instructions.jsonl --heldout more-instructions.jsonl --best accuracy",
            "a few answers",
        ),
    ],
)
def test_what_cannot_be_fine_tuned_is_said_in_one_sentence(here, capsys, options, message):
    shutil.copy(paths.THRESHOLDS / "smollm2-135m-instruct.json", here / "good.json")
    (here / "taken").mkdir()
    (here / "taken" / "toy").write_text("")
    for name in ("gap", "other", "more"):
        rows = [{"prompt": f"{name} {n}", "response": f"answer {n}"} for n in range(40)]
        rows[1]["response"] = "" if name == "gap" else "another"
        (here / f"{name}-instructions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert cats_cli.main([*COMMAND.split(), *options.split()]) == 2
    printed = capsys.readouterr().err.strip().splitlines()
    assert printed[-1].startswith("cats: ") and message in printed[-1]


@pytest.mark.parametrize("record", ["a/b", "../up", "", "Toy", "é", "x" * 5000])
def test_a_record_has_a_name_that_a_file_can_have(record):
    with pytest.raises(CatsError, match=r"record name|is empty"):
        plan.comparison({"model": "toy", "record": record, "methods": ["dense"]}, "plan.yml")


@pytest.mark.parametrize("model", ["Org/Model-É 7B", "..", "x" * 150, "./toy/"])
def test_the_record_of_a_command_is_named_after_any_model(monkeypatch, model):
    found = []
    monkeypatch.setattr(plan, "check", lambda wanted: found.extend(wanted) or [])
    assert cats_cli.main(["finetune", "--model", model, "--dry-run"]) == 0
    assert found[0].record
