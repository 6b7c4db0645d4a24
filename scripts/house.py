#!/usr/bin/env python3
"""Print how the library is built: modules and rooms of `cats`, imports between rooms, lines of code.

python3 scripts/house.py
"""

import ast
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CATS = ROOT / "cats"
# From the ground up: a room imports from lower floors only. A module at the top of cats counts as a room.
FLOORS = (
    {"errors"},
    {"paths"},
    {"core", "records"},
    {"decoding", "models", "calibration"},
    {"corpora", "criteria"},
    {"evaluation", "benchmarking"},
    {"finetuning"},
    {"book"},
    {"__init__", "__main__", "cli"},
)
FLOOR = {room: height for height, rooms in enumerate(FLOORS) for room in rooms}
SMALL = ("core", "calibration", "decoding")


def room(path: Path) -> str:
    """The room of a file of `cats`, or the name of a module at its top."""
    return path.relative_to(CATS).parts[0].removesuffix(".py")


def imported(path: Path) -> set[str]:
    """The rooms that a file imports from, anywhere in it, its own left out."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module == "cats":
            names = [f"cats.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names = [node.module]
        else:
            continue
        found |= {_room_named(name.split(".")[1]) for name in names if name.startswith("cats.")}
    return found - {room(path)}


def _room_named(name: str) -> str:
    """The room or module `name`, or the face of the package, which has every other name."""
    return name if (CATS / name).is_dir() or (CATS / f"{name}.py").is_file() else "__init__"


def _floor(name: str) -> int:
    """How high a room stands; one that FLOORS does not name is above all, so that every use of it shows."""
    return FLOOR.get(name, len(FLOORS))


def imports() -> Counter[tuple[str, str]]:
    """How many files of one room import from another: {(from, to): files}."""
    return Counter((room(path), target) for path in CATS.rglob("*.py") for target in imported(path))


def upward() -> list[str]:
    """The imports that do not go to a lower floor, as "file imports room"."""
    return sorted(
        f"{path.relative_to(ROOT).as_posix()} imports {target}"
        for path in CATS.rglob("*.py")
        for target in imported(path)
        if _floor(target) >= _floor(room(path))
    )


def lines(*folders: Path) -> int:
    """Lines of the Python files below the folders."""
    files = (file for folder in folders for file in folder.rglob("*.py"))
    return sum(len(file.read_text(encoding="utf-8").splitlines()) for file in files)


def main() -> None:
    rooms = sorted(folder.name for folder in CATS.iterdir() if (folder / "__init__.py").is_file())
    pairs = imports()
    between = {pair for pair in pairs if set(pair) <= set(rooms)}
    kernels = ROOT / "kernels" / "cats_kernels"
    print(f"modules at the top of cats             {len(list(CATS.glob('*.py')))}")
    print(f"rooms                                  {len(rooms)}: {', '.join(rooms)}")
    print(f"imports between rooms                  {len(between)}, {len(pairs)} with the modules at the top")
    print(f"imports to the same or a higher floor  {len(upward())}")
    print(f"lines of core, calibration, decoding   {lines(*(CATS / name for name in SMALL))}")
    print(f"lines of cats and the kernels          {lines(CATS)} and {lines(kernels)}")
    for name in rooms:
        targets = sorted(target for source, target in between if source == name)
        print(f"  {name:<13} {lines(CATS / name):>5} lines; imports {', '.join(targets) or 'no other room'}")
    for sentence in upward():
        print(f"  {sentence}")


if __name__ == "__main__":
    main()
