"""Origins in words, and the committed records: whole, traced, and never edited."""

import json
import subprocess

import numpy as np
import pytest

from cats import paths
from cats.records import identity, origin
from cats.records import record as records
from cats.records.packing import unpack


def run(day: str, commit: str = "a" * 40, **values) -> dict:
    return {"kind": "own", "commit": commit, "dirty": False, "begin": f"{day}T09:00:00Z", **values}


UNKNOWN = {**run("2026-11-29"), "kind": "unknown", "begin": None, "commit": None}
UNKNOWN["first"] = {"commit": "c" * 40, "utc": "2026-11-29T15:00:00Z"}


@pytest.mark.parametrize(
    "origins, rows, words",
    [
        ([run("2026-11-24")], [[0]], "1 result of 1 run, 24 November 2026, commit aaaaaaa"),
        (
            [run("2026-11-24"), run("2026-11-29", "b" * 40)],
            [[0]] * 1200 + [[1], [0, 1]],
            "1,202 results of 2 runs, 24 to 29 November 2026, commits aaaaaaa, bbbbbbb",
        ),
        (
            [run("2026-11-24", dirty=True), UNKNOWN],
            [[0], [1], [0, 1]],
            "1 result of 1 run, 24 November 2026, commit aaaaaaa with changes; "
            "origin of the run not kept for 2 results, first recorded 29 November 2026",
        ),
        (
            [run("2026-11-30"), run("2026-12-01")],
            [[0, 1]],
            "1 result of 2 runs, 30 November to 1 December 2026, ",
        ),
        (
            [run("2026-12-31", commit=None), run("2027-01-01")],
            [[0], [1]],
            "31 December 2026 to 1 January 2027",
        ),
        ([], [[], []], "origin of the run not kept for 2 results"),
    ],
)
def test_origins_are_a_sentence(origins, rows, words):
    assert words in origin.sentence(origins, rows)


COMMITTED = sorted(paths.RECORDS.glob("*.json"))


@pytest.mark.parametrize("path", COMMITTED, ids=lambda path: path.stem)
def test_a_committed_record_is_whole(path):
    content = json.loads(path.read_text())
    (record,) = [each for each in records.every(content["experiment"]) if each.path == path]
    assert set(records.COLUMNS[content["experiment"]]) <= set(record.rows.columns)
    for row in content["rows"]:
        assert row["origins"] and set(row["origins"]) <= set(range(len(record.origins)))
        for key in ("correct", "correct_norm"):
            if row.get(key):
                scores = unpack(row[key])
                assert len(scores) == row["documents"] and np.isfinite(scores).all()
    for each in record.origins:
        assert all(each["ops"].values()) and set(each["ops"]) <= set(identity.OPS)
        assert each["kind"] in (origin.OWN, origin.REBUILT, origin.UNKNOWN)
        assert (each["kind"] == origin.UNKNOWN) == (each["begin"] is None)
    if content["experiment"] in ("mlp_latency", "decode", "decode_step", "checks"):
        assert all(each["ops"] for each in record.origins)


def git(*arguments: str) -> str:
    command = ["git", "-C", str(paths.ROOT), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def test_a_committed_record_is_never_edited():
    """Each equals its first version of today's schema: a migration gives records a new schema."""
    try:
        if git("rev-parse", "--is-shallow-repository").strip() != "false":
            pytest.skip("a shallow clone has no history to compare with")
        log = git("log", "--format=@%H", "--name-status", "--no-renames", "--", "data/records")
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("there is no git history to compare with")
    versions: dict[str, list[str]] = {}
    for line in log.splitlines():
        if line.startswith("@"):
            commit = line[1:]
        elif line[:1] in ("A", "M"):
            versions.setdefault(line.split("\t")[1], []).append(commit)  # newest first
    edited = []
    for path in COMMITTED:
        name = path.relative_to(paths.ROOT).as_posix()
        commits = versions.get(name, [])
        older = [git("show", f"{commit}:{name}") for commit in commits if len(commits) > 1]
        same = [text for text in older if json.loads(text)["schema"] == records.SCHEMA]
        if same and json.loads(same[-1]) != json.loads(path.read_text()):
            edited.append(name)
    assert not edited, f"measure anew under another name: {edited}"
