"""Figures on batches and on tasks: every series is drawn, with a record and without one."""

import matplotlib
import pandas as pd
import pytest

from cats.book import plots
from cats.book.plots import batching, zero_shot

pytestmark = pytest.mark.usefixtures("themed")


def unions() -> pd.DataFrame:
    return pd.DataFrame(
        [
            {"sparsity": s, "rows": n, "kind": kind, "union_density": 1 - s ** (n * shift), "layer": n}
            | {"independent_density": 1 - s**n}
            for s in (0.5, 0.9)
            for n in (1, 2, 4)
            for kind, shift in (("consecutive", 0.7), ("different", 0.8), ("independent", 1.0))
        ]
    )


def measured() -> pd.DataFrame:
    return pd.DataFrame(
        [
            {
                "batch": n,
                "sparsity": s,
                "union_density": 1 - s**n,
                "relative": 1 - s / n,
                "speedup": 1 + s / n,
            }
            for n in (1, 2, 4)
            for s in (0.5, 0.9)
        ]
    )


def texts(figure) -> list[str]:
    return [text.get_text() for text in figure.findobj(matplotlib.text.Text)]


def test_unions_have_a_panel_a_sparsity_and_a_line_a_kind():
    figure = batching.union(unions())
    assert len(figure.axes) == 2 and all(len(axes.lines) == 3 for axes in figure.axes)
    assert {"next tokens of a text", "tokens of other texts", "independent masks"} <= set(texts(figure))


def test_layers_show_both_measured_and_independent_masks():
    rows = unions()
    axes = batching.by_layer(rows[rows.kind == "different"]).axes[0]
    assert sum(len(line.get_xdata()) == 3 for line in axes.lines) == 4


def test_measured_batches_are_drawn_beside_the_bytes_and_their_absence_is_no_fault():
    bounds = unions()
    bounds = bounds[bounds.kind == "different"]
    dashed = batching.against_rows(bounds, pd.DataFrame())
    assert [len(axes.lines) for axes in dashed.axes] == [3, 3]
    dense = pd.DataFrame([{"batch": n, "sparsity": 0.0, "relative": 1.0} for n in (1, 2, 4)])
    both = batching.against_rows(bounds, pd.concat([dense, measured()]))
    assert [len(axes.lines) for axes in both.axes] == [6, 6]
    times = both.axes[0].lines[1].get_ydata()
    assert list(times) == [1.0, 1.0, 1.0]


def test_the_crossover_labels_batches_and_marks_unions_where_nothing_is_measured():
    bounds = unions()
    bounds = bounds[bounds.kind == "different"]
    assert {"1 row", "2 rows", "4 rows"} <= set(texts(batching.crossover(bounds, measured())))
    marked = texts(batching.crossover(bounds, pd.DataFrame()))
    assert {"50% gate sparsity", "90% gate sparsity", "1", "2", "4"} <= set(marked)


def test_rows_on_a_cpu_have_a_line_for_dense_and_each_sparsity():
    rows = pd.DataFrame(
        [
            {"batch": n, "sparsity": s, "variant": "cats" if s else "dense_best", "latency_us": us}
            | {"latency_us_p5": us - 1, "latency_us_p95": us + 3}
            for n in (1, 2)
            for s, us in ((0.0, 900.0 * n), (0.5, 500.0 * n))
        ]
    )
    assert {"dense", "CATS 50%"} <= set(texts(batching.cpu_rows(rows)))


def test_a_forest_has_every_task_and_leaves_out_what_has_no_difference():
    rows = pd.DataFrame(
        [
            {"task": task, "label": label, "delta_acc": delta, "delta_low": -0.2, "delta_high": 0.1}
            for task in ("piqa", "sciq")
            for label, delta in (("dense", None), ("CATS 50%", -0.05), ("CATS 70%", -0.1))
        ]
    )
    figure = zero_shot.forest(rows)
    assert [tick.get_text() for tick in figure.axes[0].get_yticklabels()] == ["piqa", "sciq"]
    assert {"CATS 50%", "CATS 70%"} <= set(texts(figure)) and "dense" not in texts(figure)


def test_what_is_kept_tells_the_papers_values_from_measured_ones():
    rows = pd.DataFrame(
        [
            {"series": series, "gate_sparsity": s, "model_sparsity": s / 2, "share": 1 - s / 10}
            | {"low": 0.9, "high": 1.0, "reported": reported}
            for series, reported in (("Llama-2-7B, paper", True), ("here, CATS", False))
            for s in (0.5, 0.7)
        ]
    )
    figure = zero_shot.kept(rows)
    lines = figure.axes[0].lines
    left = [line for line in lines if len(line.get_xdata()) == 2 and line.get_marker() in set("os^")]
    assert {line.get_markerfacecolor() for line in left} == {"white", plots.BLUE}
    assert figure.axes[1].get_xlabel() == "model-level sparsity"


def test_losses_have_a_panel_for_each_measurement():
    rows = pd.DataFrame(
        [
            {"rule": rule, "gate_sparsity": s, "delta_nll": s, "delta_low": s - 0.1, "delta_high": s + 0.1}
            for rule in ("cats", "chess")
            for s in (0.5, 0.7)
        ]
    )
    more = pd.concat([rows, rows.assign(rule="neuron")])
    figure = zero_shot.losses({"live": rows, "a record": more})
    assert [tick.get_text() for tick in figure.axes[0].get_yticklabels()] == ["cats", "chess", "neuron"]
    assert {"live", "a record", "50% gate sparsity"} <= set(texts(figure))
