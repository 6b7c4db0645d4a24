"""Measured results with their provenance: one experiment is one JSON file, written once and never edited."""

import json
import math
import os
import re
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path, PurePath

import pandas as pd

from cats import paths
from cats.errors import CatsError
from cats.records.environment import describe, kernel_hash

SCHEMA = 1

_SCORES = (
    "model method gate_sparsity model_sparsity realised_sparsity task documents "
    "acc acc_se acc_norm acc_norm_se delta_acc delta_low delta_high"
)
# The columns that each experiment's rows have at least; units are in the names.
COLUMNS = {
    experiment: tuple(columns.split())
    for experiment, columns in {
        "mlp_latency": "hidden_size intermediate_size dtype batch sparsity variant latency_us latency_us_p5 "
        "latency_us_p95 bound_share speedup_over_best_dense",
        "decode": "geometry weights sparsity variant prompt_tokens new_tokens tokens_per_s "
        "speedup_over_best_dense bound_speedup peak_memory_gb",
        "decode_step": "geometry weights sparsity order kernel us gap_us",
        "checks": "tool file test outcome seconds findings",
        "zero_shot": _SCORES,
        "generation": "model method gate_sparsity model_sparsity realised_sparsity task documents "
        "exact_match exact_match_se delta_low delta_high",
        "perplexity": "model method gate_sparsity corpus tokens nll_nats perplexity "
        "delta_nll delta_low delta_high",
        "overlap": "model layer sparsity rows kind union_density independent_density",
        "finetuning": "model method sparsity seed step heldout_nll_nats zero_shot_avg realised_sparsity",
    }.items()
}
KERNEL_EXPERIMENTS = {"mlp_latency", "decode", "decode_step", "checks"}
_PARTS = (
    *("experiment", "parameters", "rows", "model", "data"),
    *("hardware", "software", "git", "kernel_hash", "utc", "wall_s"),
)
_ABSENT = object()


@dataclass
class Record:
    """A record as read: `rows` is its tidy table, `content` the whole JSON document."""

    path: Path
    content: dict

    @property
    def rows(self) -> pd.DataFrame:
        return pd.DataFrame(self.content["rows"])

    @property
    def stale(self) -> bool:
        """True where the kernels measured are not today's; only experiments with kernels can be stale."""
        if self.content["experiment"] not in KERNEL_EXPERIMENTS:
            return False
        return self.content["kernel_hash"] != kernel_hash(gpu=self.content["hardware"]["driver"] is not None)

    def provenance(self) -> str:
        """One line: file, model, hardware, software, commit, date; a warning where the kernels changed."""
        model, hardware, software = (self.content[part] for part in ("model", "hardware", "software"))
        commit = self.content["git"].get("commit")
        weights = f", {model['weights']} weights" if "weights" in model else ""
        line = (
            f"{self.path.name}: {model.get('id', 'no model')}{weights}; {hardware['device']}; "
            f"torch {software['torch']}, triton {software['triton']}, "
            f"transformers {software['transformers']}; commit {commit[:7] if commit else 'unknown'}"
            f"{' with changes' if self.content['git'].get('dirty') else ''}; {self.content['utc']}"
        )
        return f"{line} - WARNING: the kernels have changed since this was measured" if self.stale else line


def write(
    experiment: str,
    slug: str,
    *,
    parameters: dict,
    rows,
    model: dict,
    data: dict,
    started: float,
    folder: Path | None = None,
) -> Path:
    """Write `rows` (a DataFrame or a list of dicts) as a new record and return its path.

    `started` is `time.time()` at the start of the work, from which wall_s follows. An existing file of that
    name is kept: the new one gets the next free number. Of an absolute path object the last part is written;
    a string is never cut.
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
    content = {
        "schema": SCHEMA,
        "experiment": experiment,
        "parameters": _plain(parameters),
        "rows": _plain(table),
        "model": _plain(model),
        "data": _plain(data),
        **describe(),
        "utc": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "wall_s": round(time.time() - started, 3),
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
    return record.content["utc"], len(record.path.stem), record.path.stem


def _columns(experiment: str) -> tuple[str, ...]:
    if experiment not in COLUMNS:
        raise CatsError(f"Unknown experiment {experiment!r}: use one of {', '.join(COLUMNS)}.")
    return COLUMNS[experiment]


def _open(path: Path, experiment: str) -> Record:
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise CatsError(
            f"The record {path.name} is truncated or no JSON: restore it or measure again."
        ) from error
    if not isinstance(content, dict) or content.get("schema") != SCHEMA:
        raise CatsError(f"The record {path.name} is not of schema {SCHEMA}: this version cannot read it.")
    absent = [part for part in _PARTS if part not in content]
    if absent or content["experiment"] != experiment:
        what = f"lacks {', '.join(absent)}" if absent else f"is of the experiment {content['experiment']!r}"
        raise CatsError(f"The record {path.name} {what}: restore it or measure again.")
    return Record(path, content)


def _matches(record: Record, key: str, value) -> bool:
    if key == "model":
        return record.content["model"].get("id") == value
    if key == "device":
        return str(value).lower() in str(record.content["hardware"].get("device")).lower()
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
