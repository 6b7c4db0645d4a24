"""The table of widths: a row for each recorded shape, with the gains of the records, below the byte ratio."""

import pytest

from cats.book.analysis import decoding, kernel_widths, kernels
from cats.book.words import tidy
from cats.records import record

HALF = tidy("× dense at 50%")


def test_every_width_has_a_row_with_its_recorded_gain():
    measured = kernel_widths.read()
    frame = kernel_widths.table(measured).frame
    assert len(frame) == len(kernel_widths.SHAPES)
    gains = []
    for shape, shown in zip(frame["hidden × intermediate size"], frame[HALF], strict=True):
        gains.append(measured.best.latency_us[shape] / measured.at(shape, 0.5).latency_us)
        assert shown == f"{gains[-1]:.2f}" and gains[-1] < 1.5
    numbers = kernel_widths.numbers(measured)
    assert numbers["kernels_wide_gain_low"] == pytest.approx(min(gains[3:]))
    assert numbers["kernels_wide_small_high"] == pytest.approx(max(gains[:2]))
    assert kernels.above_bytes(measured.cats).min() > 0


def test_a_gain_above_the_bytes_is_not_shown():
    shown = decoding.h200_table(record.read("decode", slug="nvidia-h200-llama-2-7b")).frame
    assert shown["gate sparsity"].tolist() == [tidy(label) for label in ("dense", "50%", "70%", "90%")]
    assert shown["× dense"].tolist()[1] == "not reported" and shown["× dense"].tolist()[0] == "1.00"
