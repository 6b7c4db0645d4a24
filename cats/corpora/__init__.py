"""Text for calibration and evaluation, and the batches that it is cut into."""

from cats.corpora.batches import Batches, batches, bos_ids, encode, mixed, rows_packed
from cats.corpora.calibration_text import Calibration
from cats.corpora.corpus import DEFAULT, SPLITS, Corpus, load, part_of

__all__ = [
    "DEFAULT",
    "SPLITS",
    "Batches",
    "Calibration",
    "Corpus",
    "batches",
    "bos_ids",
    "encode",
    "load",
    "mixed",
    "part_of",
    "rows_packed",
]
