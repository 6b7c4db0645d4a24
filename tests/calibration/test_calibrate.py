"""Calibration: exact to its stated error, blind to padding, resumable to the bit, in bounded memory."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from toys import FAMILIES, batches, constant_thresholds, tokens, toy

import cats.calibration.checkpoint
from cats import CatsError, SparsityMeter, calibrate, cats_mlps, corpora, sparsify
from cats.calibration.calibrate import FOLDS
from cats.calibration.histogram import Binning, count, quantiles, shares_below
from cats.calibration.observe import Observation

SPARSITIES = [k / 20 for k in range(1, 20)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def test_every_magnitude_falls_in_the_bin_that_its_edges_say():
    generator = torch.Generator().manual_seed(0)
    for fold in (None, *FOLDS.values()):
        for binning in (Binning(11, -64, 16, fold), Binning(4, -24, 8, fold, fold_bits=2)):
            near = (fold or 0.3) - 0.1 * torch.rand(50_000, generator=generator) ** 6
            values = torch.cat(
                [near, torch.randn(50_000, generator=generator).exp(), torch.tensor([0, 1e-30, 1e9])]
            )
            edges = binning.edges()
            assert len(edges) == binning.bins and edges[0] == 0 and (edges.diff() >= 0).all()
            bins = binning.number(-values).long()
            above = torch.cat([edges[1:], torch.tensor([torch.inf], dtype=torch.float64)])
            assert (edges[bins] <= values.double()).all() and (values.double() < above[bins]).all()
            wide = (above > edges).nonzero().squeeze(1)
            assert torch.equal(binning.number(edges[wide].float()).long(), wide), "an edge starts its bin"


def test_values_of_sixteen_bits_have_bins_of_their_own():
    binning = Binning(11, -64, 16, FOLDS["silu"])
    for dtype in (torch.bfloat16, torch.float16):
        codes = torch.arange(1, 0x7C00 if dtype == torch.float16 else 0x7F80, dtype=torch.int16).view(dtype)
        values = codes[(codes >= 2.0**-14) & (codes < 2.0**15)]
        assert binning.number(values).unique().numel() == len(values)
        assert (
            binning.edges()[binning.number(values).long()] == values.double()
        ).all() or dtype == torch.float16


def test_counts_add_up_over_chunks_and_columns():
    binning = Binning(4, -24, 8)
    values = torch.randn(1000, 7)
    whole = torch.zeros(binning.bins, dtype=torch.int64)
    rows = torch.zeros(7, binning.bins, dtype=torch.int32)
    for part in values.split(300):
        count(whole, part, binning)
        count(rows, part, binning)
    assert whole.sum() == 7000 and torch.equal(rows.sum(0), whole)
    for column in range(7):
        expected = torch.bincount(binning.number(values[:, column]).long(), minlength=binning.bins)
        assert torch.equal(rows[column].long(), expected)


def test_quantiles_of_discrete_magnitudes_lie_between_them():
    binning = Binning(11, -64, 16)
    counts = torch.zeros(1, binning.bins, dtype=torch.int64)
    count(counts[0], torch.tensor([0.0] * 5 + [1.0] * 3 + [2.0] * 2), binning)
    t = quantiles(counts, torch.tensor([0.0, 0.3, 0.55, 0.75, 0.85, 1.0]), binning)[0]
    assert t[0] == 0 and 0 < t[1] <= 1 and 0 < t[2] <= 1, "the zeros alone are dropped"
    assert 1 < t[3] <= 2 and 1 < t[4] <= 2 and t[5] > 2
    lower, upper = shares_below(counts, t[None, 1:], binning)
    assert lower.tolist() == upper.tolist() == [[0.5, 0.5, 0.8, 0.8, 1.0]]


def activations(model, text):
    """|z| of every valid token, one tensor a layer, of the dense model."""
    seen = {}
    sparsify(model, constant_thresholds(model), 0.0)

    def see(layer, module, z, up):
        seen.setdefault(layer, []).append(z.clone())

    with Observation(model, see), torch.no_grad():
        for batch in text:
            model(**batch)
    cats.restore(model)
    return [torch.cat(seen[layer]).abs() for layer in sorted(seen)]


def realised_alone(model, text, thresholds, sparsity):
    """By layer, with the layers before it dense: what a SparsityMeter reads on the calibrated activations."""
    layers = thresholds.layers
    result = []
    for layer in range(layers):
        sparsify(model, thresholds, [sparsity if other == layer else 0.0 for other in range(layers)])
        with SparsityMeter(model) as meter, torch.no_grad():
            for batch in text:
                model(**batch)
        result.append(float(meter.by_layer[layer]))
    cats.restore(model)
    return result


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_realised_sparsity_is_the_target_to_the_stated_error(family, dtype):
    model = toy(family, dtype=dtype)
    text = batches(4)
    thresholds = calibrate(model, text, progress=False)
    if dtype == torch.float32:
        assert thresholds.grid_error < 0.001
    for z in activations(model, text):
        assert len(z) == thresholds.tokens
    layers = activations(model, text)
    for s in [*SPARSITIES, 0.123, 0.777]:
        for t, z in zip(thresholds.at(s), layers, strict=True):
            share = float(((z < t) | (z == 0)).double().mean())
            assert abs(share - s) <= thresholds.grid_error + 1e-9


@pytest.mark.parametrize("dtype", DTYPES)
def test_meter_and_module_agree_with_the_stated_error(dtype):
    model = toy(dtype=dtype)
    text = batches(6)
    thresholds = calibrate(model, text, progress=False)
    for s in (0.05, 0.5, 0.7, 0.95):
        for share in realised_alone(model, text, thresholds, s):
            assert abs(share - s) <= thresholds.grid_error + 1e-9


def test_relu_zeros_are_counted_and_the_error_says_so():
    model = toy(hidden_act="relu")
    text = batches()
    thresholds = calibrate(model, text, progress=False)
    zeros = max(float((z == 0).double().mean()) for z in activations(model, text))
    assert zeros > 0.3
    assert thresholds.grid_error == pytest.approx(zeros - 0.05, abs=2e-3)
    dense = model(tokens()).logits
    sparsify(model, thresholds, 0.2)
    assert torch.equal(model(tokens()).logits, dense), "below the share of zeros nothing else is dropped"
    cats.restore(model)
    for share in realised_alone(model, text, thresholds, 0.8):
        assert share == pytest.approx(0.8, abs=1e-3)


def test_per_neuron():
    model = toy()
    text = batches(6)
    thresholds = calibrate(model, text, per="neuron", progress=False)
    assert thresholds.at(0.5).shape == (3, 80) and thresholds.per == "neuron"
    for s in (0.1, 0.5, 0.9):
        for t, z in zip(thresholds.at(s), activations(model, text), strict=True):
            share = (z < t).double()
            assert abs(float(share.mean()) - s) <= thresholds.grid_error
            assert (share.mean(0) - s).abs().median() < 0.03


def test_weights_scale_each_neuron():
    model = toy()
    text = batches(6)
    weights = torch.rand(3, 80, generator=torch.Generator().manual_seed(0)) + 0.05
    weights[0, 0] = 0
    thresholds = calibrate(model, text, weights=weights, progress=False)
    assert thresholds.values.ndim == 2 and thresholds.grid_error < 0.002 and thresholds.per == "neuron"
    for s in (0.05, 0.5, 0.9):
        t = thresholds.at(s)
        assert t.shape == (3, 80) and t[0, 0] == torch.inf
        for layer, z in enumerate(activations(model, text)):
            scaled = torch.quantile((z * weights[layer]).flatten()[:: max(1, z.numel() // 10**6)], s)
            assert float((t[layer] * weights[layer])[1:].mean()) == pytest.approx(float(scaled), rel=0.02)
            assert abs(float((z < t[layer]).double().mean()) - s) <= thresholds.grid_error


def test_padding_is_not_seen_on_either_side(llama):
    rows = [tokens(1, length, seed=length) for length in (25, 49, 96)]
    alone = [{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in rows]
    expected = calibrate(llama, alone, progress=False)
    for side in ("right", "left"):
        ids = torch.zeros(3, 96, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for number, row in enumerate(rows):
            place = slice(0, row.shape[1]) if side == "right" else slice(96 - row.shape[1], 96)
            ids[number, place], mask[number, place] = row[0], 1
        padded = calibrate(llama, [{"input_ids": ids, "attention_mask": mask}], progress=False)
        assert padded.tokens == expected.tokens == 170
        torch.testing.assert_close(padded.at(0.5), expected.at(0.5), rtol=1e-3, atol=1e-5)


def test_first_tokens_can_be_left_out(llama):
    text = batches(2)
    thresholds = calibrate(llama, text, skip_first=3, progress=False)
    assert thresholds.tokens == calibrate(llama, text, progress=False).tokens - 2 * 4 * 3
    assert "first 3" in thresholds.policy["tokens"]
    with pytest.raises(CatsError, match="hold no token"):
        calibrate(llama, text, skip_first=100, progress=False)
    with pytest.raises(CatsError, match="hold no token"):
        calibrate(llama, [], progress=False)


def test_model_is_left_as_it_was(llama):
    llama.train()
    before = dict(llama.named_modules())
    strides = [p.stride() for p in llama.parameters()]
    calibrate(llama, batches(1), progress=False)
    assert dict(llama.named_modules()) == before and all(module.training for module in llama.modules())
    assert [p.stride() for p in llama.parameters()] == strides
    bad = [{"input_ids": torch.full((1, 4), 10**6)}]
    with pytest.raises(IndexError):
        calibrate(llama, bad, progress=False)
    assert dict(llama.named_modules()) == before and all(module.training for module in llama.modules())


def test_sparse_model_is_measured_with_its_masks(llama):
    dense = calibrate(llama, batches(), progress=False)
    sparsify(llama, dense, 0.8)
    masked = calibrate(llama, batches(), progress=False)
    assert (dense.policy["measured"], masked.policy["measured"]) == ("dense", "sparse, with its masks")
    assert torch.equal(masked.at(0.8)[0], dense.at(0.8)[0]), "nothing is masked before the first layer"
    assert not torch.equal(masked.at(0.8)[1:], dense.at(0.8)[1:])
    assert [float(m.threshold) for m in cats_mlps(llama)] == dense.at(0.8).tolist()


def test_wrong_options(llama):
    text = batches(1)
    with pytest.raises(CatsError, match="per 'token' do not exist"):
        calibrate(llama, text, per="token", progress=False)
    with pytest.raises(CatsError, match=r"of shape \[3, 80\]"):
        calibrate(llama, text, weights=torch.ones(3, 81), progress=False)
    with pytest.raises(CatsError, match="Weights must be finite"):
        calibrate(llama, text, weights=torch.full((3, 80), torch.nan), progress=False)
    for skip_first in (-3, 1.5):
        with pytest.raises(CatsError, match=f"skip_first={skip_first} is not a number of tokens"):
            calibrate(llama, text, skip_first=skip_first, progress=False)
    with pytest.raises(CatsError, match="change nothing"):
        calibrate(llama, text, weights=torch.ones(3, 80), per="neuron", progress=False)


def test_a_layer_that_did_not_run_is_refused(llama):
    llama.model.layers[1].forward = lambda hidden, *_, **__: hidden
    with pytest.raises(CatsError, match=r"model\.layers\.1\.mlp was not called on every token"):
        calibrate(llama, batches(1), progress=False)
    llama.model.layers[1] = llama.model.layers[0]  # serves twice
    assert calibrate(llama, batches(1), progress=False).layers == 2


@pytest.mark.parametrize(
    "text",
    [
        batches(1)[0],
        ["text"],
        [tokens()],
        [{"ids": tokens()}],
        [{"input_ids": tokens()[0]}],
        [{"input_ids": tokens().tolist()}],
        [{"input_ids": tokens(2, 0)}],
    ],
)
def test_batches_of_another_form_are_refused(llama, text):
    with pytest.raises(CatsError, match="A batch must be"):
        calibrate(llama, text, progress=False)


def test_models_that_one_threshold_a_layer_does_not_fit_are_refused(llama):
    llama.model.layers[1].mlp.act_fn = torch.nn.GELU()
    with pytest.raises(CatsError, match="The layers differ in activation"):
        calibrate(llama, batches(1), progress=False)
    model = toy()
    model.config.is_encoder_decoder = True
    with pytest.raises(CatsError, match="LlamaForCausalLM is an encoder-decoder"):
        calibrate(model, batches(1), progress=False)


def test_activations_that_are_not_finite_are_refused(llama):
    llama.model.layers[1].mlp.gate_proj.weight.data[3, 4] = torch.nan
    with pytest.raises(CatsError, match=r"Layer 1 has .* gate activations that are infinite, NaN"):
        calibrate(llama, batches(1), progress=False)


class Interrupted(Exception):
    pass


def interrupted(text, after):
    yield from text[:after]
    raise Interrupted


@pytest.mark.parametrize("options", [{}, {"per": "neuron"}, {"weights": torch.ones(3, 80)}])
def test_interrupted_calibration_goes_on_to_the_bit(llama, tmp_path, monkeypatch, options):
    monkeypatch.setattr(cats.calibration.checkpoint, "SECONDS", 0.0)
    text = batches(6)
    file = tmp_path / "t.checkpoint"
    expected = calibrate(llama, text, progress=False, **options)
    with pytest.raises(Interrupted):
        calibrate(llama, interrupted(text, 4), checkpoint=file, progress=False, **options)
    kept = file.read_bytes()
    resumed = calibrate(llama, text, checkpoint=file, progress=False, **options)
    assert resumed.tokens == expected.tokens
    assert torch.equal(resumed.values, expected.values) and torch.equal(resumed.grid, expected.grid)
    assert calibrate(llama, text, checkpoint=file, progress=False, **options).tokens == expected.tokens
    file.write_bytes(kept)
    for wrong in (
        lambda: calibrate(toy(seed=5), text, checkpoint=file, progress=False, **options),
        lambda: calibrate(llama.bfloat16(), text, checkpoint=file, progress=False, **options),
    ):
        with pytest.raises(CatsError, match="another model or other options: delete it"):
            wrong()


def test_checkpoint_of_other_text_or_options_is_refused(llama, tmp_path):
    file = tmp_path / "t.checkpoint"
    calibrate(llama, batches(3), checkpoint=file, progress=False)
    with pytest.raises(CatsError, match="with other text: delete it"):
        calibrate(llama, batches(3, seed=9), checkpoint=file, progress=False)
    with pytest.raises(CatsError, match="with more text: delete it"):
        calibrate(llama, batches(2), checkpoint=file, progress=False)
    with pytest.raises(CatsError, match="other options"):
        calibrate(llama, batches(3), checkpoint=file, skip_first=1, progress=False)
    longer = calibrate(llama, batches(5), checkpoint=file, progress=False)
    assert torch.equal(longer.values, calibrate(llama, batches(5), progress=False).values)


@pytest.mark.parametrize("damage", ["truncated", "empty", "foreign", "text"])
def test_damaged_checkpoint_is_refused(llama, tmp_path, damage):
    file = tmp_path / "t.checkpoint"
    calibrate(llama, batches(1), checkpoint=file, progress=False)
    if damage == "foreign":
        save_file({"0": torch.zeros(3)}, file)
        assert load_file(file)
    else:
        data = {"truncated": file.read_bytes()[:-100], "empty": b"", "text": b"not a checkpoint"}
        file.write_bytes(data[damage])
    with pytest.raises(CatsError, match="is damaged: delete it"):
        calibrate(llama, batches(1), checkpoint=file, progress=False)


KILLED = """
import sys, time
sys.path.insert(0, sys.argv[2])
import cats.calibration.checkpoint
cats.calibration.checkpoint.SECONDS = 0.0
from toys import batches, toy
def slowly():
    for batch in batches(6):
        yield batch
        time.sleep(0.2)
print("started", flush=True)
cats.calibrate(toy(), slowly(), checkpoint=sys.argv[1], progress=False)
"""


def test_killed_calibration_goes_on(llama, tmp_path):
    file = tmp_path / "t.checkpoint"
    command = [sys.executable, "-c", KILLED, str(file), str(Path(__file__).parents[1])]
    process = subprocess.Popen(command, stdout=subprocess.PIPE)
    try:
        deadline = time.monotonic() + 300
        while not file.exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
    finally:
        process.kill()
        process.communicate()
    assert file.exists()
    expected = calibrate(llama, batches(6), progress=False)
    resumed = calibrate(llama, batches(6), checkpoint=file, progress=False)
    assert resumed.tokens == expected.tokens and torch.equal(resumed.values, expected.values)


def test_counts_take_bounded_memory():
    """50 MB for 32 layers of any width, whatever the number of tokens, as the docstring says."""
    bins = Binning(11, -64, 16, FOLDS["silu"]).bins
    assert 32 * bins * 8 < 50e6
    assert Binning(4, -24, 8, FOLDS["silu"], fold_bits=2).bins * 4 < 2500


def test_embedded_model(smollm):
    text = corpora.batches(corpora.load(), smollm.tokenizer, tokens=600, sequence_length=128)
    thresholds = calibrate(smollm.model, text, source={"model": smollm.info, **text.info}, progress=False)
    assert thresholds.tokens == 600 and thresholds.grid_error < 0.001
    assert thresholds.corpus["sha256"] == text.info["sha256"] and thresholds.model["weights"] == "trained"
    layers = activations(smollm.model, text)
    for s in SPARSITIES:
        for t, z in zip(thresholds.at(s), layers, strict=True):
            assert abs(float((z < t).double().mean()) - s) <= 0.001
