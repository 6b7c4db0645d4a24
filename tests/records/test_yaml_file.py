"""YAML with the numbers of version 1.2, and files that are none."""

import math

import pytest

from cats.errors import CatsError
from cats.records import yaml_file


@pytest.mark.parametrize(
    ("text", "value"),
    {
        "1e-5": 1e-5,
        "1E5": 1e5,
        "-2.5e+3": -2500.0,
        ".5": 0.5,
        "1.": 1.0,
        "3": 3,
        "-3": -3,
        "010": 10,
        "0o17": 15,
        "0x1F": 31,
        "1_000": "1_000",
        "1:30": "1:30",
        "2026-11-30": "2026-11-30",
        "e5": "e5",
        "1e": "1e",
        "true": True,
        "null": None,
        '"1e-5"': "1e-5",
    }.items(),
)
def test_scalars(text, value):
    found = yaml_file.parse(text)
    assert found == value and type(found) is type(value)


def test_numbers_that_are_none():
    assert yaml_file.parse("-.inf") == -math.inf and math.isnan(yaml_file.parse(".nan"))


def test_a_byte_order_mark_is_no_text(tmp_path):
    path = tmp_path / "plan.yml"
    path.write_bytes("\ufeffa: 1e-5".encode())
    assert yaml_file.read(path, "plan") == {"a": 1e-5}


@pytest.mark.parametrize(
    ("content", "message"),
    {
        b"[": "is not valid YAML",
        b"\xff": "is not valid YAML",
        b"a: !!python/object:os.system {}": "is not valid YAML",
        b"[" * 5_000: "is not valid YAML",
        b"a: &a [1]\nb: [" + b"*a," * 200 + b"]": "more than 100 aliases",
        b"a: \x00": "is not valid YAML",
        b"1" * 5_000: "is not valid YAML",
    }.items(),
    ids=range(7),
)
def test_what_is_no_yaml_is_one_sentence(tmp_path, content, message):
    path = tmp_path / "plan.yml"
    path.write_bytes(content)
    with pytest.raises(CatsError, match=message):
        yaml_file.read(path, "plan")
    with pytest.raises(CatsError, match="cannot be read"):
        yaml_file.read(tmp_path, "plan")
