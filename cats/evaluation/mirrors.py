"""Read a task's documents from a folder of JSON lines, a file for each split, verified by a sha256 list."""

import gzip
import hashlib
import json
import os
import re
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path

import datasets

from cats import paths
from cats.errors import CatsError, explained

DATA_DIR = "CATS_EVAL_DATA"
_HALF = re.compile("[\ud800-\udfff]")
_NAME = re.compile(r"(\w+)\.jsonl(\.gz)?")


def mirror(name: str, data_dir: str | os.PathLike | None = None) -> Path | None:
    """The folder of a task's local mirror below `data_dir` or $CATS_EVAL_DATA, None where there is none.

    Raises CatsError where that folder of mirrors does not exist.
    """
    root = data_dir or os.environ.get(DATA_DIR)
    if not root:
        return None
    root = paths.named(root)
    if not root.is_dir():
        raise CatsError(f"The folder of local mirrors {root} does not exist: check --data-dir or {DATA_DIR}.")
    return root / name if (root / name).is_dir() else None


def read_splits(folder: Path) -> tuple[datasets.DatasetDict, dict[str, str]]:
    """Every <split>.jsonl or <split>.jsonl.gz of `folder`, and the sha256 of each file.

    Where the parent folder has a SHA256SUMS, the files must agree with it. Raises CatsError, naming file
    and hash, for a truncated or changed file, and for a folder without one.
    """
    expected = _expected(folder.parent / "SHA256SUMS")
    splits, digests = {}, {}
    for path in sorted(folder.iterdir()):
        found = _NAME.fullmatch(path.name)
        if not found:
            continue
        data = path.read_bytes()
        digest = hashlib.sha256(data).hexdigest()
        title = f"{folder.name}/{path.name}"
        wanted = expected.get(title)
        if wanted and wanted != digest:
            raise CatsError(
                f"The mirror {title} is truncated or changed: its sha256 is {digest[:16]}, "
                f"SHA256SUMS has {wanted[:16]}; copy it again."
            )
        splits[found[1]] = _rows(title, data, digest, bool(found[2]))
        digests[path.name] = digest
    if not splits:
        raise CatsError(f"The mirror {folder} holds no .jsonl or .jsonl.gz file: copy the task's data there.")
    return datasets.DatasetDict(splits), digests


def _rows(title: str, data: bytes, digest: str, compressed: bool) -> datasets.Dataset:
    try:
        text = (gzip.decompress(data) if compressed else data).decode("utf-8-sig")
        rows = [
            json.loads(line) for line in text.split("\n") if line.strip()
        ]  # splitlines cuts at U+2028 too
    except (EOFError, OSError, zlib.error, ValueError, RecursionError) as error:
        raise CatsError(
            f"The mirror {title} (sha256 {digest[:16]}) is truncated or damaged: copy it again."
        ) from error
    if not rows:
        raise CatsError(f"The mirror {title} (sha256 {digest[:16]}) is empty: copy it again.")
    halves = sum(len(_HALF.findall(part)) for row in rows for part in _texts(row))
    if halves:
        print(f"{title}: {halves} halves of surrogate pairs were replaced by U+FFFD.", file=sys.stderr)
        rows = [_whole(row) for row in rows]
    try:
        columns = dict.fromkeys(key for row in rows for key in list(row.keys()))
        return datasets.Dataset.from_list([dict.fromkeys(columns) | row for row in rows])
    except (TypeError, ValueError, AttributeError, OverflowError) as error:
        raise CatsError(
            f"The rows of the mirror {title} (sha256 {digest[:16]}) are not alike: copy it again."
        ) from error


def _texts(value) -> Iterator[str]:
    """Every text in a JSON value."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, (dict, list)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _texts(item)


def _whole(value):
    """A JSON value without halves of surrogate pairs, which JSON can hold and UTF-8 cannot."""
    if isinstance(value, str):
        return _HALF.sub("\ufffd", value)
    if isinstance(value, dict):
        return {key: _whole(item) for key, item in value.items()}
    return [_whole(item) for item in value] if isinstance(value, list) else value


def _expected(sums: Path) -> dict[str, str]:
    if not sums.is_file():
        return {}
    with explained(f"The list {sums} is none of sha256 and names", "copy it again"):
        pairs = [line.split(maxsplit=1) for line in sums.read_text("utf-8-sig").splitlines() if line.strip()]
        return {name.strip().lstrip("*").removeprefix("./"): digest for digest, name in pairs}
