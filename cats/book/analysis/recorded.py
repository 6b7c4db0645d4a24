"""Full-size results in a chapter: a record where there is one, and plain words where there is none."""

import re
from collections.abc import Sequence

import pandas as pd

from cats import criteria
from cats.book.words import listed
from cats.evaluation.task_list import TASKS, stock
from cats.records import record as records

MODELS = {  # as their makers write them, by the names of records
    "smollm2-135m": "SmolLM2-135M",
    "qwen2.5-coder-1.5b": "Qwen2.5-Coder-1.5B",
    "gemma-3-270m": "Gemma-3-270M",
}


def model_name(slug: str) -> str:
    """A model as its makers write it, by its name in records; the name itself where it is not known."""
    return MODELS.get(slug, slug)


def spelled(identity: str) -> str:
    """A model as its makers write it, by its id; the id itself where it is not known."""
    return MODELS.get(identity.removesuffix("-instruct"), identity)


def quality(caption: str, rows: pd.DataFrame) -> str:
    """`caption`, followed by what scores of recorded `rows` rest on: how the weights were read, and which
    tasks are altered.
    """
    notes = []
    formats = list(dict.fromkeys(rows.read_from.dropna()))
    if formats:
        bits = "4 bits" if all(name.startswith("Q4") for name in formats) else "quantised files"
        notes.append(f"Weights read back from {bits} ({listed(formats)}).")
    names = dict.fromkeys(rows.task) if "task" in rows else ()
    altered = [f"{stock(name)} ({TASKS[stock(name)].variant[2]})" for name in names if stock(name) != name]
    if altered:
        notes.append(f"Altered tasks: {listed(altered)}.")
    return " ".join([f"{caption}.", *notes])


def find(experiment: str, slug: str) -> records.Record | None:
    """The newest record <experiment>-<slug>, None where there is none; CatsError for a damaged file."""
    name = re.compile(rf"{re.escape(experiment)}-{re.escape(slug)}(-\d+)?")
    matching = [record for record in records.every(experiment) if name.fullmatch(record.path.stem)]
    return matching[-1] if matching else None


def sentence(experiment: str, *slugs: str) -> str:
    """Where the numbers come from, or that nothing is recorded, in sentences of a chapter."""
    names, missing = {}, []
    for slug in slugs:
        record = find(experiment, slug)
        if record is None:
            missing.append(f"{experiment}-{slug}")
            continue
        changed = f"; changed since: {', '.join(record.changed)}" if record.stale else ""
        known = f" ({record.origin()})" if len(record.origins) > 1 or not record.traced else ""
        names.setdefault((record.device, record.days), []).append(record.path.stem + known + changed)
    said = [
        f"Measured on {device}, {day}, record{'s' * (len(matching) > 1)} {', '.join(matching)}."
        for (device, day), matching in names.items()
    ]
    return " ".join([*said, _missing(missing)] if missing else said)


def rows(experiment: str, slugs: Sequence[str]) -> pd.DataFrame:
    """The rows of the records there are, with their name as `record`; empty where there is none.

    `read_from`: the file format that the weights were read back from, None for full precision. A rule is
    called what it is called today.
    """
    matching = [(slug, record) for slug in slugs if (record := find(experiment, slug)) is not None]
    if not matching:
        return pd.DataFrame()
    found = pd.concat(
        [
            record.rows.assign(record=slug, read_from=(record.content.get("model") or {}).get("read_from"))
            for slug, record in matching
        ],
        ignore_index=True,
    )
    if "rule" in found:
        titles = {name: rule.title for name, rule in criteria.RULES.items()}
        found["method"] = found.rule.map(titles).fillna(found.method)
    return found


def provenance(experiment: str, slugs: Sequence[str]) -> str:
    """A line for each record there is, and one sentence that names those there are not."""
    matching = {slug: find(experiment, slug) for slug in slugs}
    lines = [record.provenance() for record in matching.values() if record is not None]
    missing = [f"{experiment}-{slug}" for slug, record in matching.items() if record is None]
    return "\n".join([*lines, _missing(missing)] if missing else lines)


def label(row) -> str:
    """Method and gate sparsity of a row, as figures call them."""
    sparsity = row["gate_sparsity"]
    known = sparsity is not None and not pd.isna(sparsity) and sparsity > 0
    return f"{row['method']} {sparsity:.0%}" if known else row["method"]


def sources(results: Sequence) -> list[dict]:
    """What `cats.book.notebook.end` prints of the documents of results, each task once."""
    known = {}
    for each in results:
        digest = each.data["sha256"]
        known[each.task] = {
            "name": each.task,
            "split": each.data["split"],
            "documents": len(each.documents),
            "sha256": digest if isinstance(digest, str) else next(iter(digest.values()), "unknown"),
        }
    return list(known.values())


def _missing(names: Sequence[str]) -> str:
    return f"No measurement is recorded under {', '.join(names)}: only what was computed here is shown."
