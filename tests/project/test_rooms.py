"""Imports run one way: a room of `cats` imports from lower floors only, and every room stands on one."""

import runpy

import pytest

from cats import paths

HOUSE = runpy.run_path(str(paths.ROOT / "scripts" / "house.py"))


def test_every_import_goes_to_a_lower_floor():
    assert not HOUSE["upward"]()


def test_every_room_stands_on_a_floor():
    rooms = {HOUSE["room"](file) for file in HOUSE["CATS"].rglob("*.py")}
    assert rooms <= set(HOUSE["FLOOR"])


@pytest.mark.parametrize("name", ("__init__", "evaluation/__init__", "book/__init__"))
def test_a_face_that_everyone_imports_needs_no_optional_extra(name):
    file = HOUSE["CATS"] / f"{name}.py"
    allowed = {"calibration", "core", "errors", "decoding"} if name == "__init__" else set()
    assert HOUSE["imported"](file) <= allowed
