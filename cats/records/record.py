"""Measured results with the runs they come from: one experiment is one JSON file, never edited."""

import json
import math
import os
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path, PurePath

import pandas as pd

from cats import paths
from cats.errors import CatsError, explained
from cats.records import identity, origin
from cats.records.origin import Origin
from cats.records.rows import COLUMNS

SCHEMA = 2
_PARTS = ("experiment", "parameters", "origins", "rows", "model", "data", "written")
_KINDS = {"parameters": dict, "origins": list, "rows": list, "model": dict, "data": dict, "written": str}
_ABSENT = object()


@dataclass
class Record:
    """A record as read: `rows` is its tidy table, `content` the whole JSON document.

    Every row of `content` has `origins`: the places of the runs that it comes from in the record's `origins`
    (see `cats.records.origin.Origin`).
    """

    path: Path
    content: dict

    @property
    def rows(self) -> pd.DataFrame:
        return pd.DataFrame(self.content["rows"]).drop(columns="origins")

    @property
    def origins(self) -> list[Origin]:
        return self.content["origins"]

    @property
    def device(self) -> str:
        """The name of the hardware; of several runs, each once."""
        return ", ".join(dict.fromkeys(each["hardware"]["device"] for each in self.origins))

    @property
    def on_gpu(self) -> bool:
        return any(each["hardware"]["driver"] is not None for each in self.origins)

    @property
    def days(self) -> str:
        """The day or days of the runs, such as "24 to 29 November 2026"."""
        return origin.days(self.origins)

    @property
    def traced(self) -> bool:
        """Whether the run of every result is known."""
        known = all(each["kind"] != origin.UNKNOWN for each in self.origins)
        return known and all(row["origins"] for row in self.content["rows"])

    @property
    def changed(self) -> list[str]:
        """The ops measured that are not today's."""
        measured = [(op, found) for each in self.origins for op, found in each["ops"].items()]
        return sorted({op for op, found in measured if found != identity.today(op)})

    @property
    def stale(self) -> bool:
        """True where an op that was measured is not today's."""
        return bool(self.changed)

    def origin(self) -> str:
        """Where the results come from: how many runs, their days and commits, and what was not kept."""
        return origin.sentence(self.origins, [row["origins"] for row in self.content["rows"]])

    def provenance(self) -> str:
        """One line: file, model, hardware, software, runs; a warning where an op has changed since."""
        model = self.content["model"]
        weights = f", {model['weights']} weights" if "weights" in model else ""
        weights += f" read from {model['read_from']}" if model.get("read_from") else ""
        software = dict.fromkeys(
            ", ".join(f"{name} {each['software'][name]}" for name in ("torch", "triton", "transformers"))
            for each in self.origins
            if each["software"]
        )
        parts = [f"{model.get('id', 'no model')}{weights}", self.device, *software, self.origin()]
        line = f"{self.path.name}: {'; '.join(parts)}"
        notes = "".join(f"; {note}" for note in self.content.get("notes", []))
        changed = ", ".join(self.changed)
        warning = f" - WARNING: changed since this was measured: {changed}" if changed else ""
        return line + notes + warning


def write(
    experiment: str,
    slug: str,
    *,
    parameters: dict,
    rows,
    model: dict,
    data: dict,
    started: float | None = None,
    ops: Sequence[str] = (),
    folder: Path | None = None,
) -> Path:
    """Write `rows` (a DataFrame or a list of dicts) as a new record and return its path.

    `started` is `time.time()` at the begin of the run and `ops` names the ops of `cats.records.identity` that
    it measured. Rows of other runs have a list of their origins under "origins", empty where it was not kept.
    An existing file of that name is kept: the new one gets the next free number. Of an absolute path object
    the last part is written; a string is never cut.
    Raises CatsError for an unknown experiment, a bad slug, no rows, or rows that lack a required column.
    """
    wanted = _columns(experiment)
    if not re.fullmatch(r"[a-z0-9][a-z0-9._-]*", slug):
        raise CatsError(
            f"The record name {slug!r} may have lower-case letters, digits, '.', '_' and '-' only."
        )
    table = rows.to_dict("records") if isinstance(rows, pd.DataFrame) else [dict(row) for row in rows]
    if not table:
        raise CatsError(f"There are no rows to record for {experiment}: the measurement came out empty.")
    missing = [column for column in wanted if any(column not in row for row in table)]
    if missing:
        raise CatsError(
            f"Rows of {experiment} lack the columns {', '.join(missing)}: add them, None where unknown."
        )
    if not all("origins" in row for row in table):
        own = origin.begin(seed=parameters.get("seed"), ops=ops, started=started)
        own = origin.ended(own, time.time() - started)
        table = [{"origins": [own], **row} for row in table]
    origins, places = origin.gather([row.pop("origins") for row in table])
    content = {
        "schema": SCHEMA,
        "experiment": experiment,
        "parameters": _plain(parameters),
        "origins": _plain(origins),
        "rows": [{**row, "origins": runs} for row, runs in zip(_plain(table), places, strict=True)],
        "model": _plain(model),
        "data": _plain(data),
        "written": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
    }
    text = json.dumps(content, indent=1, allow_nan=False) + "\n"
    return _place(text, folder or paths.in_clone(paths.RECORDS), f"{experiment}-{slug}")


def read(experiment: str, *, folder: Path | None = None, **match) -> Record:
    """The newest record of an experiment whose parameters equal every keyword given.

    `model` compares the model's id, `device` is looked for in the hardware's name, `slug` compares the file's
    name. Raises CatsError where none matches, and for a truncated or foreign file.
    """
    _columns(experiment)
    folder = folder or paths.in_clone(paths.RECORDS)
    records = [_open(path, experiment) for path in sorted(folder.glob(f"{experiment}-*.json"))]
    fitting = [record for record in records if all(_matches(record, key, match[key]) for key in match)]
    if not fitting:
        asked = ", ".join(f"{key}={value}" for key, value in match.items()) or "any parameters"
        raise CatsError(
            f"No record of {experiment} has {asked} ({len(records)} records looked at): "
            "measure it, or ask for what data/records holds."
        )
    return max(fitting, key=_age)


def every(experiment: str | None = None, *, folder: Path | None = None) -> list[Record]:
    """All records, or those of one experiment, oldest first; CatsError for a file that is not whole."""
    wanted = COLUMNS if experiment is None else [experiment]
    found = []
    for name in wanted:
        _columns(name)
        found += [_open(path, name) for path in (folder or paths.RECORDS).glob(f"{name}-*.json")]
    return sorted(found, key=_age)


def _age(record: Record) -> tuple:
    """Orders records by time; of one second the one with the higher number, in the longer name, is later."""
    return record.content["written"], len(record.path.stem), record.path.stem


def _columns(experiment: str) -> tuple[str, ...]:
    if experiment not in COLUMNS:
        raise CatsError(f"Unknown experiment {experiment!r}: use one of {', '.join(COLUMNS)}.")
    return COLUMNS[experiment]


def _open(path: Path, experiment: str) -> Record:
    with explained(f"The record {path.name} is truncated or no JSON", "restore it or measure again"):
        content = paths.parse_json(path.read_bytes())
    if content.get("schema") != SCHEMA:
        raise CatsError(f"The record {path.name} is not of schema {SCHEMA}: this version cannot read it.")
    absent = [part for part in _PARTS if part not in content]
    if absent or content["experiment"] != experiment:
        what = f"lacks {', '.join(absent)}" if absent else f"is of the experiment {content['experiment']!r}"
        raise CatsError(f"The record {path.name} {what}: restore it or measure again.")
    other = [part for part, kind in _KINDS.items() if not isinstance(content[part], kind)]
    for part in {"origins", "rows"} - set(other):
        other += [part] * any(not isinstance(item, dict) for item in content[part])
    if other:
        raise CatsError(
            f"The record {path.name} has {other[0]} of another type: restore it or measure again."
        )
    if part := _garbled(content):
        raise CatsError(f"The record {path.name} has garbled {part}: restore it or measure again.")
    return Record(path, content)


def _garbled(content: dict) -> str | None:
    """The first part of a record in which something is of another type; None where nothing is."""
    origins, rows = content["origins"], content["rows"]
    if not _all_of(content.get("notes", []), str):
        return "notes"
    if not all(map(origin.is_whole, origins)):
        return "origins"
    places = [row.get("origins") for row in rows] or [None]
    known = set(range(len(origins)))
    if not all(_all_of(each, int) and known.issuperset(each) for each in places):
        return "rows"
    lacking = [column for column in COLUMNS[content["experiment"]] if any(column not in row for row in rows)]
    return f"rows without {lacking[0]}" if lacking else None


def _all_of(values, kind: type) -> bool:
    return isinstance(values, list) and all(type(value) is kind for value in values)


def _matches(record: Record, key: str, value) -> bool:
    if key == "model":
        return record.content["model"].get("id") == value
    if key == "device":
        return str(value).lower() in record.device.lower()
    if key == "slug":
        stem = record.path.stem.removeprefix(f"{record.content['experiment']}-")
        return stem == value or bool(re.fullmatch(re.escape(value) + r"-\d+", stem))
    return record.content["parameters"].get(key, _ABSENT) == _plain(value)


def _plain(value):
    """JSON's own types: NumPy and torch scalars as numbers, NaN as null, absolute path objects cut."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, PurePath):
        return value.name if value.is_absolute() else str(value)
    if hasattr(value, "tolist"):
        return _plain(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _place(text: str, folder: Path, stem: str) -> Path:
    """Write under a temporary name, then link to the first free name: whole, and never over another."""
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / f".{stem}.{os.getpid()}"
    try:
        temporary.write_text(text)
        number = 1
        while True:
            target = folder / f"{stem}{'' if number == 1 else f'-{number}'}.json"
            try:
                os.link(temporary, target)
                return target
            except FileExistsError:
                number += 1
    except OSError as error:
        raise CatsError(f"The record could not be written to {folder} ({error.strerror}).") from error
    finally:
        temporary.unlink(missing_ok=True)
