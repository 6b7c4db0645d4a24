"""What a caller notes about a calibration text: kept as plain values, or refused before the text is read."""

import datetime
import json
import math
from pathlib import Path, PurePosixPath

import numpy as np
import pytest
import torch
import toys

from cats.calibration.calibrate import calibrate
from cats.errors import CatsError


@pytest.mark.parametrize(
    ("noted", "kept"),
    [
        (np.int64(4), 4),
        (np.float32(0.5), 0.5),
        (np.arange(3), [0, 1, 2]),
        (torch.tensor([True]), [True]),
        (Path("a.txt"), "a.txt"),
        ((np.bool_(True), [PurePosixPath("b")]), [True, ["b"]]),
        ({1: {"of": np.str_("x")}}, {"1": {"of": "x"}}),
    ],
)
def test_values_of_other_libraries_are_kept_as_plain_ones(tmp_path, noted, kept):
    found = calibrate(toys.toy("llama"), toys.batches(), source={"note": noted}, progress=False)
    found.save(tmp_path / "t.json")
    assert json.loads((tmp_path / "t.json").read_text())["corpus"]["note"] == kept


@pytest.mark.parametrize("noted", [math.nan, np.float64("inf"), datetime.date(2026, 11, 30), {1, 2}, b"x"])
def test_what_a_file_cannot_keep_is_refused_before_the_text_is_read(noted):
    def text():
        raise AssertionError("read")
        yield

    with pytest.raises(
        CatsError, match=r"^source\['corpus'\]\[0\] is .* which a thresholds file cannot keep"
    ):
        calibrate(toys.toy("llama"), text(), source={"corpus": [noted]}, progress=False)
