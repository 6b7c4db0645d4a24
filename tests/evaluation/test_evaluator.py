"""The evaluation: equal to lm-eval's own, with policies, counts, pairs, and interruption, on toy models and
mirrors."""

import json
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
import toys
import two_processes
import yaml
from evaluation_toys import LENGTH, loaded, mirrors, tokenizer
from lm_eval.models.huggingface import HFLM

import cats_cli
from cats import criteria, paths
from cats.calibration.observe import SparsityMeter
from cats.core.sparsify import sparsify
from cats.criteria.masking import Masking, Policy
from cats.errors import CatsError
from cats.evaluation import corpus_task as texts
from cats.evaluation import intervals as pairs
from cats.evaluation import mirrors as reading
from cats.evaluation import plan as plans
from cats.evaluation import tasks
from cats.evaluation.distributed import Processes
from cats.evaluation.evaluator import Evaluator
from cats.evaluation.hflm import MaskedHFLM
from cats.evaluation.method import Calibration, Method, methods
from cats.evaluation.result import Result, summarise
from cats.evaluation.table import load_results, results_table, write_records
from cats.models import load as models
from cats.models import memory
from cats.paths import ROOT
from cats.records import packing
from cats.records import record as records

KINDS = {
    "piqa": "loglikelihood",
    "arc_easy": "loglikelihood",
    "boolq": "loglikelihood",
    "lambada_openai": "loglikelihood",
    "wikitext": "loglikelihood_rolling",
    "gsm8k": "generate_until",
}
TEXT = Calibration(corpus="python-docs", tokens=2048, sequence_length=128)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return mirrors(tmp_path_factory.mktemp("mirrors"))


@pytest.fixture(scope="module")
def loaded_tasks(folder):
    return {name: tasks.load(name, data_dir=folder) for name in KINDS}


def thin(model, sparsity=0.5):
    """A toy model made sparse by thresholds that need no calibration."""
    return sparsify(model, toys.constant_thresholds(model, most=0.6), sparsity)


def evaluator(folder, output, **options):
    return Evaluator(loaded(), output, data_dir=folder, calibration=TEXT, batch_tokens=400, **options)


def test_more_documents_than_a_text_has_are_all_of_it():
    everything = texts.load("text:python-docs", documents=None, seed=0)
    assert texts.load("text:python-docs", documents=10_000, seed=0).corpus == everything.corpus
    assert len(texts.load("text:python-docs", documents=3, seed=0).documents) == 3


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


@pytest.mark.parametrize("masked", [False, True], ids=["dense", "masked"])
@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma3"])
@pytest.mark.parametrize("name", KINDS)
def test_the_harness_scores_as_lm_eval_does(name, family, masked, loaded_tasks):
    model = toys.toy(family, max_position_embeddings=LENGTH)
    if masked:
        thin(model)
    requests, kind = loaded_tasks[name].requests[:16], KINDS[name]
    theirs = HFLM(pretrained=model, tokenizer=tokenizer(), batch_size=2)
    expected = getattr(theirs, kind)(requests, disable_tqdm=True)
    with Masking(model) as masking:
        ours = MaskedHFLM(model, tokenizer(), masking=masking, tokens=300)
        found = getattr(ours, kind)(requests, disable_tqdm=True)
    if kind == "generate_until":
        assert found == expected
    elif kind == "loglikelihood":
        assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
        np.testing.assert_allclose([x for x, _ in found], [x for x, _ in expected], atol=2e-3)
    else:
        np.testing.assert_allclose(found, expected, rtol=1e-4)


def test_a_context_is_read_once_for_all_its_continuations(loaded_tasks):
    model, requests = toys.toy("llama"), loaded_tasks["piqa"].requests
    lm = MaskedHFLM(model, tokenizer(), tokens=300)
    encoded = lm.encode(requests)
    lm._loglikelihood_tokens(encoded, disable_tqdm=True)
    apart = sum(len(context) + len(continuation) - 1 for _, context, continuation in encoded)
    together = apart - sum(len(context) for _, context, _ in encoded) // 2
    assert lm.processed == together
    assert encoded[0][1] == tokenizer()(requests[0].args[0]).input_ids


def test_batches_hold_no_more_tokens_than_asked(loaded_tasks):
    lm = MaskedHFLM(toys.toy("llama"), tokenizer(), tokens=200)
    single, shared = lm._groups(lm.encode(loaded_tasks["arc_easy"].requests))
    for groups, together in ((single, False), (shared, True)):
        batches = list(lm._batches(groups, shared=together))
        assert sorted(id(group) for batch in batches for group in batch) == sorted(map(id, groups))
        for batch in batches:
            width = max(len(group.context) for group in batch) + max(group.longest for group in batch)
            assert len(batch) == 1 or width * len(batch) <= 200


def test_running_out_of_memory_halves_the_batch(loaded_tasks, monkeypatch):
    lm = MaskedHFLM(toys.toy("llama"), tokenizer(), tokens=4096)
    encoded = lm.encode(loaded_tasks["piqa"].requests)
    expected = lm._loglikelihood_tokens(encoded, disable_tqdm=True)
    real = lm._score_shared

    def scarce(batch):
        if len(batch) > 2:
            raise torch.cuda.OutOfMemoryError("no")
        return real(batch)

    monkeypatch.setattr(lm, "_score_shared", scarce)
    found = lm._loglikelihood_tokens(encoded, disable_tqdm=True)
    np.testing.assert_allclose([x for x, _ in found], [x for x, _ in expected], atol=1e-3)
    assert lm.tokens < 4096


@pytest.mark.parametrize(
    ("policy", "expected"),
    [
        (Policy(), None),
        (Policy(prefill="dense"), [[0, 0, 0, 0], [0, 0, 0, 0]]),
        (Policy(first_token="dense"), [[0, 1, 1, 1], [0, 0, 1, 1]]),
        (Policy(last_share=0.5), [[0, 0, 1, 1], [0, 0, 1, 1]]),
        (Policy(first_token="dense", last_share=1.0), [[0, 1, 1, 1], [0, 0, 1, 1]]),
    ],
)
def test_policies_choose_tokens(policy, expected):
    valid = torch.tensor(
        [[1, 1, 1, 1], [0, 1, 1, 1]]
    ).bool()  # the second prompt has three tokens, padded left
    chosen = policy.chosen(valid)
    if expected is None:
        assert chosen is None
    else:
        assert (chosen & valid).int().tolist() == expected


def test_a_continuation_is_no_first_token():
    valid = torch.ones(1, 3, dtype=torch.bool)
    assert Policy(first_token="dense").chosen(valid, before=torch.tensor([[5]])).all()


@pytest.mark.parametrize(
    "bad", [{"prefill": "no"}, {"first_token": "x"}, {"last_share": 0.0}, {"last_share": 1.5}]
)
def test_unknown_policies_are_refused(bad):
    with pytest.raises(CatsError):
        Policy(**bad)


def test_dense_prefill_scores_as_the_dense_model(loaded_tasks):
    model, requests = toys.toy("llama"), loaded_tasks["piqa"].requests
    dense = MaskedHFLM(model, tokenizer()).loglikelihood(requests, disable_tqdm=True)
    thin(model)
    with Masking(model, Policy(prefill="dense")) as masking:
        found = MaskedHFLM(model, tokenizer(), masking=masking).loglikelihood(requests, disable_tqdm=True)
    np.testing.assert_allclose([x for x, _ in found], [x for x, _ in dense], atol=1e-4)
    assert masking.realised()["prefill"]["gate_sparsity"] == 0


def test_realised_sparsity_is_that_of_the_meter(loaded_tasks):
    model = thin(toys.toy("llama"))
    requests = loaded_tasks["lambada_openai"].requests
    with Masking(model) as masking:
        lm = MaskedHFLM(model, tokenizer(), masking=masking, tokens=100)
        encoded = lm.encode(requests)
        lm._loglikelihood_tokens(encoded, disable_tqdm=True)
    with SparsityMeter(model) as meter, torch.no_grad():
        for _, context, continuation in encoded:
            model(input_ids=torch.tensor([context + continuation[:-1]]))
    realised = masking.realised()["prefill"]
    assert realised["tokens"] == meter.tokens == lm.processed
    assert realised["gate_sparsity"] == pytest.approx(meter.overall, abs=1e-4)
    assert realised["by_layer"] == pytest.approx(meter.by_layer.tolist(), abs=1e-4)
    assert model.model.layers[0].mlp.combine is None


def test_generation_counts_each_rows_own_steps(loaded_tasks):
    model = thin(toys.toy("llama", max_position_embeddings=LENGTH))
    requests = loaded_tasks["gsm8k"].requests
    with Masking(model) as masking:
        lm = MaskedHFLM(model, tokenizer(), masking=masking)
        lm.generate_until(requests, disable_tqdm=True)
    realised = masking.realised()
    prompts = sum(len(lm.tok_encode(request.args[0])) for request in requests)
    new = lm.processed - realised["prefill"]["tokens"]
    assert realised["prefill"]["tokens"] == prompts
    assert realised["decode"]["tokens"] == new - len(requests)  # a prompt's reading gives its first token
    assert 0.05 < realised["decode"]["gate_sparsity"] < 0.95


def test_two_maskings_of_one_model_are_refused():
    model = thin(toys.toy("llama"))
    with Masking(model), pytest.raises(CatsError, match="another Masking"), Masking(model):
        pass


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

    monkeypatch.setattr(tasks.HfApi, "dataset_info", unreachable)
    monkeypatch.setattr(tasks.datasets.config, "HF_DATASETS_CACHE", tmp_path)
    with pytest.raises(CatsError, match="--data-dir or CATS_EVAL_DATA"):
        tasks.check(["hellaswag"], broken)


def test_mirrors_keep_line_separators_inside_strings(tmp_path):
    folder = tmp_path / "piqa"
    folder.mkdir()
    row = {"goal": "a\u2028b", "sol1": "c", "sol2": "d", "label": 0}
    (folder / "validation.jsonl").write_text(json.dumps(row, ensure_ascii=False) + "\n")
    splits, digests = reading.read_splits(folder)
    assert splits["validation"][0] == row and list(digests) == ["validation.jsonl"]


def test_pairs_by_hand():
    dense, sparse = [1, 1, 1, 1, 0, 0, 1, 1], [1, 0, 0, 1, 1, 0, 0, 1]
    found = pairs.difference(dense, sparse)
    assert found["delta"] == pytest.approx(-0.25)
    assert (found["gained"], found["lost"]) == (1, 3)
    assert found["mcnemar_p"] == pytest.approx(2 * (1 + 4) / 16)  # P(X <= 1) of four fair coins, twice
    assert found["low"] < -0.25 < found["high"]
    assert pairs.mcnemar(0, 0)["mcnemar_p"] == 1.0


def test_the_interval_is_the_bootstrap_over_documents():
    generator = np.random.default_rng(3)
    dense, sparse = generator.random(300) < 0.6, generator.random(300) < 0.55
    found = pairs.difference(dense, sparse)
    steps = sparse.astype(float) - dense
    draws = steps[generator.integers(0, 300, (10_000, 300))].mean(1)
    assert [found["low"], found["high"]] == pytest.approx(np.quantile(draws, [0.025, 0.975]), abs=0.006)


def test_pairs_need_the_same_documents():
    with pytest.raises(CatsError, match="cannot be paired"):
        pairs.difference([1, 0], [1])
    with pytest.raises(CatsError, match="two documents"):
        pairs.difference([1], [1])


def test_the_mean_over_tasks_weighs_tasks_equally():
    found = pairs.mean_difference([([0, 0], [1, 1]), ([1] * 10, [1] * 10)])
    assert found == {"delta": 0.5, "low": 0.5, "high": 0.5}


def test_scores_pack_and_unpack():
    bits = np.array([1, 0, 0, 1, 1, 1, 0, 1, 1.0])
    numbers = np.array([[-3.25, 4], [-1.5, 2]])
    for values in (bits, numbers):
        np.testing.assert_array_equal(packing.unpack(json.loads(json.dumps(packing.pack(values)))), values)
    assert len(packing.pack(np.ones(8000))["bits"]) < 1400


def test_summaries_by_hand():
    scores = {"acc": np.array([1.0, 0, 1, 0]), "word_perplexity": np.array([[-2.0, 1], [-4, 2]])}
    found = summarise(scores)
    assert found["acc"] == 0.5 and found["acc_se"] == pytest.approx(np.sqrt(1 / 3) / 2)
    assert found["word_perplexity"] == pytest.approx(np.exp(2)) and found[
        "word_perplexity_se"
    ] == pytest.approx(0)


def test_a_suite_resumes_where_it_was_killed(folder, tmp_path, monkeypatch):
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


def test_a_configuration_that_another_process_is_at_is_left_to_it(folder, tmp_path):
    wanted = methods(["cats"], [0.3, 0.6])
    ours = evaluator(folder, tmp_path)
    with ours._claimed(wanted[1], "piqa") as claimed:
        assert claimed
        found = evaluator(folder, tmp_path).run(["piqa"], wanted, progress=False)
    assert [path.name.split("--")[1] for path in found] == ["dense", "cats-0.6"]
    assert ours.finished(["piqa"], wanted) == [wanted[0], wanted[2]]
    assert len(ours.run(["piqa"], wanted, progress=False)) == 3


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


def test_a_suite_stops_when_its_time_is_up(folder, tmp_path):
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


def test_tables_and_records_hold_targets_and_pairs(folder, tmp_path):
    names = ["piqa", "arc_easy", "gsm8k", "wikitext", "text:python-docs"]
    one = evaluator(folder, tmp_path / "runs", documents=4)
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
    assert sparse.loc["text:python-docs", "delta_nll"] is not None
    written = write_records(found, "toy", parameters={"seed": 0}, started=0.0, folder=tmp_path)
    assert [path.name.split("-")[0] for path in written] == ["generation", "perplexity", "zero_shot"]
    again = json.loads(written[2].read_text())
    bits = next(row["correct"] for row in again["rows"] if row["task"] == "piqa" and row["rule"] == "dense")
    np.testing.assert_array_equal(packing.unpack(bits), dense.scores["acc"])
    assert {each["task"] for each in again["data"]["tasks"]} == {"piqa", "arc_easy"}


def test_a_damaged_result_is_named(tmp_path):
    path = tmp_path / "piqa--dense--0.json"
    path.write_text('{"schema": 1, "task"')
    with pytest.raises(CatsError, match="damaged: delete it"):
        Result.load(path)


def test_memory_is_estimated_before_loading(monkeypatch):
    config = models.config("random:llama-2-7b")
    assert memory.estimate(config, "bfloat16").weights == pytest.approx(13.48, abs=0.05)
    monkeypatch.setattr(memory, "available", lambda device: 11.0)
    with pytest.raises(CatsError, match=r"needs about 1\d\.\d GB .* cpu has 11\.0 GB free"):
        memory.check("llama", config, "bfloat16", "cpu")


def test_configurations_are_checked():
    assert [str(each) for each in methods(["dense", "cats", "relufication"], [0.5, 0.7])] == [
        *("dense", "cats 0.5", "cats 0.7", "relufication")
    ]
    with pytest.raises(CatsError, match="outside"):
        Method("cats", 1.2)
    with pytest.raises(CatsError, match="takes no sparsity"):
        Method("relufication", 0.5)
    with pytest.raises(CatsError, match="Unknown rule"):
        methods(["ct"], [0.5])


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
        "policy: {last_share: all}": "last_share in the policy of plan.yml is 'all', but must be a number",
    }.items(),
)
def test_a_wrong_value_in_a_plan_says_what_it_must_be(tmp_path, value, message):
    path = tmp_path / "plan.yml"
    path.write_text(f"runs: [{{model: m, record: r, tasks: [piqa], rules: [dense], {value}}}]")
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
    assert "PyTorch finds no GPU here: use --device cpu." in capsys.readouterr().err
    path.write_text(path.read_text().replace("device: cpu", "device: cuda"))
    assert cats_cli.main([*arguments, "--device", "cpu"]) == 0
    assert "Everything is recorded" in capsys.readouterr().out
    recorded = sorted(path.name for path in (tmp_path / "runs").glob("*.json"))
    assert recorded == ["zero_shot-one.json", "zero_shot-two.json"]
    assert cats_cli.main(arguments) == 0
    assert sorted(path.name for path in (tmp_path / "runs").glob("*.json")) == recorded


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


def test_a_plan_that_is_not_there_is_one_sentence(capsys):
    assert cats_cli.main(["evaluate", "--plan", "/nowhere/plan.yml"]) == 2
    assert "cannot be read" in capsys.readouterr().err


def test_an_output_that_cannot_be_is_said_before_the_model_loads(folder, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    arguments = ["--tasks", "piqa", "--data-dir", str(folder), "--output", str(tmp_path / "file")]
    assert cats_cli.main(["evaluate", *arguments]) == 2
    assert "file cannot be made (file exists): name another." in capsys.readouterr().err


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


def test_restoring_after_a_suite_leaves_the_model_dense(folder, tmp_path):
    one = evaluator(folder, tmp_path)
    ids = toys.tokens()
    with torch.no_grad():
        before = one.loaded.model(input_ids=ids).logits
        one.run(["piqa"], methods(["combined", "wanda"], [0.5]), progress=False)
        assert torch.equal(one.loaded.model(input_ids=ids).logits, before)
    assert not any(type(module).__name__ == "CatsMLP" for module in one.loaded.model.modules())
