"""Where things are, from this file and never from the working directory."""

import os
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BOOK = ROOT / "book"
DATA = ROOT / "data"
PAPER = DATA / "paper"
RECORDS = DATA / "records"
THRESHOLDS = DATA / "thresholds"
KERNELS = ROOT / "kernels" / "cats_kernels"

CACHE = Path(os.environ.get("CATS_CACHE") or Path.home() / ".cache" / "cats-companion").expanduser()
