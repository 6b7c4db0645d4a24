"""Runs on toy models: what is trained, measured, merged and saved."""

import json

import evaluation_toys
import pytest
import torch
from finetuning_toys import CATS, TOY, curve, heldout_nll
from transformers import AutoModelForCausalLM, Trainer

from cats import criteria, sparsify
from cats.core.structure import cats_mlps
from cats.errors import CatsError
from cats.evaluation.distributed import Processes
from cats.finetuning import Recipe, compare, finetune, load, save
from cats.finetuning.adapt import adapt, apply, trained_parameters
from cats.finetuning.arguments import arguments
from cats.finetuning.data import collate
from cats.finetuning.trainer import CatsTrainer


def test_zero_steps_are_the_model_without_fine_tuning(loaded, text, fit, run):
    trained = run(**CATS, steps=0)
    sparse = apply(evaluation_toys.loaded(num_hidden_layers=2).model, Recipe(**CATS), fit)
    assert curve(trained) == pytest.approx([heldout_nll(sparse, text.heldout)], rel=1e-5)
    assert curve(run("dense", steps=0)) == pytest.approx([heldout_nll(loaded.model, text.heldout)], rel=1e-5)


def test_one_fit_that_changes_weights_serves_every_run(loaded, batches):
    fitted = criteria.rule("refit-combined").calibrate(loaded.model, batches, progress=False)
    for sparsity in (0.5, 0.7, 0.5):
        recipe = Recipe(rule="refit-combined", sparsity=sparsity)
        model = apply(evaluation_toys.loaded(num_hidden_layers=2).model, recipe, fitted)
        by_hand = evaluation_toys.loaded(num_hidden_layers=2).model
        fitted.apply(by_hand, sparsity)
        for ours, theirs in zip(model.state_dict().values(), by_hand.state_dict().values(), strict=True):
            assert torch.equal(ours, theirs)
        fitted.undo(by_hand)


@pytest.mark.parametrize("tuning", ["lora", "full"])
def test_training_lowers_the_loss_and_leaves_the_given_model_alone(loaded, run, tuning):
    before = {name: tensor.clone() for name, tensor in loaded.model.state_dict().items()}
    trained = run(**CATS, tuning=tuning, checkpointing=tuning == "full")
    assert [point["step"] for point in trained.points] == [0, 3, 6]
    assert curve(trained)[2] < curve(trained)[1] < curve(trained)[0]
    after = loaded.model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(after[name], before[name]) for name in before)
    assert trained.points[-1]["heldout_realised"] == pytest.approx([0.5, 0.5], abs=0.1)
    assert trained.points[-1]["rows_trained"] == 24


def test_bf16_trains_adapters_in_fp32(run):
    trained = run(**CATS, dtype="bfloat16")
    assert curve(trained)[-1] < curve(trained)[0]


def test_lora_has_the_papers_targets(toy):
    for family, leaves in {
        "llama": {"q_proj", "v_proj", "gate_proj", "up_proj", "down_proj"},
        "phi3": {"qkv_proj", "gate_up_proj", "down_proj"},
    }.items():
        model = adapt(toy(family), Recipe())
        trained = {name.split(".lora_")[0] for name, p in model.named_parameters() if p.requires_grad}
        assert {name.rpartition(".")[2] for name in trained} == leaves
    config = model.peft_config["default"]
    assert (config.r, config.lora_alpha, config.lora_dropout) == (64, 16, 0.1)


@pytest.mark.parametrize("method", [{}, CATS, {"rule": "relufication"}], ids=["dense", "cats", "relu"])
def test_the_result_is_merged_saved_and_loads(run, loaded, text, tmp_path, method):
    recipe = Recipe(**TOY | method)
    trained = run(**method)
    with torch.no_grad():
        expected = trained.model(input_ids=torch.tensor([text.heldout[0][0]])).logits
    assert heldout_nll(trained.model, text.heldout) == pytest.approx(curve(trained)[-1], rel=1e-4)
    save(trained, recipe, loaded.tokenizer, tmp_path / "model")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    with torch.no_grad():
        found = again(input_ids=torch.tensor([text.heldout[0][0]])).logits
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    if method == CATS:
        assert [module.sparsity for module in cats_mlps(again)] == [0.5, 0.5]
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    assert config["hidden_act"] == ("relu" if method.get("rule") == "relufication" else "silu")


def test_padding_does_not_change_what_a_row_teaches(run, text, monkeypatch):
    """Rows padded on the right are trained without a mask for it: to the gradient that a mask gives."""
    found = {}

    def remembered(kind):
        def clip(self, model):
            found[kind] = [p.grad.clone() for p in model.parameters() if p.grad is not None]
            return clipped(self, model)

        return clip

    clipped = CatsTrainer._clip_grad_norm
    short = [(ids[: len(ids) - number % 5], skipped) for number, (ids, skipped) in enumerate(text.train.rows)]
    monkeypatch.setattr(text.train, "rows", short)
    monkeypatch.setattr(CatsTrainer, "_clip_grad_norm", remembered("as shipped"))
    run("without", **CATS, steps=1)
    monkeypatch.setattr(CatsTrainer, "training_step", Trainer.training_step)
    monkeypatch.setattr(CatsTrainer, "_clip_grad_norm", remembered("with the mask"))
    run("with", **CATS, steps=1)
    for one, other in zip(*found.values(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_the_best_checkpoint_is_the_one_with_the_lowest_loss_or_the_highest_accuracy(run, text, tmp_path):
    trained = run(grid=(1, 2, 3, 4, 5), lr=0.3, best="loss")  # a rate at which the loss rises again
    losses = [point["indomain_nll"] for point in trained.points[1:]]
    assert min(losses) < losses[-1]
    assert heldout_nll(trained.model, text.indomain) == pytest.approx(min(losses), rel=1e-4)

    def larger_is_better(**changes) -> bool:
        recipe = Recipe(**TOY | changes)
        return arguments(recipe, tmp_path, on_cpu=True, accumulation=1).greater_is_better

    assert not larger_is_better(best="loss")
    assert larger_is_better(best="accuracy")
    assert not larger_is_better(best="accuracy", reference_sign=True)


def test_instructions_are_scored_by_the_answer_that_the_model_prefers(loaded, files, tmp_path):
    names = [str(files / name) for name in ("instructions.jsonl", "held-instructions.jsonl")]
    rows = load(*names, loaded.tokenizer, rows=24, sequence_length=32, heldout_rows=8)
    recipe = Recipe(**TOY | dict(best="accuracy", lr=0.05))
    trained = finetune(loaded, recipe, rows, tmp_path / "run")
    assert rows.info["loss"] == "response only" and len(rows.answers) == 2
    batch = collate(list(rows.heldout), 0)
    with torch.no_grad():
        logits = trained.model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    right = 0
    for row, (ids, skipped) in enumerate(rows.heldout):
        scores = logits[row, skipped - 1, rows.answers]
        right += rows.answers[int(scores.argmax())] == ids[skipped]
    best = max(trained.points[1:], key=lambda point: point["indomain_accuracy"])
    assert best["heldout_accuracy"] == right / len(rows.heldout)
    assert curve(trained)[-1] < curve(trained)[0] / 2


@pytest.mark.parametrize("rule", ["cats", "chess", "neuron", "centred"])  # one a layer, weighted, a neuron
def test_thresholds_are_estimated_once_more(run, rule, centred_everywhere):
    trained = run(**CATS | {"rule": rule}, lr=0.05, recalibrate=1024)
    drift = trained.after["threshold_drift"]
    assert len(drift) == 2 and max(map(abs, drift)) > 0.01
    before, after = trained.points[-1], trained.after["recalibrated"]
    far = [sum(abs(s - 0.5) for s in point["indomain_realised"]) for point in (before, after)]
    assert far[1] < far[0]


def test_the_parameters_of_lora_are_counted_from_the_geometry(loaded):
    trained, own = trained_parameters("random:smollm2-135m-instruct", Recipe(lora_r=8))
    widths = (576, 576), (576, 192), (576, 1536), (576, 1536), (1536, 576)  # q, v, gate, up, down
    assert trained == 30 * 8 * sum(map(sum, widths)) and own == 134_515_008


def test_rules_say_what_their_fits_have(batches):
    """Before anything is calibrated: whether there are thresholds, and whether they stay."""
    loaded = evaluation_toys.loaded(num_hidden_layers=3)
    for name, rule in criteria.RULES.items():
        fitted = rule.calibrate(loaded.model, batches, progress=False)
        assert rule.thresholds == isinstance(fitted, criteria.ThresholdFit), name
        assert not rule.trains or fitted.steer(0.5) is None, name
        if not rule.trains:
            with pytest.raises(CatsError, match=f"^{name} cannot be fine-tuned here"):
                Recipe(rule=name, sparsity=0.5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_zero_shot_accuracy_is_measured_along_the_curve(dtype, loaded, fit, run, text, tmp_path):
    data_dir = evaluation_toys.mirrors(tmp_path / "mirrors")
    score = compare.zero_shot(
        *(loaded.tokenizer, ["piqa", "arc_easy"]),
        documents=None,
        data_dir=str(data_dir),
        processes=Processes(0, 1, "cpu"),
        bf16=dtype == "bfloat16",
    )
    recipe = Recipe(**TOY | CATS | dict(steps=1, dtype=dtype))
    trained = finetune(loaded, recipe, text, tmp_path / "run", fit=fit, zero_shot=score)
    sparse = sparsify(evaluation_toys.loaded(num_hidden_layers=2).model, fit.thresholds, 0.5)
    assert trained.points[0]["zero_shot"] == score(sparse)
    assert 0 <= trained.points[1]["zero_shot"] <= 1
