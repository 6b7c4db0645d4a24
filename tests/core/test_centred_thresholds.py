"""Thresholds of the rule `centred`: one file for every sparsity, in models of every family as CATS' are."""

import json

import pytest
import torch
from toys import FAMILIES, batches, constant_thresholds, tokens, toy
from transformers import AutoModelForCausalLM

from cats import (
    CatsConfig,
    CatsError,
    SparsityMeter,
    Thresholds,
    calibrate_centred,
    cats_mlps,
    criteria,
    restore,
    set_sparsity,
    sparsify,
)
from cats.core.centred import CentredMLP
from cats.core.centres import COMPARED_AT, Centres
from cats.criteria.sites import attached

CLOSE = {torch.float32: dict(rtol=1e-4, atol=1e-4), torch.bfloat16: dict(rtol=0.05, atol=0.15)}


def logits(model):
    with torch.no_grad():
        return model(tokens()).logits


def centred_layers(model):
    return [n for n, module in enumerate(cats_mlps(model)) if isinstance(module, CentredMLP)]


@pytest.fixture
def not_in_the_second(monkeypatch):
    """Centres pay in all layers but the second: random weights rarely want them."""
    monkeypatch.setattr(Centres, "pays", lambda self, layer, sparsity: layer != 1)


@pytest.fixture(scope="module")
def model_and_file(tmp_path_factory):
    model = toy()
    path = tmp_path_factory.mktemp("thresholds") / "c.json"
    calibrate_centred(model, batches(), source={"model": {"id": "toy"}}, progress=False).save(path)
    return model, path


@pytest.mark.parametrize("dtype", list(CLOSE))
@pytest.mark.parametrize(
    "family, changes",
    [
        *((family, {}) for family in FAMILIES),
        ("llama", {"mlp_bias": True}),
        ("llama", {"tie_word_embeddings": True}),
        ("llama", {"hidden_act": "gelu"}),
    ],
)
def test_computes_what_the_rule_does_in_evaluation(family, changes, dtype, not_in_the_second, tmp_path):
    model = toy(family, dtype=dtype, **changes)
    dense = logits(model)
    fit = criteria.rule("centred").calibrate(model, batches(), progress=False)
    fit.state.save(tmp_path / "c.json")
    fit.apply(model, 0.5)
    expected, kept = logits(model), [site.keep for site in attached(model)]
    fit.undo(model)
    sparsify(model, Thresholds.load(tmp_path / "c.json"), 0.5)
    assert centred_layers(model) == [0, 2]
    torch.testing.assert_close(logits(model), expected, **CLOSE[dtype])
    for module, keep in zip(cats_mlps(model), kept, strict=True):
        gate = torch.randn(50, module.intermediate_size, generator=torch.Generator().manual_seed(2)).to(dtype)
        centre = module.centre if isinstance(module, CentredMLP) else 0.0
        z = module.gate_act(gate.float()) - centre
        assert torch.equal(z.abs() >= module.threshold, keep(gate)), "the same masks"
    assert torch.equal(logits(restore(model)), dense), "the dense model, bit for bit"


def test_read_back_as_written_in_one_small_file(model_and_file):
    model, path = model_and_file
    written = calibrate_centred(model, batches(), progress=False)
    read = Thresholds.load(path)
    assert json.loads(path.read_text())["schema"] == 2 and [p.name for p in path.parent.iterdir()] == [
        "c.json"
    ]
    assert read.rule == "centred" and read.per == "neuron" and read.tokens == written.tokens == 264
    assert torch.equal(read.values, written.values)
    for sparsity in (0.1, 0.5, 0.7, [0.2, 0.0, 0.9]):
        for mine, other in zip(read.settings(sparsity), written.settings(sparsity), strict=True):
            assert torch.equal(mine.threshold, other.threshold)
            assert (mine.centre is None) == (other.centre is None)
            assert mine.centre is None or torch.equal(mine.centre, other.centre)


def test_drops_the_share_that_is_asked_for(model_and_file, not_in_the_second):
    model, path = model_and_file
    thresholds = Thresholds.load(path)
    for sparsity in (0.3, 0.5, 0.7):
        sparsify(model, thresholds, sparsity)
        with SparsityMeter(model) as meter, torch.no_grad():
            for batch in batches():
                model(**batch)
        paid = [module.overhead for module in cats_mlps(model)]  # neurons that A is paid for with
        assert meter.by_layer.tolist() == pytest.approx([sparsity + more for more in paid], abs=0.03)
    restore(model)


def test_from_pretrained_save_pretrained_and_again(model_and_file, not_in_the_second, tmp_path):
    model, path = model_and_file
    restore(model).save_pretrained(tmp_path / "dense")
    config = CatsConfig(sparsity=0.5, thresholds=path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", quantization_config=config)
    assert centred_layers(loaded) == [0, 2]
    expected = logits(sparsify(model, Thresholds.load(path), 0.5))
    restore(model)
    assert torch.equal(logits(loaded), expected)
    loaded.save_pretrained(tmp_path / "sparse")
    saved = json.loads((tmp_path / "sparse" / "config.json").read_text())["quantization_config"]
    assert saved["centred"] == [0, 2] and saved["thresholds"]["tokens"] == 264
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "sparse")
    assert torch.equal(logits(again), expected) and centred_layers(again) == [0, 2]
    assert torch.equal(logits(set_sparsity(again, Thresholds.load(path), 0.7)), logits(set_70(model, path)))
    restore(model)


def set_70(model, path):
    return sparsify(model, Thresholds.load(path), 0.7)


def test_each_layer_follows_its_own_sparsity(model_and_file, monkeypatch):
    """A layer changes between CATS and centres with the sparsity, and 0 leaves it dense."""
    model, path = model_and_file
    dense = logits(restore(model))
    thresholds = Thresholds.load(path)
    monkeypatch.setattr(Centres, "pays", lambda self, layer, sparsity: sparsity > 0.4)
    assert centred_layers(sparsify(model, thresholds, [0.5, 0.3, 0.0])) == [0]
    mixed = logits(model)
    assert centred_layers(set_sparsity(model, thresholds, [0.3, 0.5, 0.5])) == [1, 2]
    assert centred_layers(set_sparsity(model, thresholds, 0.9)) == [], "A would take more than is left"
    set_sparsity(model, thresholds, [0.5, 0.3, 0.0])
    assert torch.equal(logits(model), mixed) and not torch.equal(mixed, dense)
    assert torch.equal(logits(set_sparsity(model, thresholds, 0.0)), dense)
    assert torch.equal(logits(restore(model)), dense)


def test_centres_pay_where_they_are_nearer(model_and_file):
    centres = Thresholds.load(model_and_file[1]).centres
    centres.errors = torch.ones(3, len(COMPARED_AT))
    centres.errors[1, 9] = 0.8  # at 0.5
    assert [centres.pays(1, s) for s in (0.44, 0.46, 0.5, 0.54, 0.56)] == [False, True, True, True, False]
    assert not centres.pays(0, 0.5)


def test_the_matrix_follows_training_and_adapters(model_and_file, not_in_the_second):
    peft = pytest.importorskip("peft")
    model, path = toy(), model_and_file[1]
    sparsify(model, Thresholds.load(path), 0.5)
    module = cats_mlps(model)[0]
    before = module.shared.clone()
    adapted = peft.get_peft_model(
        model, peft.LoraConfig(target_modules=["up_proj", "down_proj"], init_lora_weights=False)
    )
    assert torch.equal(adapted(tokens()).logits, logits(adapted)), "with gradients and without"
    expected = logits(adapted)
    merged = adapted.merge_and_unload()
    torch.testing.assert_close(logits(merged), expected, rtol=1e-4, atol=1e-4)
    assert not module.folded
    module.fold()
    exact = (module.w_up * module.centre[:, None]).t() @ module.w_down_t
    torch.testing.assert_close(module.shared, exact, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(module.shared, before, rtol=1e-2, atol=1e-3)


def test_trained_weights_are_saved_with_their_matrix(model_and_file, not_in_the_second, tmp_path):
    model, path = toy(), model_and_file[1]
    sparsify(model, Thresholds.load(path), 0.5).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(tokens(), labels=tokens()).loss.backward()
    optimizer.step()
    model.eval().save_pretrained(tmp_path)
    module = cats_mlps(AutoModelForCausalLM.from_pretrained(tmp_path))[0]
    exact = (module.w_up * module.centre[:, None]).t() @ module.w_down_t
    torch.testing.assert_close(module.shared, exact, rtol=1e-4, atol=1e-5)


def test_generates_with_and_without_a_cache(model_and_file, not_in_the_second):
    model = sparsify(toy(), Thresholds.load(model_and_file[1]), 0.5)
    options = dict(max_new_tokens=8, do_sample=False, pad_token_id=0)
    new = model.generate(tokens(3, 6), **options)
    assert torch.equal(new, model.generate(tokens(3, 6), use_cache=False, **options))


@pytest.mark.parametrize(
    "use, message",
    [
        (lambda t: sparsify(toy(), t, 0.5, prefill="dense"), "masks every token"),
        (lambda t: CatsConfig(0.5, t, prefill="dense"), "masks every token"),
        (lambda t: sparsify(toy(), t, 1.0), "outside"),
        (lambda t: sparsify(toy(seed=1), t, 0.5), "other weights"),
        (lambda t: sparsify(toy("gemma3"), t, 0.5), "silu gates"),
        (lambda t: sparsify(toy(num_hidden_layers=2), t, 0.5), "for 3 layers"),
        (lambda t: sparsify(toy(intermediate_size=96), t, 0.5), "intermediate size 80"),
        (lambda t: t.check(toy(hidden_size=64), weights=False), "sizes 32 and 80 in layer 0"),
        (lambda t: t.at(0.5), "for the rule centred alone"),
    ],
)
def test_what_does_not_fit_is_one_sentence(use, message, model_and_file):
    with pytest.raises(CatsError, match=message):
        use(Thresholds.load(model_and_file[1]))


@pytest.mark.parametrize(
    "change",
    [
        lambda d: d.update(schema=1),
        lambda d: d.pop("centres"),
        lambda d: d["centres"].pop("gates"),
        lambda d: d["centres"]["gates"].pop(),
        lambda d: d["centres"].update(gates=["%%%%"] * 3),
        lambda d: d["centres"]["weights"].__setitem__(0, d["centres"]["weights"][0][:-8]),
        lambda d: d["centres"].update(hidden_sizes=[32, 32, "32"]),
        lambda d: d["centres"].update(hidden_sizes=[32, 32]),
        lambda d: d["centres"]["errors"][0].__setitem__(0, -1.0),
        lambda d: d["centres"]["values"][0].reverse(),
        lambda d: d.update(centres=[]),
    ],
)
def test_what_is_not_whole_is_refused(change, model_and_file, tmp_path):
    document = json.loads(model_and_file[1].read_text())
    change(document)
    (tmp_path / "damaged.json").write_text(json.dumps(document))
    with pytest.raises(CatsError, match="thresholds file"):
        Thresholds.load(tmp_path / "damaged.json")


def test_cats_thresholds_take_their_place(model_and_file, not_in_the_second):
    model = sparsify(toy(), Thresholds.load(model_and_file[1]), 0.5)
    sparsify(model, constant_thresholds(toy()), 0.5)
    assert torch.equal(logits(model), logits(sparsify(toy(), constant_thresholds(toy()), 0.5)))
