"""What recovers: thresholds that move, annealing, and distillation."""

import evaluation_toys
import pytest
import torch
from finetuning_toys import CATS, TOY, curve
from torch.nn import functional

from cats import criteria
from cats.core.structure import cats_mlps
from cats.finetuning import Recipe, learned
from cats.finetuning.adapt import Teacher, adapt, apply
from cats.finetuning.data import collate
from cats.finetuning.trainer import CatsTrainer


def test_the_straight_through_gradient_is_that_of_the_expected_loss():
    """For |z| uniform in [0, 1] and L = sum of kept z, dL/dt = -N t."""
    z = torch.rand(200_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    t = torch.tensor(0.4, requires_grad=True)
    z.requires_grad_()
    kept = learned.straight_through(z, z.detach(), t)
    assert torch.equal(kept, torch.where(z >= t.double(), z, 0))
    kept.sum().backward()
    assert float(t.grad) == pytest.approx(-0.4 * len(z), rel=0.02)
    assert torch.equal(z.grad, (z >= 0.4).double())


def test_learned_thresholds_get_a_gradient_and_keep_the_mean_sparsity(loaded, text, fit, run):
    model = apply(evaluation_toys.loaded(num_hidden_layers=2).model, Recipe(**CATS), fit)
    moving = learned.LearnedThresholds(model, fit.thresholds, 0.5)
    torch.testing.assert_close(moving.thresholds(), fit.thresholds.at(0.5))
    batch = collate(list(text.train)[:4], 0)
    plain = model(**batch).loss
    moving.attach()
    loss = model(**batch).loss
    torch.testing.assert_close(loss, plain)
    loss.backward()
    assert float(moving.shift.grad.abs().min()) > 0
    assert float(moving.shift.grad.sum()) == pytest.approx(0, abs=1e-6)  # the mean cannot move

    trained = run(**CATS, learn_thresholds=True, threshold_lr=0.01)
    shares = trained.after["sparsity_by_layer"]
    assert sum(shares) / 2 == pytest.approx(0.5, abs=1e-6) and abs(shares[0] - shares[1]) > 0.02
    torch.testing.assert_close(
        torch.stack([module.threshold for module in cats_mlps(trained.model)]), fit.thresholds.at(shares)
    )
    assert trained.model.config.quantization_config.sparsity == shares


def test_annealing_raises_the_sparsity_to_its_target_and_is_measured_there(fit, run, monkeypatch):
    assert [learned.annealed(0.7, step, 4) for step in (0, 4, 9)] == [0.0, 0.7, 0.7]
    assert learned.annealed(0.7, 2, 4) == pytest.approx(0.7 * 7 / 8)
    seen = []
    step = CatsTrainer.training_step

    def watched(self, model, *args):
        seen.append(float(cats_mlps(model)[0].threshold))
        return step(self, model, *args)

    monkeypatch.setattr(CatsTrainer, "training_step", watched)
    trained = run(**CATS, anneal=0.5)
    expected = [float(fit.thresholds.at(learned.annealed(0.5, n, 3))[0]) for n in range(6)]
    assert seen[::2] == pytest.approx(expected) and seen[0] == 0
    assert curve(trained)[0] == curve(run("fixed", **CATS, steps=0))[0]
    assert float(cats_mlps(trained.model)[0].threshold) == pytest.approx(expected[-1])


@pytest.mark.parametrize(("rule", "tuning"), [("cats", "lora"), ("cats", "full"), ("centred", "lora")])
def test_the_teacher_stays_the_dense_model_while_the_student_changes(
    loaded, text, batches, centred_everywhere, rule, tuning
):
    recipe = Recipe(**TOY | CATS | dict(rule=rule, tuning=tuning, distil=1.0))
    fit = criteria.rule(rule).calibrate(loaded.model, batches, progress=False)
    student = evaluation_toys.loaded(num_hidden_layers=2).model
    teacher = Teacher(student, recipe)
    student = adapt(apply(student, recipe, fit), recipe)
    with torch.no_grad():
        for parameter in student.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1)
    inputs = {"input_ids": collate(list(text.heldout), 0)["input_ids"]}
    student.train()
    found = teacher.logits(student, student, inputs)
    with torch.no_grad():
        torch.testing.assert_close(found, loaded.model(**inputs).logits)
        student.eval()
        assert not torch.allclose(student(**inputs).logits, found, atol=0.1)
    assert any(parameter.requires_grad for parameter in student.parameters())


def test_distillation_brings_the_outputs_nearer_to_the_dense_models(loaded, text, run):
    ids = torch.tensor([row for row, _ in text.heldout])

    def divergence(model) -> float:
        with torch.no_grad():
            student, dense = (m(input_ids=ids).logits.log_softmax(-1) for m in (model, loaded.model))
        return float(functional.kl_div(student, dense, log_target=True, reduction="batchmean"))

    method = dict(rule="cats", sparsity=0.7, steps=12)
    before = run("none", **method | {"steps": 0}).model
    plain, distilled = run("plain", **method).model, run("distilled", **method, distil=1.0).model
    assert divergence(distilled) < divergence(before) and divergence(distilled) < divergence(plain)
