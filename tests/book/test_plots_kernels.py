import io
import xml.etree.ElementTree as ET

import matplotlib
import pandas as pd
import pytest

from cats.book.plots import kernels

pytestmark = pytest.mark.usefixtures("themed")


def latencies() -> pd.DataFrame:
    return pd.DataFrame(
        [
            {
                "shape": shape,
                "sparsity": s,
                "latency_us": us,
                "latency_us_p5": us - 1,
                "latency_us_p95": us + 2,
            }
            | {
                "bound_us": 0.9 * us,
                "dense_us": 100.0 * scale,
                "speedup": 100 * scale / us,
                "variant": "cats",
            }
            for scale, shape in enumerate(("64 × 160", "63 × 129"), start=1)
            for s, us in ((0.0, 99.0 * scale), (0.5, 70.0 * scale), (0.9, 45.0 * scale))
        ]
    )


def live() -> pd.DataFrame:
    rows = latencies()
    rows = rows[rows["shape"] == "64 × 160"]
    return pd.concat([rows, rows.head(1).assign(variant="dense_best")])


def rates(sparsities=(0.0, 0.5)) -> pd.DataFrame:
    return pd.DataFrame(
        {
            "sparsity": sparsities,
            "tokens_per_s": [10.0 + 4 * s for s in sparsities],
            "tokens_per_s_low": [9.5 + 4 * s for s in sparsities],
            "tokens_per_s_high": [11.0 + 4 * s for s in sparsities],
            "bound_speedup": [1 + s / 2 for s in sparsities],
        }
    )


REPORTED = pd.DataFrame(
    {"kind": ["CATS", "CATS", "optimal", "optimal"], "sparsity": [0.5, 0.7, 0.5, 0.99]}
    | {"speedup": [1.4, 1.7, 1.8, 30.0]}
)
DECODING = pd.DataFrame(
    {"series": ["Llama-2-7B, fp32"] * 2 + ["Mistral-7B, bf16"] * 2, "new_tokens": [256, 512] * 2}
    | {"speedup": [1.2, 1.18, 1.14, 1.17]}
)
BOUNDS = {"Llama-2-7B, fp32": 1.28, "Mistral-7B, bf16": 1.36}
STARTED = pd.DataFrame({"name": ["dense", "CATS"], "graph_us": [97.0, 66.0], "eager_us": [108.0, 166.0]})
REACHED = pd.DataFrame(
    {"kind": ["dense", "CATS", "CATS"], "megabytes": [270.0, 180.0, 30.0], "gbs": [2800.0, 2700.0, 1700.0]}
)
DECODED = pd.DataFrame(
    [
        {"geometry": model, "variant": f"{kind}_{variant}", "sparsity": s, "new_tokens": length}
        | {"tokens_per_s": rate * (1 + s / 2), "bound_speedup": 1 + 0.6 * s}
        for model in ("Llama-2-7B", "Mistral-7B")
        for variant, rate in (("loop", 200.0), ("generate_static", 110.0), ("generate_eager", 40.0))
        for length in ((128, 512) if variant == "loop" else (128,))
        for kind, s in (("dense", 0.0), ("cats", 0.5), ("cats", 0.9))
    ]
)
FIGURES = {
    "latency": lambda: kernels.latency(latencies()),
    "speedup": lambda: kernels.speedup(latencies(), REPORTED),
    "live_latency": lambda: kernels.live_latency(live()),
    "live_latency of one sparsity": lambda: kernels.live_latency(live().drop_duplicates(["variant"])),
    "tokens_per_second": lambda: kernels.tokens_per_second(rates()),
    "tokens_per_second of dense alone": lambda: kernels.tokens_per_second(rates((0.0,))),
    "reported_decoding": lambda: kernels.reported_decoding(DECODING, BOUNDS),
    "launches": lambda: kernels.launches(STARTED),
    "roofline": lambda: kernels.roofline(REACHED, 3000.0, 8.0),
    "decoding_rates": lambda: kernels.decoding_rates(DECODED),
    "step": lambda: kernels.step(
        pd.DataFrame({"gated MLPs": [60.0, 40.0], "idle": [5.0, 4.0]}, index=["dense", "CATS 50%"])
    ),
}


@pytest.mark.parametrize("name", FIGURES)
def test_every_figure_draws_names_its_axes_and_is_legible(name):
    figure = FIGURES[name]()
    stream = io.StringIO()
    figure.savefig(stream, format="svg", metadata={"Date": None})
    ET.fromstring(stream.getvalue())
    assert len(stream.getvalue()) < 400_000
    assert figure.axes[0].get_ylabel(), "panels beside each other share it"
    assert all(axes.get_xlabel() or axes.get_xticklabels() for axes in figure.axes)
    figure.draw_without_rendering()
    frame = figure.get_tightbbox()
    width, height = figure.get_size_inches()
    assert frame.x0 > -0.3 and frame.y0 > -0.3 and frame.x1 < width + 0.9 and frame.y1 < height + 0.3
    texts = [text for text in figure.findobj(matplotlib.text.Text) if text.get_text()]
    assert min(text.get_fontsize() for text in texts) >= 9


def test_what_the_paper_calls_optimal_is_cut_where_it_leaves_the_figure():
    figure = kernels.speedup(latencies(), REPORTED)
    (axes,) = figure.axes
    drawn = {points.get_label(): len(points.get_offsets()) for points in axes.collections}
    assert drawn == {"paper: CATS": 2, "paper: optimal": 1}


def test_the_bound_on_tokens_per_second_is_that_of_the_dense_rate():
    figure = kernels.tokens_per_second(rates((0.0, 0.5, 0.7)))
    lines = [c for c in figure.axes[0].collections if len(c.get_segments()) == 2 and c.get_linestyle()[0][1]]
    heights = [segment[0][1] for segment in lines[0].get_segments()]
    assert heights == pytest.approx([12.5, 13.5])
