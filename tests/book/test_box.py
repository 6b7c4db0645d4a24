"""The box of a chapter, and the form of numbers in words."""

import pytest

from cats.book.box import Box
from cats.book.words import interval, listed, tidy


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("at 50% and 70 %", "at 50\u00a0% and 70\u00a0%"),
        ("-0.3 [-1.2, +0.1]", "−0.3 [−1.2, +0.1]"),
        ("-0.0 and -0.000 but -0.04 and -0", "0.0 and 0.000 but −0.04 and 0"),
        ("Llama-2-7B, 10-20, h100-4096x11008, CVE-1", "Llama-2-7B, 10-20, h100-4096x11008, CVE-1"),
        ("5th to 95th %", "5th to 95th %"),
    ],
)
def test_numbers_are_written_in_one_way(text, expected):
    assert tidy(text) == expected


def test_an_interval_is_signed_and_scaled():
    assert interval(0.1234, -0.05, 0.3) == "+0.123 [−0.050, +0.300]"
    assert interval(-0.041, -0.06, -0.0004, digits=1, scale=100) == "−4.1 [−6.0, 0.0]"


def test_names_are_listed_as_in_a_sentence():
    assert listed([]) == "" and listed(["a"]) == "a"
    assert listed(["a", "b"]) == "a and b" and listed(["a", "b", "c"]) == "a, b and c"


def test_a_box_has_its_five_parts_in_order():
    text = Box("Why?", "By 5%.", "fig-x", "Random weights.", "cats reproduce 01 -p a=-1")._repr_markdown_()
    order = ["**Question.** Why?", "**Answer.** By 5\u00a0%.", "{numref}`fig-x`", "**Caveat.** Random"]
    places = [text.index(part) for part in [*order, "`cats reproduce 01 -p a=-1`"]]
    assert places == sorted(places)
