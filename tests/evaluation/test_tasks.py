"""Tasks by name, their documents, and mirrors that are damaged or missing."""

import json

import pytest
from evaluation_toys import mirrors

from cats.errors import CatsError
from cats.evaluation import corpus_task, lm_eval_task, tasks
from cats.evaluation import mirrors as mirror_files


def test_more_documents_than_a_text_has_are_all_of_it():
    everything = corpus_task.load("text:python-docs", documents=None, seed=0)
    assert corpus_task.load("text:python-docs", documents=10_000, seed=0).corpus == everything.corpus
    assert len(corpus_task.load("text:python-docs", documents=3, seed=0).documents) == 3


def test_tasks_by_name(folder):
    assert tasks.names(["paper"])[:2] == ["winogrande", "piqa"] and len(tasks.names(["paper"])) == 8
    assert tasks.names(["sciq_closed_book", "piqa", "piqa"]) == ["sciq", "piqa"]
    with pytest.raises(CatsError, match="did you mean arc_easy"):
        tasks.names(["arc_eazy"])


def test_copies_that_differ_have_another_name(folder, loaded_tasks):
    assert tasks.load("sciq", data_dir=folder).name == "sciq_closed_book"
    assert loaded_tasks["wikitext"].name == "wikitext_tokenised"
    assert loaded_tasks["boolq"].name == "boolq"
    assert "support" in tasks.load("sciq", data_dir=folder).data["difference"]


def test_a_draw_of_documents_is_seeded(folder):
    first, again, other = (tasks.load("piqa", data_dir=folder, documents=3, seed=seed) for seed in (0, 0, 1))
    assert first.documents == again.documents != other.documents
    assert [request.args for request in first.requests] == [request.args for request in again.requests]
    assert len(first.requests) == 6 and first.data["documents"] == 3 and first.data["of"] == 6


def test_few_shot_examples_come_from_train(loaded_tasks):
    prompt = loaded_tasks["gsm8k"].requests[0].args[0]
    assert prompt.count("Question:") == 6 and loaded_tasks["gsm8k"].shots == 5


def test_missing_and_damaged_mirrors_say_so(tmp_path, monkeypatch):
    broken = mirrors(tmp_path / "data")
    path = broken / "arc_easy" / "test.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole[:-20])
    with pytest.raises(
        CatsError, match=r"arc_easy/test.jsonl is truncated or changed: its sha256 is [0-9a-f]{16}"
    ):
        tasks.load("arc_easy", data_dir=broken)
    (broken / "SHA256SUMS").unlink()
    with pytest.raises(CatsError, match=r"arc_easy/test.jsonl \(sha256 [0-9a-f]{16}\) is truncated"):
        tasks.load("arc_easy", data_dir=broken)
    zipped = broken / "sciq" / "test.jsonl.gz"
    zipped.write_bytes(zipped.read_bytes()[:-9])
    with pytest.raises(CatsError, match=r"sciq/test\.jsonl\.gz"):
        tasks.load("sciq", data_dir=broken)
    (broken / "gsm8k" / "train.jsonl").unlink()
    with pytest.raises(CatsError, match=r"lacks train\.jsonl"):
        tasks.load("gsm8k", data_dir=broken)
    path.write_text('{"question": "a"}\n')
    with pytest.raises(CatsError, match="as lm-eval's task expects"):
        tasks.load("arc_easy", data_dir=broken)
    with pytest.raises(CatsError, match="does not exist"):
        tasks.load("piqa", data_dir=tmp_path / "nowhere")

    def unreachable(*_, **__):
        raise OSError("no network")

    monkeypatch.setattr(lm_eval_task.HfApi, "dataset_info", unreachable)
    monkeypatch.setattr(lm_eval_task.datasets.config, "HF_DATASETS_CACHE", tmp_path)
    with pytest.raises(CatsError, match="--data-dir or CATS_EVAL_DATA"):
        tasks.check(["hellaswag"], broken)


def test_mirrors_keep_line_separators_inside_strings(tmp_path):
    folder = tmp_path / "piqa"
    folder.mkdir()
    row = {"goal": "a\u2028b", "sol1": "c", "sol2": "d", "label": 0}
    (folder / "validation.jsonl").write_text(json.dumps(row, ensure_ascii=False) + "\n")
    splits, digests = mirror_files.read_splits(folder)
    assert splits["validation"][0] == row and list(digests) == ["validation.jsonl"]


@pytest.mark.parametrize("nested", [False, True])
def test_mirrors_without_the_byte_order_mark_and_halves_of_characters(tmp_path, capsys, nested):
    folder = tmp_path / "piqa"
    folder.mkdir()
    goal = ["caf\u00e9 \ud83d!"] if nested else "caf\u00e9 \ud83d!"
    row = {"goal": goal, "sol1": "\ude00", "sol2": "d", "label": 0}
    (folder / "validation.jsonl").write_bytes(b"\xef\xbb\xbf" + json.dumps(row).encode() + b"\n")
    read = mirror_files.read_splits(folder)[0]["validation"][0]
    whole = "caf\u00e9 \ufffd!"
    assert read == {"goal": [whole] if nested else whole, "sol1": "\ufffd", "sol2": "d", "label": 0}
    assert "piqa/validation.jsonl: 2 halves" in capsys.readouterr().err


@pytest.mark.parametrize("content", ['{"a": 1}\n{"a": "x"}\n', "[1]\n", "[" * 100_000], ids=range(3))
def test_mirrors_of_other_rows_are_one_sentence(tmp_path, content):
    folder = tmp_path / "piqa"
    folder.mkdir()
    (folder / "validation.jsonl").write_text(content)
    with pytest.raises(CatsError, match=r"piqa/validation\.jsonl"):
        mirror_files.read_splits(folder)
