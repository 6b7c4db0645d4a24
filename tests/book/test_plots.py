import io
import xml.etree.ElementTree as ET

import matplotlib
import numpy as np
import pandas as pd
import pytest
import torch
import toys

from cats.book import plots
from cats.book.analysis.activations import first_token, measure
from cats.book.plots import activations, calibration, perplexity
from cats.calibration.calibrate import calibrate

pytestmark = pytest.mark.usefixtures("themed")
SPARSITIES = [0.5, 0.7, 0.9]


@pytest.fixture(scope="module")
def z():
    return measure(
        toys.toy("llama"), toys.batches(), groups=("first token", "other tokens"), label=first_token
    )


@pytest.fixture(scope="module")
def thresholds():
    return calibrate(toys.toy("llama"), toys.batches())


def svg(figure) -> str:
    stream = io.StringIO()
    figure.savefig(stream, format="svg", metadata={"Date": None})
    return stream.getvalue()


def errors() -> pd.DataFrame:
    cases = [(2, 1), (2, 2), (5, 1), (9, 1)]
    return pd.DataFrame(
        [
            {"sparsity": s, "rows": rows, "draw": draw, "layer": layer, "error": 0.01 * (layer - draw)}
            for s in SPARSITIES
            for rows, draw in cases
            for layer in range(3)
        ]
    )


def results() -> tuple[pd.DataFrame, pd.DataFrame]:
    rows = pd.DataFrame(
        {
            "gate_sparsity": [0.0, 0.5, 0.9],
            "nll_nats": [3.0, 3.2, 7.5],
            "delta_nll": [np.nan, 0.2, 4.5],
            "delta_low": [np.nan, 0.15, 4.0],
            "delta_high": [np.nan, 0.26, 5.1],
        }
    )
    deltas = pd.DataFrame(
        {
            "gate_sparsity": [0.5, 0.5, 0.9, 0.9],
            "tokens": [50, 90, 50, 90],
            "delta_nll": [-0.05, 0.3, 4.0, 5.0],
        }
    )
    return rows, deltas


def figures(z, thresholds):
    rows, deltas = results()
    realised = {s: torch.full((3,), s) + torch.tensor([0.01, -0.02, 0.0]) for s in SPARSITIES}
    per_token = {s: (s + 0.05 * torch.randn(3, 40)).clamp(0, 1) for s in SPARSITIES}
    achieved = {s: (torch.full((3,), s), torch.full((3,), s - 0.01)) for s in SPARSITIES}
    return {
        "all_layers": activations.all_layers(z, 0.5),
        "selected_layers": activations.selected_layers(z, [0, 2], SPARSITIES),
        "concentration": activations.concentration(z, SPARSITIES, 0.1),
        "thresholds_by_depth": activations.thresholds_by_depth({"one": z, "other": z}, SPARSITIES),
        "first_tokens": activations.first_tokens(z, "first token", "other tokens"),
        "by_layer": calibration.by_layer(thresholds, SPARSITIES),
        "target_and_realised": calibration.target_and_realised(realised, per_token),
        "samples": calibration.samples(errors(), SPARSITIES),
        "exact_and_reference": calibration.exact_and_reference(achieved),
        "shift_by_layer": calibration.shift_by_layer({"s = 50%": realised[0.5] - 0.5}, "points"),
        "against_sparsity": perplexity.against_sparsity(rows),
        "by_document": perplexity.by_document(deltas, rows[1:]),
    }


def test_every_figure_draws_names_its_axes_and_is_small(z, thresholds):
    for name, figure in figures(z, thresholds).items():
        drawn = svg(figure)
        ET.fromstring(drawn)
        assert len(drawn) < 400_000, name
        shown = [axes for axes in figure.axes if axes.get_visible()]
        assert figure.get_supylabel() or all(axes.get_ylabel() for axes in shown), name
        assert figure.get_supxlabel() or any(axes.get_xlabel() or axes.get_xticklabels() for axes in shown), (
            name
        )


def test_no_text_is_cut_off_or_smaller_than_is_legible(z, thresholds):
    for name, figure in figures(z, thresholds).items():
        figure.draw_without_rendering()
        frame = figure.get_tightbbox().padded(0.02)
        width, height = figure.get_size_inches()
        assert frame.x0 > -0.3 and frame.y0 > -0.3, name
        assert frame.x1 < width + 0.9 and frame.y1 < height + 0.3, name
        texts = figure.findobj(matplotlib.text.Text)
        assert min(text.get_fontsize() for text in texts if text.get_text()) >= 9, name


def test_equal_data_give_equal_files(z):
    first, second = (svg(activations.selected_layers(z, [0, 1], SPARSITIES)) for _ in range(2))
    assert first == second


def test_lines_are_told_apart_without_colour():
    looks = [(str(look["linestyle"]), look["marker"]) for look in map(plots.style, range(6))]
    assert len(set(looks)) == 6


def test_labels_beside_lines_do_not_overlap():
    _, axes = plots.figure()
    axes.plot([0, 1], [0, 1])
    plots.label_lines(axes, [(1, 0.5, text, "k") for text in ("a", "b", "c")], gap=0.1)
    heights = sorted(annotation.xy[1] for annotation in axes.texts)
    assert np.diff(heights).min() >= 0.1 - 1e-9


@pytest.mark.parametrize(("low", "high"), [(20, 30), (20, 400), (86, 17_000), (8.8, 9.6), (5, 1e7)])
def test_perplexity_ticks_are_few_and_within_the_axis(low, high):
    ticks = perplexity._round_ticks(low, high)
    assert 1 <= len(ticks) <= 9 and all(low <= tick <= high for tick in ticks)


def test_losses_without_an_interval_have_no_bar():
    nothing = [None, None]
    rows = pd.DataFrame({"gate_sparsity": [0.0, 0.5], "nll_nats": [4.0, 4.5]})
    figure = perplexity.against_sparsity(rows.assign(delta_low=nothing, delta_high=nothing))
    [bars] = figure.axes[0].containers[0].lines[2]
    assert all(np.ptp(segment[:, 1]) == 0 for segment in bars.get_segments())
