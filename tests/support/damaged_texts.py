"""Texts and task mirrors that the tests damage, read through their readers beside plain ones."""

import gzip
import json
import re
from pathlib import Path

from finetuning_toys import sentences

from cats.corpora import corpus as corpora
from cats.evaluation import mirrors
from cats.finetuning import data

_HALF = re.compile("[\ud800-\udfff]")


def write_text(folder: Path) -> Path:
    (folder / "text.txt").write_text(sentences(6, 1), encoding="utf-8")
    return folder / "text.txt"


def write_lines(folder: Path) -> Path:
    return _rows(folder / "text.jsonl", [{"text": text, "n": 1} for text in sentences(6, 1).split("\n\n\n")])


def write_compressed(folder: Path) -> Path:
    path = folder / "text.jsonl.gz"
    path.write_bytes(gzip.compress(write_lines(folder).read_bytes(), mtime=0))
    return path


def write_instructions(folder: Path) -> Path:
    rows = [{"prompt": f"Is {n} even? ", "response": ("yes", "no")[n % 2]} for n in range(8)]
    return _rows(folder / "instructions.jsonl", rows)


def write_mirror(folder: Path) -> Path:
    rows = [
        {"goal": f"g{n}", "sol1": "a", "sol2": "b", "label": n % 2, "of": {"x": [0.5, 1]}} for n in range(6)
    ]
    return _rows(folder / "validation.jsonl", rows)


def text(path: Path) -> None:
    found = corpora.load(str(path), split="all")
    written = path.read_bytes().decode("utf-8-sig")
    assert "".join("".join(found.documents).split()) == "".join(written.split())


def lines(path: Path) -> None:
    found = corpora.load(str(path), split="all")
    written = [whole(row["text"]).strip() for row in _written(path)]
    assert found.documents == [each for each in written if each]


def instructions(path: Path) -> None:
    found, _ = data.examples(str(path), "train", None)
    written = _written(path)
    assert [each.prompt for each in found] == [whole(row["prompt"]).strip() for row in written]
    assert [each.response for each in found] == [whole(row["response"]).strip() for row in written]


def mirror(path: Path) -> None:
    splits, _ = mirrors.read_splits(path.parent)
    [found] = splits.values()
    written = [json.loads(line) for line in path.read_bytes().decode("utf-8-sig").split("\n") if line.strip()]
    assert len(found) == len(written)
    for row, asked in zip(found, written, strict=True):
        assert _agree(row, asked), f"{row} is not {asked}"


def whole(text: str) -> str:
    """As the readers say that they keep a text: half a surrogate pair is U+FFFD."""
    return _HALF.sub("\ufffd", text)


def _agree(found, written) -> bool:
    """Whether a row has all that is written; columns that other rows have are None in it."""
    if isinstance(written, dict) and isinstance(found, dict):
        rest = (value for key, value in found.items() if key not in written)
        return all(key in found and _agree(found[key], value) for key, value in written.items()) and all(
            value is None for value in rest
        )
    if isinstance(written, list) and isinstance(found, list):
        return len(found) == len(written) and all(map(_agree, found, written))
    if isinstance(written, str):
        return isinstance(found, str) and found == whole(written)
    if isinstance(written, float) and written != written:
        return found is None or found != found
    return found == written  # in a list of both, Arrow keeps truths as numbers


def _rows(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def _written(path: Path) -> list[dict]:
    content = path.read_bytes()
    content = gzip.decompress(content) if path.suffix == ".gz" else content
    lines = content.decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n").split("\n")
    return [json.loads(line) for line in lines if line.strip()]
