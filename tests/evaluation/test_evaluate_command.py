"""The command `cats evaluate`, beside lm-eval's own command line and in two processes."""

import json
import sys

import numpy as np
import pytest
import two_processes
from evaluation_toys import TEXT, loaded

import cats_cli
from cats import CatsError, Thresholds, calibrate_centred
from cats.evaluation.evaluator import Evaluator
from cats.evaluation.method import Method
from cats.evaluation.result import Result
from cats.evaluation.table import load_results


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tasks", "pika"], "Unknown task 'pika'"),
        (["--rule", "kats"], "Unknown rule 'kats'"),
        (["--sparsity", "1.5"], "outside [0, 1)"),
        (["--last-share", "0"], "outside (0, 1]"),
        (["--data-dir", "/nowhere/at/all"], "does not exist"),
        (["--dtype", "nosuch"], "Unknown dtype 'nosuch'"),
        (["--device", "nosuch", "--dry-run"], "Unknown device 'nosuch'"),
        (["--corpus", "nosuch", "--dry-run"], "Unknown corpus 'nosuch'"),
        (["--corpus", "python-docs+sampled:", "--dry-run"], "how many texts"),
        (["--tasks", "text:nosuch", "--dry-run"], "Unknown corpus 'nosuch'"),
    ],
)
def test_what_is_wrong_is_one_sentence(arguments, message, capsys):
    assert cats_cli.main(["evaluate", "--tasks", "piqa", *arguments]) == 2
    error = capsys.readouterr().err.strip()
    assert message in error and error.startswith("cats: ") and "\n" not in error


def test_an_output_that_cannot_be_is_said_before_the_model_loads(folder, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    arguments = ["--tasks", "piqa", "--data-dir", str(folder), "--output", str(tmp_path / "file")]
    assert cats_cli.main(["evaluate", *arguments]) == 2
    assert "file cannot be made (file exists): name another." in capsys.readouterr().err


def test_a_thresholds_file_takes_the_place_of_a_calibration(folder, tmp_path):
    toy, method = loaded(), Method("centred", 0.5)
    thresholds = calibrate_centred(toy.model, TEXT.batches(toy.tokenizer, "cpu"), progress=False)
    thresholds.save(tmp_path / "c.json")
    (path,) = Evaluator(toy, tmp_path, data_dir=folder, calibration=TEXT).run(
        ["arc_easy"], [method], progress=False
    )
    file = Thresholds.load(tmp_path / "c.json")
    by_file = Evaluator(toy, tmp_path, data_dir=folder, thresholds=file)
    (other,) = by_file.run(["arc_easy"], [method], progress=False)
    assert path.name != other.name
    first, second = Result.load(path), Result.load(other)
    assert first.metrics == second.metrics and first.sparsity == second.sparsity
    with pytest.raises(CatsError, match="are for the rule centred, not cats"):
        by_file.run(["arc_easy"], [Method("cats", 0.5)], progress=False)


def test_lm_evals_own_command_line_gives_the_same_numbers(folder, tmp_path, monkeypatch, capsys):
    """A folder of save_pretrained through `cats lm_eval`, its task a YAML over the same file."""
    toy = loaded()
    one = Evaluator(toy, tmp_path / "runs", data_dir=folder, calibration=TEXT)
    method = Method("chess", 0.5)
    (path,) = one.run(["arc_easy"], [method], progress=False)
    with one._applied(method):
        toy.model.save_pretrained(tmp_path / "model")
    toy.tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "copy.yaml").write_text(
        "task: arc_copy\n"
        "dataset_path: json\n"
        f"dataset_kwargs: {{data_files: {{test: {folder}/arc_easy/test.jsonl}}}}\n"
        "test_split: test\n"
        "output_type: multiple_choice\n"
        'doc_to_text: "Question: {{question}}\\nAnswer:"\n'
        'doc_to_target: "{{choices.label.index(answerKey)}}"\n'
        'doc_to_choice: "{{choices.text}}"\n'
        "metric_list: [{metric: acc}, {metric: acc_norm}]\n"
    )
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(sys, "argv", ["cats"])
    arguments = [
        *(
            "--model",
            "hf",
            "--model_args",
            f"pretrained={tmp_path / 'model'},dtype=float32",
            "--device",
            "cpu",
        ),
        *("--include_path", str(tmp_path / "tasks"), "--tasks", "arc_copy", "--batch_size", "4"),
        *("--output_path", str(tmp_path / "theirs.json"), "--log_samples"),
    ]
    assert cats_cli.main(["lm_eval", *arguments]) == 0
    (found,) = tmp_path.glob("**/samples_arc_copy*.jsonl")
    samples = [json.loads(line) for line in found.read_text().splitlines()]
    samples.sort(key=lambda sample: sample["doc_id"])
    result = Result.load(path)
    assert [sample["acc"] for sample in samples] == result.scores["acc"].tolist()
    assert [sample["acc_norm"] for sample in samples] == result.scores["acc_norm"].tolist()


@pytest.mark.parametrize("device", two_processes.DEVICES)
def test_two_processes_give_what_one_gives(folder, tmp_path, device):
    toy = loaded()
    toy.model.save_pretrained(tmp_path / "model")
    toy.tokenizer.save_pretrained(tmp_path / "model")
    arguments = [
        *("evaluate", "--model", str(tmp_path / "model"), "--data-dir", str(folder), "--documents", "3"),
        *("--tasks", "piqa", "gsm8k", "--rule", "cats", "--tokens", "1024", "--device", device),
    ]
    assert cats_cli.main([*arguments, "--output", str(tmp_path / "one")]) == 0
    # accelerate itself starts several processes on GPUs alone; what it tells them, torchrun tells too
    two_processes.run("cats.evaluation.command", *arguments, "--output", str(tmp_path / "two"))
    ones, twos = (load_results(sorted((tmp_path / name).glob("*.json"))) for name in ("one", "two"))
    assert [each.method["processes"] for each in twos] == [2] * 4
    for one, two in zip(ones, twos, strict=True):
        assert one.documents == two.documents and one.texts == two.texts
        for metric, values in one.scores.items():
            np.testing.assert_allclose(two.scores[metric], values, atol=1e-4)
        for phase, realised in one.sparsity["realised"].items():
            assert two.sparsity["realised"][phase]["tokens"] == realised["tokens"]
            assert two.sparsity["realised"][phase]["gate_sparsity"] == pytest.approx(
                realised["gate_sparsity"], abs=1e-4
            )
