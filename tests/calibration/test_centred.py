"""Calibration of the rule `centred`: it resumes, and refuses what cannot be measured."""

import doctest

import pytest
import torch
from toys import batches, toy

from cats import CatsError, Thresholds, calibrate_centred, sparsify
from cats.calibration import centred, checkpoint


class Interrupted(Exception):
    pass


def interrupt_after(model, calls):
    """Let the model fail for good behind so many calls."""
    seen = []

    def count(*_):
        if len(seen) == calls:
            raise Interrupted
        seen.append(1)

    return model.model.register_forward_pre_hook(count)


@pytest.mark.parametrize("done", [2, 5, 7])
def test_goes_on_where_it_was_interrupted(done, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "SECONDS", 0.0)
    model, file = toy(), tmp_path / "c.checkpoint"
    whole = calibrate_centred(model, batches(5), progress=False)
    hook = interrupt_after(model, done)
    with pytest.raises(Interrupted):
        calibrate_centred(model, batches(5), checkpoint=file, progress=False)
    hook.remove()
    seen = []
    hook = model.model.register_forward_hook(lambda *_: seen.append(1))
    again = calibrate_centred(model, batches(5), checkpoint=file, progress=False)
    hook.remove()
    assert len(seen) == 10 - done
    assert torch.equal(again.values, whole.values) and again.provenance() == whole.provenance()
    assert again.centres.document() == whole.centres.document()
    with pytest.raises(CatsError, match="another model or other options"):
        calibrate_centred(toy(seed=1), batches(5), checkpoint=file, progress=False)
    with pytest.raises(CatsError, match="other text"):
        calibrate_centred(model, batches(5, seed=9), checkpoint=file, progress=False)


def test_the_first_pass_reads_a_part_of_a_long_text(monkeypatch):
    monkeypatch.setattr(centred, "FIRST", 150)  # of 440 tokens: every third batch
    model, seen = toy(), []
    hook = model.model.register_forward_hook(
        lambda module, args, kwargs, out: seen.append(kwargs), with_kwargs=True
    )
    thresholds = calibrate_centred(model, batches(5), progress=False)
    hook.remove()
    read = [0, 3, 0, 1, 2, 3, 4]
    for kwargs, number in zip(seen, read, strict=True):
        assert torch.equal(kwargs["input_ids"], batches(5)[number]["input_ids"])
    assert thresholds.tokens == 5 * 88
    first = calibrate_centred(model, [batches(5)[0], batches(5)[3]], progress=False)
    assert thresholds.centres.document()["gates"] == first.centres.document()["gates"]
    assert thresholds.centres.document()["weights"] == first.centres.document()["weights"]


def test_leaves_the_model_as_it_was_and_takes_batches_that_can_be_read_once():
    model = toy().train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    once = calibrate_centred(model, iter(batches()), progress=False)
    assert model.training and all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert once.centres.document() == calibrate_centred(toy(), batches(), progress=False).centres.document()


def test_a_neuron_that_never_speaks_is_dropped_first_and_stays_finite():
    model = toy()
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[3] = 0
    setting = calibrate_centred(model, batches(), progress=False).settings(0.5)[0]
    assert setting.threshold.isfinite().all() and setting.threshold.argmax() == 3


@pytest.mark.parametrize("text, message", [([], "no token"), ([{"ids": 1}], "A batch must be")])
def test_text_that_cannot_be_read(text, message):
    with pytest.raises(CatsError, match=message):
        calibrate_centred(toy(), text, progress=False)


def test_activations_that_are_not_finite():
    model = toy()
    with torch.no_grad():
        model.model.layers[1].mlp.gate_proj.weight[0] = torch.inf
    with pytest.raises(CatsError, match="Layer 1 has activations that are infinite"):
        calibrate_centred(model, batches(), progress=False)


def test_the_example_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {"model": toy(), "batches": batches(), "sparsify": sparsify, "Thresholds": Thresholds}
    [example] = [
        test for test in doctest.DocTestFinder().find(centred.calibrate_centred, globs=names) if test.examples
    ]
    example.globs["calibrate_centred"] = lambda *a: calibrate_centred(*a, progress=False)
    assert doctest.DocTestRunner().run(example).failed == 0
    assert Thresholds.load("centred.json").rule == "centred"
