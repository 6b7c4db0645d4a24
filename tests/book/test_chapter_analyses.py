"""What chapters say of the shipped records: boxes in two sentences, tables by hand where they can be."""

import pytest

from cats.book.analysis import (
    batching,
    decoding,
    decoding_reported,
    decoding_step,
    disputed,
    finetuning,
    generation,
    kernels,
    perplexity,
    recorded,
    recovery,
    reported,
    rivals,
    rivals_tables,
    task_finetuning,
    transfer,
    variants,
    zero_shot,
)
from cats.records import record as records

SHAPES = ["4096x11008", "8192x28672"]
GENERAL = ["general-smollm2-135m", "whole-smollm2-135m"]


@pytest.fixture(scope="module")
def measured():
    return kernels.read("h100", SHAPES)


@pytest.fixture(scope="module")
def rates():
    return decoding.on_gpu()


def boxes():
    """A box of each chapter that has records, by its chapter."""
    tasks = recorded.rows("zero_shot", list(recorded.MODELS))
    found = {name: rivals.averages(rows) for name, rows in _rivals().items()}
    sweep = disputed.sweep(disputed.slugs("gemma-3-270m"))
    runs = {"smollm2-135m": recovery.gaps(recovery.records_of("smollm2-135m"))}
    return {
        "03": perplexity.box(recorded.rows("perplexity", list(recorded.MODELS))),
        "04": zero_shot.box(tasks),
        "05": generation.box(recorded.rows("generation", ["qwen2.5-coder-1.5b-gsm8k"])),
        "06": transfer.box(transfer.from_records(_transfers(), "transfer-from-")),
        "07": variants.box(tasks[tasks.record == "gemma-3-270m"], ["cats", "centred"]),
        "08": kernels.box(kernels.read("h100", SHAPES)),
        "09": decoding.box(decoding.on_gpu()),
        "10": batching.box(recorded.find("mlp_latency", "h100-batch")),
        "11": rivals_tables.box(found),
        "13": disputed.box({"gemma-3-270m, accuracy": (sweep, disputed.ACCURACY, disputed.CHOICES)}, "40%"),
        "14": finetuning.box(GENERAL),
        "15": task_finetuning.box(["sst2-smollm2-135m", "boolq-smollm2-135m"]),
        "16": recovery.box(runs),
    }


def _transfers():
    return recorded.rows("zero_shot", [f"transfer-from-{name}" for name in ("python-docs", "shakespeare")])


def _rivals():
    rows = recorded.rows("zero_shot", ["rivals-smollm2-135m"])
    return {"smollm2-135m": rows}


def test_every_box_has_a_number_and_asks_a_question():
    for chapter, box in boxes().items():
        assert box.question.endswith("?") and any(c.isdigit() for c in box.answer), chapter
        assert box.figure.startswith("fig-") and box.command.startswith("cats "), chapter
        assert "nan" not in box._repr_markdown_() and "recorded yet" not in box.answer, chapter


def test_without_records_a_box_says_so():
    nothing = recorded.rows("zero_shot", ["no-such-record"])
    assert "No full test set" in zero_shot.box(nothing).answer
    assert "Nothing is recorded" in finetuning.box(["no-such-record"]).answer
    assert "No batch" in batching.box(None).answer and "Nothing" in recovery.box({}).answer


def test_the_gain_of_a_kernel_is_that_of_its_record(measured):
    row = measured.at("4096 × 11008", 0.5)
    assert row.speedup == pytest.approx(row.dense_us / row.latency_us)
    ways = kernels.ways(measured).frame
    assert list(ways.bytes) == ["100\u00a0%", "100\u00a0%", "133\u00a0%", "67\u00a0%", "67\u00a0%"]
    assert list(kernels.shares(measured).frame["shape"]) == ["4096 × 11008", "8192 × 28672"]
    above = kernels.above_bytes(measured.cats)
    assert kernels.fixed_us(measured) == pytest.approx(above.median()) and (above > 0).all()


def test_rates_are_looked_up_by_length_and_bounds_follow_from_bytes(rates):
    name = decoding.LARGE[0]
    assert rates.gain(name, 0.5, 2048) < rates.gain(name, 0.5) < rates.bound(name, 0.5)
    assert rates.value(name, "cats_loop", 0.123) is None
    accounts = decoding.counted()
    share = accounts[name].mlp_share
    assert decoding_reported.bounds(accounts)[f"{name}, fp32"] == pytest.approx(1 / (1 - share / 3))
    assert decoding_reported.reading(accounts)["Mistral-7B, bf16"] == pytest.approx(468, abs=1)


def test_parts_of_a_step_add_up_to_its_time():
    rows = records.read("decode_step").rows
    times = decoding_step.by_part(rows)
    for (name, parts), (_, step) in zip(times.iterrows(), rows.groupby("sparsity"), strict=True):
        assert parts.sum() == pytest.approx(step.us.sum() + step.gap_us.sum()), name


def test_gaps_begin_at_the_difference_to_dense_before_training():
    record = recorded.find("finetuning", GENERAL[0])
    rows, gaps = record.rows, finetuning.gaps(record.rows)
    start = rows[rows.step == 0].groupby("method").heldout_nll_nats.mean()
    assert gaps.before["cats 0.5"] == pytest.approx(start["cats 0.5"] - start["dense"])
    assert gaps.before["dense"] == 0 and gaps.low["cats 0.5"] <= gaps.after["cats 0.5"]
    runs = recovery.gaps(recovery.records_of("smollm2-135m"))
    plain = runs[runs.recipe == recovery.PLAIN]
    assert plain.of_plain.tolist() == pytest.approx([1.0] * len(plain))


def test_the_number_of_rows_is_compared_from_fewest_to_most():
    slugs = [f"disputes-smollm2-135m-{count}-rows" for count in (100, 500, 1000)]
    table, said = disputed.rows_table(slugs, (100, 500, 1000))
    assert said.startswith("From 100 to 1,000 rows the loss moves by 0.023 nats at most") and "0.047" in said
    assert list(table.frame.iloc[:, 0]) == ["100", "500", "1000"]
    assert disputed.rows_table(slugs[:1], (100,))[0] is None


def test_a_reported_perplexity_is_read_in_both_ways():
    rows = reported.losses().iloc[1]
    assert rows.over_dense == pytest.approx(2.203 / 2.18 - 1) and rows.as_nats == pytest.approx(
        0.0233, abs=1e-4
    )
    assert reported.reading()["disputed_reading"] == pytest.approx(8.846, abs=1e-3)


def test_a_task_is_learned_where_dense_leaves_chance():
    assert (
        task_finetuning.learned({"a": 0.7, "b": 0.5}) == "Dense training ends above 65% on a, and not on b."
    )
    assert task_finetuning.learned({}) == "None of the tasks is measured at full size yet."
    rows = task_finetuning.rows_table().frame
    assert rows.BoolQ.tolist() == ["2", "16", "16"] and rows.here.tolist() == ["16"] * 3
