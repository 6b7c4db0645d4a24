"""The evaluator: calibration, results by identity, interruption, tables and records."""

import json

import numpy as np
import pytest
import torch
import toys
from evaluation_toys import evaluator, loaded, mirrors

from cats import paths
from cats.corpora import Calibration
from cats.criteria.masking import Policy
from cats.errors import CatsError
from cats.evaluation.evaluator import Evaluator
from cats.evaluation.method import Method, methods
from cats.evaluation.result import Result
from cats.evaluation.table import load_results, results_table, write_records
from cats.records import packing


def test_rules_calibrate_on_several_corpora_and_on_text_of_the_model(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "CACHE", tmp_path)
    mixed = Calibration(corpus="python-docs+sampled:24", split="all", tokens=400, sequence_length=32)
    given = Evaluator(loaded(), tmp_path, data_dir=folder, calibration=mixed, batch_tokens=400)
    path = given.run(["piqa"], [Method("cats", 0.5)], progress=False)[0]
    calibrated = Result.load(path).method["calibrated"]
    (written,) = (tmp_path / "sampled").iterdir()
    assert calibrated["corpus"]["name"] == f"python-docs + {written.name}"
    assert calibrated["tokens"] == 400
    first, second = given._batches[:2]
    assert len(first["input_ids"]) == len(second["input_ids"]) == 4
    with pytest.raises(CatsError, match="text that a model writes"):
        Calibration(corpus="sampled:2").batches(given.loaded.tokenizer, "cpu")
    file = tmp_path / "c++.txt"
    file.write_text("the cat sat on a mat")
    named = Calibration(corpus=str(file), split="all", tokens=10).batches(given.loaded.tokenizer, "cpu")
    assert named.info["name"] == "c++.txt"
    with pytest.raises(CatsError, match="how many texts"):
        Calibration(corpus="sampled:x").batches(given.loaded.tokenizer, "cpu", given._sample)


def test_scores_pack_and_unpack():
    bits = np.array([1, 0, 0, 1, 1, 1, 0, 1, 1.0])
    numbers = np.array([[-3.25, 4], [-1.5, 2]])
    for values in (bits, numbers):
        np.testing.assert_array_equal(packing.unpack(json.loads(json.dumps(packing.pack(values)))), values)
    assert len(packing.pack(np.ones(8000))["bits"]) < 1400


def test_an_evaluation_resumes_where_it_was_killed(folder, tmp_path, monkeypatch):
    wanted = methods(["cats", "online", "relufication"], [0.5])
    names = ["piqa", "lambada_openai"]
    whole = evaluator(folder, tmp_path / "whole").run(names, wanted, progress=False)
    assert len(whole) == 8
    saved = []
    real = Result.save

    def dying(self, path):
        if len(saved) == 3:
            raise KeyboardInterrupt
        real(self, path)
        saved.append(path)

    monkeypatch.setattr(Result, "save", dying)
    killed = evaluator(folder, tmp_path / "killed")
    with pytest.raises(KeyboardInterrupt):
        killed.run(names, wanted, progress=False)
    assert not any(type(module).__name__ == "CatsMLP" for module in killed.loaded.model.modules())
    before = {path: path.stat().st_mtime_ns for path in saved}
    monkeypatch.setattr(Result, "save", real)
    found = evaluator(folder, tmp_path / "killed").run(names, wanted, progress=False)
    assert {path.name for path in found} == {path.name for path in whole}
    assert all(path.stat().st_mtime_ns == stamp for path, stamp in before.items())
    for ours, theirs in zip(load_results(sorted(found)), load_results(sorted(whole)), strict=True):
        assert len(ours.documents) == len(set(ours.documents)) == 6
        for metric, values in theirs.scores.items():
            np.testing.assert_allclose(ours.scores[metric], values, atol=1e-4)


def test_a_method_that_another_process_has_taken_is_left_to_it(folder, tmp_path):
    wanted = methods(["cats"], [0.3, 0.6])
    ours = evaluator(folder, tmp_path)
    with ours._claimed(wanted[1], "piqa") as claimed:
        assert claimed
        found = evaluator(folder, tmp_path).run(["piqa"], wanted, progress=False)
    assert [path.name.split("--")[1] for path in found] == ["dense", "cats-0.6"]
    assert ours.finished(["piqa"], wanted) == [wanted[0], wanted[2]]
    assert len(ours.run(["piqa"], wanted, progress=False)) == 3


def test_an_evaluation_stops_when_its_time_is_up(folder, tmp_path):
    assert (
        evaluator(folder, tmp_path).run(["piqa"], methods(["cats"], [0.5]), minutes=0, progress=False) == []
    )


def test_results_are_of_one_identity(folder, tmp_path):
    one = evaluator(folder, tmp_path)
    masked, spared = Method("cats", 0.5), Method("cats", 0.5, Policy(first_token="dense"))
    paths = {
        one.path(masked, "piqa"),
        one.path(spared, "piqa"),
        one.path(Method("cats", 0.7), "piqa"),
        evaluator(folder, tmp_path, documents=3).path(masked, "piqa"),
        evaluator(folder, tmp_path, chat=True).path(masked, "piqa"),
    }
    assert len(paths) == 5
    short = evaluator(folder, tmp_path, text_tokens=8)  # a matter of texts alone
    assert short.path(masked, "piqa") == one.path(masked, "piqa")
    assert short.path(masked, "text:shakespeare") != one.path(masked, "text:shakespeare")
    assert one.path(Method(policy=Policy(prefill="dense")), "piqa") == one.path(Method(), "piqa")


def test_a_damaged_result_is_named(tmp_path):
    path = tmp_path / "piqa--dense--0.json"
    path.write_text('{"schema": 1, "task"')
    with pytest.raises(CatsError, match="damaged: delete it"):
        Result.load(path)


def test_methods_are_checked():
    assert [str(each) for each in methods(["dense", "cats", "relufication"], [0.5, 0.7])] == [
        *("dense", "cats 0.5", "cats 0.7", "relufication")
    ]
    with pytest.raises(CatsError, match="outside"):
        Method("cats", 1.2)
    with pytest.raises(CatsError, match="takes no sparsity"):
        Method("relufication", 0.5)
    with pytest.raises(CatsError, match="Unknown rule"):
        methods(["ct"], [0.5])


def test_an_evaluation_leaves_the_model_dense(folder, tmp_path):
    one = evaluator(folder, tmp_path)
    ids = toys.tokens()
    with torch.no_grad():
        before = one.loaded.model(input_ids=ids).logits
        one.run(["piqa"], methods(["combined", "wanda"], [0.5]), progress=False)
        assert torch.equal(one.loaded.model(input_ids=ids).logits, before)
    assert not any(type(module).__name__ == "CatsMLP" for module in one.loaded.model.modules())


def test_tables_and_records_hold_targets_and_pairs(tmp_path):
    names = ["piqa", "arc_easy", "gsm8k", "wikitext", "text:python-docs"]
    one = evaluator(mirrors(tmp_path / "data", 10), tmp_path / "runs", documents=9)
    found = load_results(one.run(names, methods(["cats"], [0.4]), progress=False))
    rows = results_table(found)
    sparse = rows[rows.rule == "cats"].set_index("task")
    assert (rows[rows.rule == "dense"].realised_sparsity == 0).all()
    assert (sparse.gate_sparsity == 0.4).all()
    assert ((sparse.realised_sparsity - 0.4).abs() < 0.2).all()
    assert sparse.loc["gsm8k", "realised_decode"] > 0 and np.isnan(sparse.loc["piqa", "realised_decode"])
    assert (
        sparse.loc["piqa", "delta_low"] <= sparse.loc["piqa", "delta_acc"] <= sparse.loc["piqa", "delta_high"]
    )
    dense = next(each for each in found if each.task == "piqa" and each.method["rule"] == "dense")
    assert sparse.loc["piqa", "delta_acc"] == pytest.approx(sparse.loc["piqa", "acc"] - dense.metrics["acc"])
    dense_bytes = rows[rows.rule == "dense"].realised_bytes_per_token.iloc[0]
    assert sparse.loc["piqa", "realised_bytes_per_token"] == pytest.approx(
        dense_bytes - 2 * sparse.loc["piqa", "realised_model_sparsity"] * one.shape.block_weights
    )
    assert sparse.loc["piqa", "interval"] == "t" and sparse.loc["piqa", "chance"] == 0.5
    assert np.isfinite(sparse.loc["text:python-docs", "delta_low"])
    written = write_records(found, "toy", parameters={"seed": 0}, folder=tmp_path)
    assert [path.name.split("-")[0] for path in written] == ["generation", "perplexity", "zero_shot"]
    again = json.loads(written[2].read_text())
    bits = next(row["correct"] for row in again["rows"] if row["task"] == "piqa" and row["rule"] == "dense")
    np.testing.assert_array_equal(packing.unpack(bits), dense.scores["acc"])
    assert {each["task"] for each in again["data"]["tasks"]} == {"piqa", "arc_easy"}


def test_results_of_earlier_versions_are_read(folder, tmp_path):
    """Until November 2026 the method stood under "configuration", and no bytes were realised."""
    (path,) = evaluator(folder, tmp_path).run(["piqa"], methods(["cats"], [0.5])[1:], progress=False)
    content = json.loads(path.read_text())
    content["configuration"] = content.pop("method")
    del content["sparsity"]["bytes_realised"]
    path.write_text(json.dumps(content))
    (result,) = load_results([path])
    assert result.method["rule"] == "cats" and result.method["sparsity"] == 0.5
    assert results_table([result]).realised_bytes_per_token.isna().all()
