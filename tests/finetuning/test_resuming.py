"""Runs that are interrupted, stop in time, or meet what is not finite."""

import pytest
import torch
from finetuning_toys import CATS, TOY

from cats.errors import CatsError
from cats.finetuning import Recipe, finetune
from cats.finetuning.callbacks import Grid
from cats.finetuning.checkpoints import last_checkpoint
from cats.finetuning.trainer import CatsTrainer


def interrupted_at(monkeypatch, run, step: int, **changes):
    """Start a run and break it off when `step` steps are done."""

    def stop(self, args, state, control, **_):
        if state.global_step == step:
            raise KeyboardInterrupt
        begin(self, args, state, control)

    begin = Grid.on_step_begin
    with monkeypatch.context() as patch:
        patch.setattr(Grid, "on_step_begin", stop)
        with pytest.raises(KeyboardInterrupt):
            run(**changes)


@pytest.mark.parametrize(
    "changes",
    [
        dict(CATS),
        dict(CATS, tuning="full", anneal=0.8),
        dict(CATS, learn_thresholds=True, threshold_lr=0.01, distil=0.5),
    ],
    ids=["lora", "full-annealed", "learned-distilled"],
)
def test_an_interrupted_run_goes_on_to_the_same_curve_bit_for_bit(run, monkeypatch, tmp_path, changes):
    changes |= {"save_every": 2}
    whole = run("whole", **changes)
    interrupted_at(monkeypatch, run, 5, **changes)
    assert last_checkpoint(tmp_path / "run").name == "checkpoint-4"
    broken = tmp_path / "run" / "checkpoint-5"  # as if it had been killed while writing the next one
    broken.mkdir()
    (broken / "trainer_state.json").write_text('{"global_step": 5, "log_his')
    steps = []
    step = CatsTrainer.training_step
    monkeypatch.setattr(
        CatsTrainer, "training_step", lambda self, *given: steps.append(given) or step(self, *given)
    )
    again = run(**changes)
    assert len(steps) == 2 * 2  # two passes for each of steps 5 and 6: the first four are not done again
    assert again.points == whole.points
    assert [path.name for path in (tmp_path / "run").glob("checkpoint-*")] == ["checkpoint-6"]
    weights, expected = again.model.state_dict(), whole.model.state_dict()
    assert all(torch.equal(weights[name], expected[name]) for name in expected)


def test_a_run_stops_in_time_and_a_longer_one_goes_on_from_it(run, loaded, text, fit, tmp_path):
    recipe = Recipe(**TOY | CATS)
    stopped = finetune(loaded, recipe, text, tmp_path / "run", fit=fit, minutes=0)
    assert not stopped.finished and last_checkpoint(tmp_path / "run").name == "checkpoint-1"
    whole = run("whole", **CATS, steps=5)
    assert run(**CATS, steps=5).points == whole.points
    assert run("whole", **CATS).points == run("at-once", **CATS, grid=(3, 5)).points
    with pytest.raises(CatsError, match="differs in recipe lr"):
        run(**CATS, lr=0.5)


def test_a_loss_that_is_not_finite_ends_the_run_and_keeps_the_last_checkpoint(run, monkeypatch, tmp_path):
    loss = CatsTrainer.compute_loss

    def spoiled(self, *args, **kwargs):
        value = loss(self, *args, **kwargs)
        return value * float("nan") if self.state.global_step == 3 else value

    monkeypatch.setattr(CatsTrainer, "compute_loss", spoiled)
    with pytest.raises(CatsError, match="The loss became NaN or infinite at step 4"):
        run(**CATS)
    assert last_checkpoint(tmp_path / "run").name == "checkpoint-3"


def test_a_gradient_that_is_not_finite_never_reaches_the_weights(run, monkeypatch, tmp_path):
    step = CatsTrainer.training_step

    def spoiled(self, model, *args):
        loss = step(self, model, *args)
        if self.state.global_step == 3:
            next(p for p in model.parameters() if p.grad is not None).grad.view(-1)[0] = float("inf")
        return loss

    monkeypatch.setattr(CatsTrainer, "training_step", spoiled)
    with pytest.raises(CatsError, match="The gradient became NaN or infinite at step 4"):
        run(**CATS)
    assert last_checkpoint(tmp_path / "run").name == "checkpoint-3"


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory."), MemoryError()])
def test_too_little_memory_says_what_to_lower(run, monkeypatch, error):
    def full(self, *args, **kwargs):
        raise error

    monkeypatch.setattr(CatsTrainer, "training_step", full)
    with pytest.raises(CatsError, match="Memory ran out at step 1 with 2 rows of 32 tokens"):
        run(**CATS)
