"""Fine-tuning on toy models: equal data, the mask on, curves that resume bit for bit, and what recovers."""

import inspect
import json
import random
import shutil
from dataclasses import replace
from types import SimpleNamespace

import evaluation_toys
import pandas as pd
import peft
import pytest
import torch
import two_processes
from safetensors.torch import load_file
from torch._dynamo.testing import CompileCounter
from torch._dynamo.utils import counters
from torch.nn import functional
from transformers import AutoModelForCausalLM, Trainer

import cats_cli
from cats import criteria, paths, sparsify
from cats.core import activation
from cats.core.centred import CentredMLP
from cats.core.structure import cats_mlps
from cats.corpora import corpus as corpora
from cats.corpora import package_docs
from cats.corpora import sampled as sampling
from cats.criteria.masking import Masking, Policy
from cats.errors import CatsError
from cats.finetuning import Recipe, compiled, finetune, learned, load, measure, plan, save, table
from cats.finetuning import autograd as fused
from cats.finetuning.adapt import Teacher, adapt, apply, trained_parameters
from cats.finetuning.callbacks import Grid, last_checkpoint
from cats.finetuning.data import Example, _row, collate, examples
from cats.finetuning.trainer import CatsTrainer, arguments
from cats.records import record as records

TOY = dict(
    steps=6, grid=(3,), batch=4, rows_at_once=2, sequence_length=32, lr=1e-2, dtype="float32", lora_r=4
)
CATS = dict(rule="cats", sparsity=0.5)


def sentences(count: int, seed: int) -> str:
    draw = random.Random(seed)
    return "\n\n\n".join(" ".join(draw.choices(evaluation_toys.WORDS, k=40)) for _ in range(count))


@pytest.fixture(scope="module")
def loaded():
    return evaluation_toys.loaded(num_hidden_layers=2)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Text to train on, text to hold out, and instructions with yes or no as responses."""
    folder = tmp_path_factory.mktemp("texts")
    (folder / "train.txt").write_text(sentences(40, 1))
    (folder / "other.txt").write_text(sentences(10, 2))
    for name, count in (("instructions.jsonl", 30), ("held-instructions.jsonl", 8)):
        rows = [{"prompt": f"Is {n} even? ", "response": ("yes", "no")[n % 2]} for n in range(count)]
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="module")
def text(loaded, files):
    return read(loaded, files)


def read(loaded, files, rows: int = 24, **options):
    given = dict(rows=rows, sequence_length=32, heldout_rows=6) | options
    return load(str(files / "train.txt"), str(files / "other.txt"), loaded.tokenizer, **given)


@pytest.fixture(scope="module")
def batches(loaded, files):
    corpus = corpora.load(str(files / "train.txt"), split="all")
    return corpora.batches(corpus, loaded.tokenizer, tokens=2048, sequence_length=64)


@pytest.fixture(scope="module")
def fit(loaded, batches):
    return criteria.rule("cats").calibrate(loaded.model, batches, progress=False)


@pytest.fixture
def run(loaded, text, fit, batches, tmp_path):
    """A run of the toy recipe with changes, in a folder of its own or a named one."""

    def go(folder: str = "run", **changes):
        recipe = Recipe(**TOY | changes)
        rule = criteria.rule(recipe.rule) if recipe.sparse else None
        fitted = fit if recipe.rule == "cats" else rule and rule.calibrate(loaded.model, batches)
        return finetune(loaded, recipe, text, tmp_path / folder, fit=fitted, calibration=batches)

    return go


def heldout_nll(model, rows) -> float:
    """Mean nats a token, straight from the definition."""
    batch = collate(list(rows), 0)
    with torch.no_grad():
        logits = model(input_ids=batch["input_ids"]).logits[:, :-1]
    return float(functional.cross_entropy(logits.flatten(0, 1).float(), batch["labels"][:, 1:].flatten()))


def curve(outcome) -> list[float]:
    return [point["heldout_nll"] for point in outcome.points]


# --- what is trained on


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
    path, about = sampling.sampled(loaded, 5, 24, tmp_path)
    lines = path.read_text()
    assert len(lines.splitlines()) == 5 and about["sampled_from"]["id"] == "toy-llama"
    path.write_text(lines + lines)
    assert sampling.sampled(loaded, 5, 24, tmp_path)[0].read_text() == lines + lines
    path.unlink()
    assert sampling.sampled(loaded, 5, 24, tmp_path)[0].read_text() == lines


# --- runs


def test_zero_steps_are_the_model_without_fine_tuning(loaded, text, fit, run):
    outcome = run(**CATS, steps=0)
    sparse = apply(evaluation_toys.loaded(num_hidden_layers=2).model, Recipe(**CATS), fit)
    assert curve(outcome) == pytest.approx([heldout_nll(sparse, text.heldout)], rel=1e-5)
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
    outcome = run(**CATS, tuning=tuning, checkpointing=tuning == "full")
    assert [point["step"] for point in outcome.points] == [0, 3, 6]
    assert curve(outcome)[2] < curve(outcome)[1] < curve(outcome)[0]
    after = loaded.model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(after[name], before[name]) for name in before)
    assert outcome.points[-1]["heldout_realised"] == pytest.approx([0.5, 0.5], abs=0.1)
    assert outcome.points[-1]["rows_trained"] == 24


def test_bf16_trains_adapters_in_fp32(run):
    outcome = run(**CATS, dtype="bfloat16")
    assert curve(outcome)[-1] < curve(outcome)[0]


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


def test_every_method_reads_the_same_rows_and_the_unequal_setting_says_which_do_not():
    equal = [Recipe(**method) for method in ({}, CATS, {"rule": "relufication"})]
    assert {recipe.rows_a_step() for recipe in equal} == {16}
    unequal = [replace(recipe, unequal=True) for recipe in equal]
    assert [recipe.rows_a_step() for recipe in unequal] == [16, 16, 8]
    assert [recipe.rows_a_step(instructions=True) for recipe in unequal] == [2, 16, 16]
    assert Recipe().accumulation(4) == 4
    with pytest.raises(CatsError, match="no multiple of 3"):
        Recipe().accumulation(3)


@pytest.mark.parametrize("method", [{}, CATS, {"rule": "relufication"}], ids=["dense", "cats", "relu"])
def test_the_result_is_merged_saved_and_loads(run, loaded, text, tmp_path, method):
    recipe = Recipe(**TOY | method)
    outcome = run(**method)
    with torch.no_grad():
        expected = outcome.model(input_ids=torch.tensor([text.heldout[0][0]])).logits
    assert heldout_nll(outcome.model, text.heldout) == pytest.approx(curve(outcome)[-1], rel=1e-4)
    save(outcome, recipe, loaded.tokenizer, tmp_path / "model")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    with torch.no_grad():
        found = again(input_ids=torch.tensor([text.heldout[0][0]])).logits
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    if method == CATS:
        assert [module.sparsity for module in cats_mlps(again)] == [0.5, 0.5]
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    assert config["hidden_act"] == ("relu" if method.get("rule") == "relufication" else "silu")


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


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory."), MemoryError()])
def test_too_little_memory_says_what_to_lower(run, monkeypatch, error):
    def full(self, *args, **kwargs):
        raise error

    monkeypatch.setattr(CatsTrainer, "training_step", full)
    with pytest.raises(CatsError, match="Memory ran out at step 1 with 2 rows of 32 tokens"):
        run(**CATS)


def test_the_best_checkpoint_is_the_one_with_the_lowest_loss_or_the_highest_accuracy(run, text, tmp_path):
    outcome = run(grid=(1, 2, 3, 4, 5), lr=0.3, best="loss")  # a rate at which the loss rises again
    trained = [point["indomain_nll"] for point in outcome.points[1:]]
    assert min(trained) < trained[-1]
    assert heldout_nll(outcome.model, text.indomain) == pytest.approx(min(trained), rel=1e-4)

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
    outcome = finetune(loaded, recipe, rows, tmp_path / "run")
    assert rows.info["loss"] == "response only" and len(rows.answers) == 2
    batch = collate(list(rows.heldout), 0)
    with torch.no_grad():
        logits = outcome.model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    right = 0
    for row, (ids, skipped) in enumerate(rows.heldout):
        scores = logits[row, skipped - 1, rows.answers]
        right += rows.answers[int(scores.argmax())] == ids[skipped]
    best = max(outcome.points[1:], key=lambda point: point["indomain_accuracy"])
    assert best["heldout_accuracy"] == right / len(rows.heldout)
    assert curve(outcome)[-1] < curve(outcome)[0] / 2


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


@pytest.mark.parametrize("rule", ["cats", "chess", "neuron", "centred"])  # one a layer, weighted, a neuron
def test_thresholds_are_estimated_once_more(run, rule, centred_everywhere):
    outcome = run(**CATS | {"rule": rule}, lr=0.05, recalibrate=1024)
    drift = outcome.after["threshold_drift"]
    assert len(drift) == 2 and max(map(abs, drift)) > 0.01
    before, after = outcome.points[-1], outcome.after["recalibrated"]
    far = [sum(abs(s - 0.5) for s in point["indomain_realised"]) for point in (before, after)]
    assert far[1] < far[0]


@pytest.mark.parametrize("changes", [{}, dict(anneal=0.5), dict(learn_thresholds=True, distil=0.5)])
def test_compiled_layers_train_to_the_same_curve(run, monkeypatch, changes):
    monkeypatch.setattr(compiled, "BACKEND", "aot_eager")  # needs no compiler of C++
    torch._dynamo.reset()
    counters.clear()
    found = curve(run("compiled", **CATS, **changes, compile=True))
    graphs = counters["stats"]["unique_graphs"]
    assert graphs > 0, "nothing was compiled"
    assert curve(run("plain", **CATS, **changes)) == pytest.approx(found, rel=1e-5)
    assert counters["stats"]["unique_graphs"] == graphs, "accelerate's own setting is back"


@pytest.mark.parametrize("learn", [False, True])
def test_the_masks_of_all_layers_are_one_compilation(learn, batches):
    model = evaluation_toys.loaded(num_hidden_layers=5).model
    fit = criteria.rule("cats").calibrate(model, batches, progress=False)
    fit.apply(model, 0.5)
    if learn:
        learned.LearnedThresholds(model, fit.thresholds, 0.5).attach()
    else:
        fused.attach(model)
    torch._dynamo.reset()
    counter = CompileCounter()
    hidden = torch.randn(2, 7, model.config.hidden_size, requires_grad=True)
    for mlp in cats_mlps(model):
        torch.compile(mlp, backend=counter)(hidden)
    assert counter.frame_count == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", activation.ACTIVATIONS)
def test_the_mask_of_a_training_step_has_the_value_and_gradients_of_the_definition(name, dtype):
    draw = torch.Generator().manual_seed(0)
    values = [torch.randn(3, 7, 33, generator=draw).to(dtype) for _ in range(3)]
    values[0][0, 0, 0] = float("nan")
    act = activation.ACTIVATIONS[name]
    z = act(values[0].float()).abs()
    for threshold in (z[1, 1, 1].clone(), torch.rand(33, generator=draw), torch.tensor(0.0)):
        found, expected = ([value.clone().requires_grad_() for value in values[:2]] for _ in range(2))
        product = fused.masked_product(*found, threshold, name)
        once = act(expected[0])
        exact = activation.unrounded(act, expected[0], once)
        reference = activation.cats(once, threshold, exact) * expected[1]
        assert torch.equal(product.nan_to_num(9), reference.nan_to_num(9)) and product[0, 0, 0].isnan()
        product.backward(values[2])
        reference.backward(values[2])
        for one, other in zip(found, expected, strict=True):
            assert torch.equal(one.grad.nan_to_num(9), other.grad.nan_to_num(9))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda t: t):
        fused.masked_product(*found, threshold, name)
    assert sum(tensor.nbytes for tensor in kept) == 2 * values[0].nbytes + 4


def test_the_mask_of_a_training_step_is_one_graph_forward_and_one_backward():
    gate, up, gradient = torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(0)).bfloat16()
    for function, given in ((fused._forward, ()), (fused._backward, (gradient,))):
        whole = torch.compile(function, fullgraph=True, backend="eager")
        for level, centre in ((0.1, None), (0.4, None), (0.1, torch.rand(8)), (0.4, torch.rand(8))):
            arguments = ("silu", gate, up, torch.tensor([level]), centre, *given)
            torch.testing.assert_close(whole(*arguments), function(*arguments))


def test_what_is_set_to_its_centre_trains_up_and_not_gate():
    gate, up, weight = torch.randn(3, 64, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    gate.requires_grad_(), up.requires_grad_()
    threshold, centre = torch.full((8,), 0.3), torch.linspace(-0.2, 0.4, 8)
    found = fused.masked_product(gate, up, threshold, "silu", centre)
    z = functional.silu(gate)
    near = (z - centre).abs() < threshold
    expected = torch.where(near, centre.double(), z) * up
    torch.testing.assert_close(found, expected)
    slopes = torch.autograd.grad((found * weight).sum(), (gate, up))
    wanted = torch.autograd.grad((expected * weight).sum(), (gate, up))
    for ours, theirs in zip(slopes, wanted, strict=True):
        torch.testing.assert_close(ours, theirs)
    assert 0.2 < near.float().mean() < 0.8 and not slopes[0][near].any() and slopes[1][near].all()


@pytest.fixture
def centred_everywhere(monkeypatch):
    """Centres in every layer: random weights rarely want them."""
    rule = type(criteria.rule("centred"))
    monkeypatch.setattr(rule, "nearer", lambda self, mlp, gate, state, sparsity: True)


@pytest.mark.parametrize("changes", [{}, dict(tuning="full"), dict(distil=0.5)])
def test_centred_trains_without_its_matrix_and_is_folded_at_the_end(
    run, text, loaded, tmp_path, centred_everywhere, changes
):
    outcome = run(rule="centred", sparsity=0.5, **changes)
    assert curve(outcome)[-1] < curve(outcome)[0]
    modules = cats_mlps(outcome.model)
    assert all(isinstance(module, CentredMLP) and module.folded for module in modules)
    for module in modules:
        shared = (module.w_up.T * module.centre) @ module.w_down_t
        torch.testing.assert_close(module.shared, shared, rtol=1e-4, atol=1e-5)
    assert heldout_nll(outcome.model, text.heldout) == pytest.approx(curve(outcome)[-1], rel=1e-4)
    realised = outcome.points[-1]["heldout_realised"]
    assert all(0.2 < share < 0.8 for share in realised)
    save(outcome, Recipe(rule="centred", sparsity=0.5), loaded.tokenizer, tmp_path / "saved")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert heldout_nll(again, text.heldout) == pytest.approx(curve(outcome)[-1], rel=1e-4)


def test_before_training_centred_is_the_rule_as_it_is_evaluated(
    loaded, text, batches, run, centred_everywhere
):
    fitted = criteria.rule("centred").calibrate(loaded.model, batches, progress=False)
    model = evaluation_toys.loaded(num_hidden_layers=2).model
    expected = heldout_nll(fitted.apply(model, 0.5), text.heldout)
    fitted.undo(model)
    assert curve(run(rule="centred", sparsity=0.5, steps=0)) == pytest.approx([expected], rel=1e-5)
    unfolded = apply(model, Recipe(rule="centred", sparsity=0.5), fitted)
    with Masking(unfolded) as masking:
        assert heldout_nll(unfolded, text.heldout) == pytest.approx(expected, rel=1e-5)
    by_layer = masking.realised()["prefill"]["by_layer"]
    with Masking(fitted.apply(evaluation_toys.loaded(num_hidden_layers=2).model, 0.5)) as by_rule:
        heldout_nll(by_rule.model, text.heldout)
    assert by_layer == pytest.approx(by_rule.realised()["prefill"]["by_layer"], abs=1e-5)
    with Masking(unfolded, Policy(prefill="dense")):
        assert heldout_nll(unfolded, text.heldout) == pytest.approx(
            heldout_nll(loaded.model, text.heldout), rel=1e-6
        )
    with pytest.raises(CatsError, match="no thresholds to anneal or learn"):
        run("annealed", rule="centred", sparsity=0.5, anneal=0.5)


def test_training_masks_in_one_pass_and_measures_as_the_mlp_does(run, monkeypatch):
    calls = {True: 0, False: 0}
    forward = activation.CatsMLP.forward

    def watched(self, x):
        calls[torch.is_grad_enabled()] += self.combine is not None
        return forward(self, x)

    monkeypatch.setattr(activation.CatsMLP, "forward", watched)
    outcome = run(**CATS, recalibrate=512)
    assert calls == {True: 6 * 2 * 2, False: 0}  # steps, passes, layers
    assert all(module.combine is None for module in cats_mlps(outcome.model))


def test_the_parameters_of_lora_are_counted_from_the_geometry(loaded):
    trained, own = trained_parameters("random:smollm2-135m-instruct", Recipe(lora_r=8))
    widths = (576, 576), (576, 192), (576, 1536), (576, 1536), (1536, 576)  # q, v, gate, up, down
    assert trained == 30 * 8 * sum(map(sum, widths)) and own == 134_515_008


# --- what recovers


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

    outcome = run(**CATS, learn_thresholds=True, threshold_lr=0.01)
    shares = outcome.after["sparsity_by_layer"]
    assert sum(shares) / 2 == pytest.approx(0.5, abs=1e-6) and abs(shares[0] - shares[1]) > 0.02
    torch.testing.assert_close(
        torch.stack([module.threshold for module in cats_mlps(outcome.model)]), fit.thresholds.at(shares)
    )
    assert outcome.model.config.quantization_config.sparsity == shares


def test_annealing_raises_the_sparsity_to_its_target_and_is_measured_there(fit, run, monkeypatch):
    assert [learned.annealed(0.7, step, 4) for step in (0, 4, 9)] == [0.0, 0.7, 0.7]
    assert learned.annealed(0.7, 2, 4) == pytest.approx(0.7 * 7 / 8)
    seen = []
    step = CatsTrainer.training_step

    def watched(self, model, *args):
        seen.append(float(cats_mlps(model)[0].threshold))
        return step(self, model, *args)

    monkeypatch.setattr(CatsTrainer, "training_step", watched)
    outcome = run(**CATS, anneal=0.5)
    expected = [float(fit.thresholds.at(learned.annealed(0.5, n, 3))[0]) for n in range(6)]
    assert seen[::2] == pytest.approx(expected) and seen[0] == 0
    assert curve(outcome)[0] == curve(run("fixed", **CATS, steps=0))[0]
    assert float(cats_mlps(outcome.model)[0].threshold) == pytest.approx(expected[-1])


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


# --- comparisons, records and the command


@pytest.fixture
def here(loaded, files, tmp_path, monkeypatch):
    """A folder to type commands in: the toy as a saved model, and the texts."""
    monkeypatch.chdir(tmp_path)
    loaded.model.save_pretrained("toy")
    loaded.tokenizer.save_pretrained("toy")
    for name in ("train.txt", "other.txt"):
        (tmp_path / name).write_text((files / name).read_text())
    return tmp_path


def test_thresholds_may_be_those_of_the_instructions(here, files, capsys):
    (here / "plan.yml").write_text(
        "runs:\n- {model: toy, record: task, methods: [cats: 0.5], device: cpu, dtype: float32, steps: 1,\n"
        f"   train: {files}/instructions.jsonl, heldout: {files}/held-instructions.jsonl, batch: 4,\n"
        "   rows_at_once: 4, sequence_length: 32, lora_r: 4, heldout_rows: 8,\n"
        f"   calibration: {{corpus: {files}/instructions.jsonl, tokens: 300, sequence_length: 16}}}}\n"
    )
    assert cats_cli.main(["finetune", "--plan", "plan.yml"]) == 0
    rows = records.read("finetuning", folder=here / "runs").rows
    assert rows.accuracy.between(0, 1).all() and rows.indomain_accuracy.between(0, 1).all() and len(rows) == 2
    assert rows.delta_acc.isna().all()  # there is no dense run to compare with


def test_the_checkpoint_kept_is_the_first_best_one_and_the_reference_sign_keeps_the_worst():
    curve = pd.DataFrame({"step": [0, 1, 2, 3, 4], "indomain_accuracy": [0.1, 0.7, 0.6, 0.9, 0.9]})
    assert table.kept(curve) == 3 and table.kept(curve, reference_sign=True) == 2


def test_accuracy_is_compared_with_the_dense_run_row_by_row():
    points = {"dense": [1, 1, 0, 0], "cats": [1, 0, 0, 0]}
    done = [
        (Recipe(rule=rule, sparsity=0.5 if rule == "cats" else None), found)
        for rule, right in points.items()
        for found in [{"after": {}, "points": [answered(right)]}]
    ]
    first, second = table.rows("toy", done)
    assert first["delta_acc"] == 0 and second["delta_acc"] == -0.25 and second["delta_nll"] == 0
    assert second["delta_acc_low"] <= -0.25 <= second["delta_acc_high"]


def answered(right: list[int]) -> dict:
    rows = [[2.0, 1, each] for each in right]
    known = {"heldout_nll": 2.0, "indomain_nll": 2.0, "train_loss": None, "rows_trained": 0}
    return known | {"step": 0, "heldout_accuracy": sum(right) / len(right), "heldout_rows": rows}


def test_what_a_step_took_is_held_against_the_dense_run_of_its_seed():
    runs = [
        {"method": "cats 0.5", "seed": 1, "step_s": 3.0, "peak_memory_gb": 12.0},
        {"method": "dense", "seed": 0, "step_s": 2.0, "peak_memory_gb": 10.0},
        {"method": "dense", "seed": 1, "step_s": 4.0},
        {"method": "cats 0.5", "seed": 7, "step_s": 3.0},
        {"method": "cats 0.7", "seed": 0},
    ]
    found = table.costs(runs)
    assert [row["time_ratio"] for row in found] == [0.75, 1.0, 1.0, 1.5, None]
    assert [row["memory_ratio"] for row in found] == [None, 1.0, None, None, None]


COMMAND = "finetune --model toy --train train.txt --heldout other.txt --heldout-rows 6 --sequence-length 32"
PLAN = """
defaults: {device: cpu, dtype: float32, train: train.txt, heldout: other.txt, heldout_rows: 6, batch: 4,
           rows_at_once: 4, sequence_length: 32, lora_r: 4, steps: 3, grid: [2], lr: 0.01,
           calibration: {corpus: train.txt, split: all, tokens: 1024, sequence_length: 64}}
runs:
  - {model: toy, record: toy, methods: [dense, cats: [0.5, 0.7], relufication], recalibrate: 512, save: true}
"""


@pytest.mark.parametrize("path", sorted(paths.DATA.glob("plans/finetuning/*.yml")), ids=lambda p: p.stem)
def test_the_plans_that_are_shipped_can_be_read(path):
    for each in plan.read(path):
        assert {recipe.rows_a_step() for recipe in each.recipes} == {16} or each.recipes[0].unequal
        assert all(recipe.accumulation(1) for recipe in each.recipes)


@pytest.mark.parametrize(
    ("value", "message"),
    {
        "stepps: 3": "Unknown key 'stepps' in plan.yml",
        "methods: dense": "methods in plan.yml is 'dense', but must be a list",
        "methods: [{5: 0.5}]": "is a name, or a name with sparsities",
        "steps: many": "steps in plan.yml is 'many', but must be a whole number",
        "lr: 1e-4": "lr in plan.yml is '1e-4', but must be a number",
        "seeds: []": "but must be a list of whole numbers",
        "seeds: [-1]": "cannot be negative",
        "grid: [one]": "but must be a whole number or a list",
        "save: maybe": "but must be true or false",
        "heldout_rows: 0": "too small: use 1",
        "thresholds: 5": "but must be text",
        "calibration: {corpsu: x}": "Unknown key 'corpsu' in the calibration of plan.yml: use corpus, se",
        "zero_shot: {tasks: piqa}": "tasks in the zero_shot of plan.yml is 'piqa', but must be a list",
    }.items(),
)
def test_a_wrong_value_in_a_plan_says_what_it_must_be(tmp_path, value, message):
    (tmp_path / "plan.yml").write_text(f"runs: [{{model: toy, record: toy, methods: [dense], {value}}}]")
    with pytest.raises(CatsError, match=message):
        plan.read(tmp_path / "plan.yml")


def test_a_dry_run_reads_the_text_to_calibrate_on(here, capsys):
    (here / "plan.yml").write_text(PLAN.replace("corpus: train.txt", "corpus: nosuch"))
    assert cats_cli.main(["finetune", "--plan", "plan.yml", "--dry-run"]) == 2
    assert "Unknown corpus 'nosuch'" in capsys.readouterr().err


def test_thresholds_of_a_plan_are_found_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    each = plan.read(paths.DATA / "plans" / "finetuning" / "step.yml")[0]
    assert each.load_thresholds().layers == 30 and each.thresholds.startswith("data/")


def test_a_plan_is_recorded_once_and_compared_with_dense(here, capsys):
    (here / "plan.yml").write_text(PLAN)
    assert cats_cli.main(["finetune", "--plan", "plan.yml", "--dry-run"]) == 0
    assert "{dense, cats 0.5, cats 0.7, relufication} x 1 seed, 3 steps of" in capsys.readouterr().out
    assert not (here / "runs").exists()
    assert cats_cli.main(["finetune", "--plan", "plan.yml", "--minutes", "0"]) == 0
    assert "Time is up" in capsys.readouterr().out and not list(here.glob("runs/*.json"))
    assert cats_cli.main(["finetune", "--plan", "plan.yml"]) == 0
    assert "Everything is recorded." in capsys.readouterr().out
    [path] = (here / "runs").glob("finetuning-toy*.json")
    record = records.read("finetuning", folder=here / "runs", model="toy")
    rows = record.rows
    curves = rows[~rows.method.str.contains("recalibrated")]
    assert set(records.COLUMNS["finetuning"]) <= set(rows)
    assert len(curves) == 4 * 3 and set(curves.step) == {0, 2, 3}
    assert set(curves.groupby("step").rows_trained.unique().map(len)) == {1}
    assert (rows[rows.method == "dense"].delta_nll == 0).all()
    gaps = rows[(rows.method == "cats 0.7") & (rows.step == 0)]
    dense = rows[(rows.method == "dense") & (rows.step == 0)]
    assert gaps.delta_nll.to_numpy() == pytest.approx(
        gaps.heldout_nll_nats.to_numpy() - dense.heldout_nll_nats.to_numpy()
    )
    assert (gaps.delta_low <= gaps.delta_nll).all() and (gaps.delta_nll <= gaps.delta_high).all()
    assert len(rows[rows.method == "cats 0.5 recalibrated"]) == 1
    after = [each for each in record.content["parameters"]["runs"] if each["method"].startswith("cats")]
    assert {each["recalibrated_on_tokens"] for each in after} == {512}
    assert record.content["data"]["heldout"]["name"] == "other.txt"
    assert str(here) not in path.read_text()
    again = AutoModelForCausalLM.from_pretrained(here / "runs" / "toy" / "cats-0.7-seed0" / "model")
    assert [module.sparsity for module in cats_mlps(again)] == [0.7, 0.7]
    assert cats_cli.main(["finetune", "--plan", "plan.yml"]) == 0  # nothing is left, and nothing written
    assert [path] == list((here / "runs").glob("finetuning-toy*.json"))
    (here / "plan.yml").write_text(
        PLAN.replace("steps: 3", "steps: 4").replace("0.5, 0.7], relu", "0.5], relu")
    )
    assert cats_cli.main(["finetune", "--plan", "plan.yml"]) == 0  # more steps: from where the others ended
    longer = records.read("finetuning", folder=here / "runs", steps=4).rows
    assert set(longer.step) == {0, 2, 3, 4}
    same = longer[(longer.method == "dense") & (longer.step < 4)]
    assert same.heldout_nll_nats.tolist() == rows[rows.method == "dense"].heldout_nll_nats.tolist()


@pytest.mark.parametrize(("batch", "rows"), [(1, 1), (6, 3), (8, 4)])
def test_rows_at_once_follow_the_batch(here, monkeypatch, batch, rows):
    found = []
    monkeypatch.setattr(plan, "check", lambda wanted: found.extend(wanted[0].recipes) or [])
    assert cats_cli.main([*COMMAND.split(), "--batch", str(batch), "--dry-run"]) == 0
    assert {recipe.rows_at_once for recipe in found} == {rows}


def test_the_command_fine_tunes_and_prints_the_end_of_each_curve(here, capsys):
    assert cats_cli.main([*COMMAND.split(), "--steps", "2", "--distil", "0.5", "--method", "cats:0.5"]) == 0
    printed = capsys.readouterr()
    assert "cats 0.5" in printed.out and "finetuning-toy.json" in printed.out
    assert "step 2 of 2, held-out" in printed.err


@pytest.mark.parametrize("device", two_processes.DEVICES)
def test_two_processes_follow_the_curve_of_one(here, device):
    """Each with the model, and each with a part of its weights."""
    common = (
        "defaults: {model: toy, methods: [cats: 0.5], dtype: float32, steps: 3, batch: 4, rows_at_once: 2,\n"
        "  train: train.txt, heldout: other.txt, heldout_rows: 7, lr: 0.01, sequence_length: 32, lora_r: 4,\n"
        "  calibration: {corpus: train.txt, split: all, tokens: 300, sequence_length: 64},\n"
        "  lora_dropout: 0.0, save: true}\n"
    )
    runs = {"whole": ["distil: 0.5"], "split": ["tuning: lora", "tuning: full"]}
    commands = {}
    for name, given in runs.items():
        lines = [f"- {{record: {name}-{number}, {what}}}\n" for number, what in enumerate(given)]
        (here / f"{name}.yml").write_text(f"{common}runs:\n{''.join(lines)}")
        commands[name] = ["finetune", "--plan", f"{name}.yml", "--device", device]
    two = ("--output", "two")
    two_processes.run("cats.finetuning.command", *commands["whole"], *two, sharded=[*commands["split"], *two])
    for name, given in runs.items():
        assert cats_cli.main([*commands[name], "--output", "one"]) == 0
        for number in range(len(given)):
            slug = f"{name}-{number}"
            ones, twos = (
                json.loads((here / n / f"finetuning-{slug}.json").read_text()) for n in ("one", "two")
            )
            for row, again in zip(ones["rows"], twos["rows"], strict=True):
                assert again["rows_trained"] == row["rows_trained"] == 4 * row["step"]
                columns = ("heldout_nll_nats", "indomain_nll_nats", "train_loss", "realised_sparsity")
                found, expected = ([each[column] or 0.0 for column in columns] for each in (again, row))
                assert found == pytest.approx(expected, rel=1e-5)
            for what in ("model", "checkpoint-3"):
                folders = [here / n / slug / "cats-0.5-seed0" / what for n in ("one", "two")]
                (weights,), (again,) = (sorted(folder.glob("*.safetensors")) for folder in folders)
                again = load_file(again)
                for key, value in load_file(weights).items():
                    torch.testing.assert_close(again[key], value, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"FSDP_VERSION": "1"}, "Set fsdp_version to 2"),
        ({"FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT"}, "to FULL_STATE_DICT: the model is put together"),
        ({"FSDP_CPU_RAM_EFFICIENT_LOADING": "true"}, "to false: every process loads"),
    ],
)
def test_settings_of_fsdp_that_do_not_work_here_are_refused(here, capsys, monkeypatch, setting, message):
    for name, value in {**two_processes.SHARDED, **setting}.items():
        monkeypatch.setenv(name, value)
    assert cats_cli.main(COMMAND.split()) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--method cats", "cats needs a sparsity: cats:0.5"),
        ("--output train.txt", "The folder train.txt cannot be made (file exists)"),
        ("--output train.txt/runs", "cannot be made (not a directory)"),
        ("--method cats:half", "no number after its colon"),
        ("--method relufication:0.5", "takes no sparsity"),
        ("--method nosuch:0.5", "Unknown rule"),
        ("--method relufication --anneal 0.5", "no thresholds to anneal"),
        ("--anneal 0.5 --learn-thresholds", "choose one"),
        ("--tuning qlora", "Unknown tuning"),
        ("--distil 2", "outside [0, 1]"),
        ("--lr 0", "outside (0, 1)"),
        ("--steps -1", "cannot be negative"),
        ("--batch 5 --rows-at-once 2", "no multiple of 2"),
        ("--train nosuch", "Unknown corpus"),
        ("--train other.txt", "the training text itself"),
        ("--train sampled:many", "how many texts"),
        ("--train sampled: --dry-run", "how many texts"),
        ("--batch 3 --rows-at-once 2 --dry-run", "no multiple of 2"),
        ("--thresholds good.json --dry-run", "thresholds are for 30 layers"),
        ("--best accuracy --dry-run", "train on task:<name>"),
        ("--device nosuch --dry-run", "use cpu or cuda"),
        ("--model nosuch", "Unknown model"),
        ("--device cuda:1", "use cpu or cuda"),
        ("--thresholds absent.json", "cannot be read"),
        ("--method wanda:0.5 --dry-run", "cannot be fine-tuned"),
        ("--method refit-centred:0.5 --dry-run", "cannot be fine-tuned"),
        ("--method centred:0.5 --anneal 0.5 --dry-run", "no thresholds to anneal"),
        ("--method cats:0.5 cats:0.5 --dry-run", "names a method twice"),
        ("--sequence-length 100000 --dry-run", "can read: use "),
        (
            "--train gap-instructions.jsonl --heldout told-instructions.jsonl",
            "Row 2 of gap-",
        ),
        (
            "--train told-instructions.jsonl --heldout more-instructions.jsonl --best accuracy",
            "a few answers",
        ),
    ],
)
def test_what_cannot_be_fine_tuned_is_said_in_one_sentence(here, capsys, options, message):
    shutil.copy(paths.THRESHOLDS / "smollm2-135m-instruct.json", here / "good.json")
    for name in ("gap", "told", "more"):
        rows = [{"prompt": f"{name} {n}", "response": f"answer {n}"} for n in range(40)]
        rows[1]["response"] = "" if name == "gap" else "another"
        (here / f"{name}-instructions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert cats_cli.main([*COMMAND.split(), *options.split()]) == 2
    printed = capsys.readouterr().err.strip().splitlines()
    assert printed[-1].startswith("cats: ") and message in printed[-1]


def test_rules_say_what_their_fits_have(batches):
    """Before anything is calibrated: whether there are thresholds, and whether they stay."""
    loaded = evaluation_toys.loaded(num_hidden_layers=3)
    for name, rule in criteria.RULES.items():
        fitted = rule.calibrate(loaded.model, batches, progress=False)
        assert rule.thresholds == (fitted.thresholds is not None), name
        assert not rule.trains or fitted.steer(0.5) is None, name
        if not rule.trains:
            with pytest.raises(CatsError, match=f"^{name} cannot be fine-tuned here"):
                Recipe(rule=name, sparsity=0.5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_zero_shot_accuracy_is_measured_along_the_curve(dtype, loaded, fit, run, text, tmp_path):
    data_dir = evaluation_toys.mirrors(tmp_path / "mirrors")
    crew = SimpleNamespace(rank=0, size=1, gather=lambda value: [value])
    score = measure.zero_shot(
        *(loaded.tokenizer, ["piqa", "arc_easy"]),
        documents=None,
        data_dir=str(data_dir),
        crew=crew,
        bf16=dtype == "bfloat16",
    )
    recipe = Recipe(**TOY | CATS | dict(steps=1, dtype=dtype))
    outcome = finetune(loaded, recipe, text, tmp_path / "run", fit=fit, zero_shot=score)
    sparse = sparsify(evaluation_toys.loaded(num_hidden_layers=2).model, fit.thresholds, 0.5)
    assert outcome.points[0]["zero_shot"] == score(sparse)
    assert 0 <= outcome.points[1]["zero_shot"] <= 1
