"""What is trained on: whole rows, none of them held out too, instructions, and text that cannot be used."""

import inspect
import json
from dataclasses import replace

import peft
import pytest
from finetuning_toys import CATS, read

from cats import paths
from cats.corpora import package_docs, sampled
from cats.errors import CatsError
from cats.finetuning import Recipe, load
from cats.finetuning.data import Example, _row, collate, examples


def test_rows_are_whole_disjoint_from_the_kept_ones_and_a_longer_run_begins_as_a_shorter(loaded, files):
    short, long = read(loaded, files, rows=8), read(loaded, files, rows=500)
    assert {len(ids) for ids, _ in long.train} == {32} and len(long.train) == 500
    assert long.train.rows[:8] == short.train.rows and short.indomain.rows == long.indomain.rows
    assert long.info["passes_begun"] > 1
    kept = {tuple(ids) for ids, _ in long.indomain}
    assert not kept & {tuple(ids) for ids, _ in long.train}
    other = read(loaded, files, rows=8, seed=1)
    assert other.train.rows != short.train.rows and other.indomain.rows == short.indomain.rows
    assert other.info["train"] == short.info["train"] and len(short.info["train"]["sha256"]) == 64


def test_the_loss_of_an_instruction_is_on_its_response_alone(loaded, files):
    found, about = examples(str(files / "instructions.jsonl"), "train", None)
    assert about["documents"] == len(found) == 30
    ids, skipped = _row(found[0], loaded.tokenizer, 32)
    batch = collate([(ids, skipped), _row(Example("a", "no"), loaded.tokenizer, 32)], pad=0)
    targets = batch["labels"][0][batch["labels"][0] != -100].tolist()
    assert loaded.tokenizer.decode(targets, skip_special_tokens=True) == "yes"
    assert targets[-1] == loaded.tokenizer.eos_token_id
    assert batch["attention_mask"].sum(1).tolist() == [len(ids), 4]
    cut, skipped = _row(Example("x" * 100, "yes"), loaded.tokenizer, 16)
    assert len(cut) == 16 and skipped == 12


@pytest.mark.parametrize(
    ("train", "heldout", "message"),
    [
        ("empty.txt", "other.txt", "empty"),
        ("short.txt", "other.txt", "too short"),
        ("train.txt", "train.txt", "the training text itself"),
        ("train.txt", "instructions.jsonl", "not of one form"),
        ("task:nosuch", "task:nosuch", "no form for the task"),
        ("absent.txt", "other.txt", "no corpus file"),
    ],
)
def test_text_that_cannot_be_trained_on_is_said_in_a_sentence(
    loaded, files, monkeypatch, train, heldout, message
):
    monkeypatch.chdir(files)
    (files / "empty.txt").write_text("\n\n")
    (files / "short.txt").write_text("a cat sat\n\n\non a mat\n")
    with pytest.raises(CatsError, match=message):
        load(train, heldout, loaded.tokenizer, rows=4, sequence_length=32)


def test_package_docs_are_the_docstrings_of_installed_packages_once(monkeypatch, tmp_path):
    monkeypatch.setattr(package_docs, "PACKAGES", {"peft": "peft", "absent": "no-such-package"})
    monkeypatch.setattr(paths, "CACHE", tmp_path)
    keyed, extra = package_docs.package_docs()
    assert list(extra["packages"]) == ["peft"] and len(keyed) > 10
    assert any(inspect.getdoc(peft.LoraConfig) in text for _, text in keyed)
    paragraphs = [text for _, text in keyed]
    assert len(set(paragraphs)) == len(paragraphs)
    assert package_docs.package_docs() == (keyed, extra) and len(list(tmp_path.iterdir())) == 1


def test_text_sampled_from_the_dense_model_is_written_once(loaded, tmp_path):
    path, about = sampled.sampled(loaded, 5, 24, tmp_path)
    lines = path.read_text()
    assert len(lines.splitlines()) == 5 and about["sampled_from"]["id"] == "toy-llama"
    path.write_text(lines + lines)
    assert sampled.sampled(loaded, 5, 24, tmp_path)[0].read_text() == lines + lines
    path.unlink()
    assert sampled.sampled(loaded, 5, 24, tmp_path)[0].read_text() == lines


def test_every_method_reads_the_same_rows_and_the_unequal_setting_says_which_do_not():
    equal = [Recipe(**method) for method in ({}, CATS, {"rule": "relufication"})]
    assert {recipe.rows_a_step() for recipe in equal} == {16}
    unequal = [replace(recipe, unequal=True) for recipe in equal]
    assert [recipe.rows_a_step() for recipe in unequal] == [16, 16, 8]
    assert [recipe.rows_a_step(instructions=True) for recipe in unequal] == [2, 16, 16]
    assert Recipe().accumulation(4) == 4
    with pytest.raises(CatsError, match="no multiple of 3"):
        Recipe().accumulation(3)


def test_a_mirror_with_one_split_is_cut_and_questions_on_one_passage_stay_together(tmp_path):
    folder = tmp_path / "boolq"
    folder.mkdir()
    rows = [{"passage": f"P{n // 3}.", "question": f"is {n} even", "label": n % 2} for n in range(60)]
    (folder / "validation.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    parts = [examples("task:boolq", split, str(tmp_path)) for split in ("train", "validation")]
    (train, about), (held, _) = parts
    passages = [{each.prompt.split(".")[1] for each in found} for found, _ in parts]
    assert len(train) + len(held) == 60 and not passages[0] & passages[1] and len(train) > len(held) > 0
    assert about["split"] == "validation, its train part"
    assert {each.response for each in train} == {"yes", "no"}
