"""Where things are, from this file and never from the working directory."""

import os
from pathlib import Path

from cats.errors import CatsError

ROOT = Path(__file__).resolve().parent.parent
BOOK = ROOT / "book"
DATA = ROOT / "data"
PAPER = DATA / "paper"
RECORDS = DATA / "records"
THRESHOLDS = DATA / "thresholds"
_IN_CLONE = (ROOT / "pyproject.toml").is_file()
KERNELS = ROOT / "kernels" / "cats_kernels" if _IN_CLONE else ROOT / "cats_kernels"

CACHE = Path(os.environ.get("CATS_CACHE") or "~/.cache/cats-companion").expanduser().absolute()


def in_clone(path: Path) -> Path:
    """`path`, one of the above; CatsError where the library is installed without the repository around it."""
    if not _IN_CLONE:
        raise CatsError(
            f"The library is installed without the project's {path.relative_to(ROOT)}: "
            "clone the project and `pip install -e .` there."
        )
    return path
