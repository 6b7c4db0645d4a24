"""Rules at one model-level sparsity, through the evaluator and in plans."""

import evaluation_toys
import pytest

from cats.core.accounting import account
from cats.corpora import Calibration
from cats.criteria.masking import Policy
from cats.criteria.sites import attached
from cats.errors import CatsError
from cats.evaluation import plan as plans
from cats.evaluation.evaluator import Evaluator
from cats.evaluation.method import Method
from cats.evaluation.table import load_results, results_table, write_records


@pytest.fixture(scope="module")
def mirrors(tmp_path_factory):
    return evaluation_toys.mirrors(tmp_path_factory.mktemp("mirrors"))


def test_an_evaluator_compares_rules_at_one_model_level(mirrors, tmp_path):
    loaded = evaluation_toys.loaded()
    evaluator = Evaluator(
        loaded,
        tmp_path,
        data_dir=str(mirrors),
        calibration=Calibration("python-docs", tokens=2048, sequence_length=128),
        documents=2,
    )
    rules = ("cats", "teal", "wina", "griffin", "sirius")
    wanted = [Method(), *(Method(name, 0.2, level="model") for name in rules)]
    found = load_results(evaluator.run(["piqa", "wikitext"], wanted, progress=False))
    generating = [each for each in wanted if each.rule in ("griffin", "sirius")]
    found += load_results(evaluator.run(["gsm8k"], generating, progress=False))
    assert len(found) == 2 * len(wanted) + 2 and not attached(loaded.model)
    rows = results_table(found).set_index(["rule", "experiment"])
    shape = account(loaded.model)
    weights = 2 * (shape.block_weights + shape.head_weights)
    for name in rules:
        row = rows.loc[name, "zero_shot"]
        assert row.model_sparsity == pytest.approx(0.2)
        if name != "sirius":
            assert row.bytes_per_token == pytest.approx(weights - 0.2 * 2 * shape.block_weights)
    assert rows.loc["wina", "zero_shot"].realised_model_sparsity == pytest.approx(0.2, abs=0.01)
    assert rows.loc["teal", "zero_shot"].realised_sparsity != rows.loc["teal", "zero_shot"].realised_sparsity
    assert rows.loc["cats", "zero_shot"].gate_sparsity == pytest.approx(0.2 / shape.max_model_sparsity)
    griffin_at_decode = found[-2].sparsity
    share = griffin_at_decode["realised"]["decode"]["skipped_weights"] / shape.block_weights
    assert share == pytest.approx(0.2, abs=0.01)
    assert griffin_at_decode["realised"]["prefill"]["skipped_weights"] == 0
    corrected = rows.loc["sirius", "generation"]
    assert 1 / 16 <= corrected.dense_steps_per_token <= 1
    assert corrected.sparse_steps_per_token == pytest.approx(15 * corrected.dense_steps_per_token)
    written = write_records(found, "toy", parameters={}, folder=tmp_path)
    assert len(written) == 3
    again = evaluator.run(["piqa"], [Method("teal", 0.2)], progress=False)
    assert again[0].name not in {path.name for path in evaluator.run(["piqa"], wanted, progress=False)}


def test_a_level_out_of_reach_is_refused_before_anything_runs(mirrors, tmp_path):
    evaluator = Evaluator(evaluation_toys.loaded(), tmp_path, data_dir=str(mirrors))
    with pytest.raises(CatsError, match="cannot reach a model-level"):
        evaluator.run(["piqa"], [Method("cats", 0.8, level="model")])
    with pytest.raises(CatsError, match="rule or model"):
        Method("cats", 0.5, level="block")


def test_plans_cross_policies_and_say_the_level(tmp_path):
    path = tmp_path / "plan.yml"
    path.write_text(
        "runs: [{model: smollm2-135m-instruct, record: r, tasks: [piqa], level: model, "
        "policies: [{}, {first_token: dense}], rules: [dense, teal: [0.25, 0.4]], "
        "calibration: {rows: 8, padding: counted, batch_size: 2}}]"
    )
    (run,) = plans.read(path)
    assert run.methods == [
        Method(),
        *(Method("teal", level, Policy(), "model") for level in (0.25, 0.4)),
        *(Method("teal", level, Policy(first_token="dense"), "model") for level in (0.25, 0.4)),
    ]
    assert "under 2 policies" in str(run)
    path.write_text(path.read_text().replace("counted", "padded"))
    with pytest.raises(CatsError, match="padding='padded' is unknown"):
        plans.read(path)
