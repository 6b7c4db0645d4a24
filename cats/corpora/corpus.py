"""Text by name for calibration and perplexity, with split, counts and hash (paper sec. 4.1)."""

import hashlib
import random
from dataclasses import dataclass

from cats import paths
from cats.corpora.readers import HUB, LOCAL, read_file
from cats.errors import CatsError, did_you_mean

DEFAULT = "python-docs"
SPLITS = ("train", "test", "all")


@dataclass
class Corpus:
    """Documents of one split, and what a record says about them.

    `info`: name, split, documents, characters, sha256 (of the documents joined by NUL), licence, seed, and
    whatever else identifies the text.
    """

    name: str
    split: str
    documents: list[str]
    info: dict

    def __str__(self) -> str:
        info = self.info
        return (
            f"{self.name} ({self.split}): {info['documents']:,} documents, "
            f"{info['characters']:,} characters, sha256 {info['sha256'][:12]}, {info['licence']}"
        )


def load(
    name: str = DEFAULT,
    *,
    split: str = "train",
    documents: int | None = None,
    seed: int = 0,
    field: str = "text",
) -> Corpus:
    """Load the corpus `name`, `split` "train", "test" (disjoint), "all", or for a hub data set "validation".

    Names: "python-docs", "package-docs", "shakespeare", a .txt, .jsonl or .jsonl.gz path (`field` names the
    text in a JSON row), or "refinedweb", "c4", "wikitext2" by streaming. `documents` takes that many: a
    seeded draw, except that a hub data set gives its first ones, as the reference code does.
    Raises CatsError for an unknown name, split or field, an empty or too short corpus, and a missing network.
    """
    if documents is not None and documents < 1:
        raise CatsError(f"documents={documents} is too few: ask for at least one.")
    if name in HUB:
        texts, extra = HUB[name](split, documents)
    else:
        texts, extra = _local(name, split, field)
        if documents is not None and documents < len(texts):
            texts = [texts[i] for i in sorted(random.Random(seed).sample(range(len(texts)), documents))]
            extra["seed"] = seed
    texts = [text for text in texts if text.strip()]
    title = extra.pop("name", name)
    if not texts:
        raise CatsError(
            f"The corpus {title} has no text in its split {split!r}: use split 'all' or another corpus."
        )
    if documents is not None and len(texts) < documents:
        raise CatsError(
            f"The corpus {title} ({split}) has {len(texts)} documents, fewer than the {documents} asked."
        )
    info = {
        "name": title,
        "split": split,
        "documents": len(texts),
        "characters": sum(map(len, texts)),
        "sha256": hashlib.sha256("\0".join(texts).encode()).hexdigest(),
        **extra,
    }
    return Corpus(title, split, texts, info)


def _local(name: str, split: str, field: str) -> tuple[list[str], dict]:
    """Documents that need no hub: by registry or by path, split by a hash of each one."""
    path = paths.named(name)
    if name in LOCAL:
        keyed, extra = LOCAL[name]()
    elif path.suffix in {".txt", ".jsonl", ".gz"}:
        keyed, extra = read_file(path, field)
    else:
        known = [*LOCAL, *HUB]
        raise CatsError(
            f"Unknown corpus {name!r}{did_you_mean(name, known)}: use one of {', '.join(known)}, "
            "or a path that ends in .txt, .jsonl or .jsonl.gz."
        )
    if split not in SPLITS:
        raise CatsError(f"The corpus {name} has no split {split!r}: use one of {', '.join(SPLITS)}.")
    return [text for key, text in keyed if split in ("all", part_of(key))], extra


def part_of(key: str) -> str:
    """A quarter of the documents are "test", by a hash of the key alone."""
    return "test" if hashlib.sha256(f"cats:{key}".encode()).digest()[0] < 64 else "train"
