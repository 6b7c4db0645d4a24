"""Figures of fine-tuning from records that the library wrote: seeds, texts, recipes."""


import matplotlib
import pandas as pd
import pytest

from cats.book import plots
from cats.book.plots import finetuning
from cats.finetuning import plan, table
from cats.records import record as records

pytestmark = pytest.mark.usefixtures("themed")
LAYERS = 3


def point(step: int, loss: float, sparse: bool, right: int) -> dict:
    rows = [[loss * 4, 4, int(row < right)] for row in range(4)]
    known = {"step": step, "heldout_nll": loss, "indomain_nll": loss - 0.5, "heldout_rows": rows}
    known |= {"train_loss": loss if step else None, "rows_trained": 16 * step}
    known |= {"heldout_accuracy": right / 4, "indomain_accuracy": right / 4}
    if sparse:
        shares = [0.5 + 0.01 * layer + 0.001 * step for layer in range(LAYERS)]
        known |= {"heldout_realised": shares, "indomain_realised": shares}
    return known


@pytest.fixture(scope="module")
def record(tmp_path_factory):
    """A record of three methods and two seeds, as `cats finetune` writes it, read again."""
    given = {"model": "toy", "record": "general-toy", "methods": ["dense", {"cats": [0.5, 0.7]}], "steps": 4}
    each = plan.comparison(given | {"seeds": [0, 1], "grid": [2]}, "the test")
    done = []
    for recipe in each.recipes:
        gap = recipe.sparsity or 0.0
        points = [
            point(step, 3 + gap * (5 - step) + 0.1 * recipe.seed, recipe.sparse, 1 + step // 2)
            for step in (0, 2, 4)
        ]
        after = {"method": recipe.method, "seed": recipe.seed, "step_s": 1 + gap, "peak_memory_gb": 2.0}
        after |= {"recalibrated": point(4, 3.1, True, 3)} if recipe.sparse else {}
        done.append((recipe, {"points": points, "after": after}))
    folder = tmp_path_factory.mktemp("records")
    info = {"model": {"id": "toy"}, "data": {}}
    table.record(each, done, info, folder)
    return records.read("finetuning", folder=folder)


def texts(figure) -> list[str]:
    return [text.get_text() for text in figure.findobj(matplotlib.text.Text)]


def test_methods_have_the_names_of_the_paper():
    names = ["dense", "cats 0.5", "relufication", "cats 0.7 recalibrated"]
    assert [finetuning.title(name) for name in names[:3]] == ["dense", "CATS 50%", "ReLUfication"]
    assert finetuning.title(names[3]) == "CATS 0.7 recalibrated"


def test_curves_have_a_line_a_method_and_a_band_over_seeds(record):
    rows = record.rows[~record.rows.method.str.contains("recalibrated")]
    frame = rows.assign(value=rows.heldout_nll_nats)
    for count in (1, 3):
        figure = finetuning.curves({f"panel {n}": frame for n in range(count)})
        assert len(figure.axes) == count and all(len(axes.lines) == 3 for axes in figure.axes)
        assert {"dense", "CATS 50%", "CATS 70%", "panel 0"} <= set(texts(figure))
        assert figure.axes[0].lines[0].get_color() == plots.GREY
        assert list(figure.axes[0].lines[1].get_ydata()) == pytest.approx([5.55, 4.55, 3.55])
        band = figure.axes[0].collections[1].get_paths()[0].vertices[:, 1]
        assert band.min() == pytest.approx(3.5) and band.max() == pytest.approx(5.6)


def test_unequal_batches_are_drawn_over_steps_and_over_rows(record):
    rows = record.rows[record.rows.method == "cats 0.5"].assign(method="whole batch", value=1.0)
    half = rows.assign(method="half batch", rows_trained=rows.rows_trained // 2)
    figure = finetuning.unequal(pd.concat([rows, half]))
    ends = [[line.get_xdata()[-1] for line in axes.lines] for axes in figure.axes]
    assert ends == [[4, 4], [64, 32]]


def test_realised_sparsity_is_that_before_the_first_and_after_the_last_step(record):
    tidy = finetuning.by_layer(record.rows)
    assert len(tidy) == 2 * 2 * LAYERS
    last = tidy[(tidy.moment == finetuning.AFTER) & (tidy.sparsity == 0.5)]
    assert last.realised.tolist() == pytest.approx([0.504, 0.514, 0.524])
    other = finetuning.by_layer(record.rows, "indomain_realised_by_layer")
    figure = finetuning.realised({"a": tidy, "b": other})
    assert [len(axes.lines) for axes in figure.axes] == [6, 6]
    assert {"50%, before training", "70%, after training"} <= set(texts(figure))


def test_both_checkpoints_are_marked(record):
    curve = record.rows[(record.rows.method == "cats 0.5") & (record.rows.seed == 0)]
    kept = {"best": table.kept(curve), "worst": table.kept(curve, reference_sign=True)}
    figure = finetuning.checkpoints(curve, kept)
    assert kept == {"best": 4, "worst": 2} and {"best", "worst"} <= set(texts(figure))


def test_recovery_has_a_row_a_recipe_and_a_panel_a_measurement():
    rows = pd.DataFrame(
        [
            {"recipe": recipe, "sparsity": level, "before": 1.0, "after": 0.4}
            for recipe in ("plain LoRA", "distillation")
            for level in (0.7, 0.9)
        ]
    )
    figure = finetuning.recovery({"live": rows[rows.sparsity == 0.7], "full size": rows})
    names = [tick.get_text() for tick in figure.axes[0].get_yticklabels()]
    assert names == ["plain LoRA", "distillation"]
    assert {"live", "full size", "70% gate sparsity", "90% gate sparsity"} <= set(texts(figure))


@pytest.mark.parametrize("least", [0.4, 0.01])
def test_recovery_labels_its_axis_in_panels_of_any_width(least):
    rows = pd.DataFrame([{"recipe": "plain LoRA", "sparsity": 0.7, "before": 7.0, "after": least}])
    for count in (1, 4):
        figure = finetuning.recovery({f"panel {n}": rows for n in range(count)})
        low, high = figure.axes[0].get_xlim()
        assert sum(low <= tick <= high for tick in figure.axes[0].get_xticks()) >= 2


def test_shares_by_layer_have_a_line_a_name():
    figure = finetuning.layers({"learned": [0.6, 0.8], "alike": [0.7, 0.7]}, 0.7)
    assert {"learned", "alike"} <= set(texts(figure)) and len(figure.axes[0].lines) == 3
