"""Records of schema 1 → schema 2, once: the origin of every result, and what weights were read from.

    python scripts/migrate_records.py

Needs the whole history in git. A record of schema 1 says when and by which commit its file was written.
Records of evaluations were put together from results on disk, which may be long after the measurement. A row
that is bit-equal to one of an earlier version of its record comes from the run of that version. Where that
file took a few seconds, it was itself only put together, and the origin of the run was not kept.
"""

import base64
import functools
import json
import subprocess
from datetime import datetime, timedelta

from cats import paths
from cats.models.embedded import EMBEDDED
from cats.records import identity
from cats.records.origin import OWN, REBUILT, UNKNOWN, gather

LAST = "942d868"  # the commit whose records, all of schema 1, are migrated
MERGED_S = 10.0  # putting results together took 1 to 9 s; the shortest run, of an MLP, 14 s
PUT_TOGETHER = {"zero_shot", "generation", "perplexity", "finetuning"}
FOLDER = "data/records"


def git(*arguments: str) -> str:
    command = ["git", "-C", str(paths.ROOT), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def versions(name: str) -> list[tuple[str, dict]]:
    """(commit, content) of every version of a record up to LAST, oldest first."""
    log = git("log", "--reverse", "--format=%H", "--diff-filter=AM", LAST, "--", f"{FOLDER}/{name}")
    return [(commit, json.loads(git("show", f"{commit}:{FOLDER}/{name}"))) for commit in log.split()]


@functools.cache
def source(commit: str):
    """Source files as they were at a commit."""

    @functools.cache
    def read(path: str) -> str | None:
        shown = subprocess.run(
            ["git", "-C", str(paths.ROOT), "show", f"{commit}:{path}"], capture_output=True, text=True
        )
        return shown.stdout if shown.returncode == 0 else None

    return read


@functools.cache
def op_identity(op: str, commit: str) -> str:
    found = identity.identity(op, source(commit))
    if found is None:
        raise LookupError(f"{op} is not in {commit}")
    return found


def ops(content: dict) -> list[str]:
    """The ops that a record of schema 1 measured."""
    on_gpu = content["hardware"]["driver"] is not None
    match content["experiment"]:
        case "checks":
            return ["one_row", "few_rows", "batch", "decoding"]
        case "decode" | "decode_step":
            return ["one_row", "decoding"] if on_gpu else ["cpu"]
        case "mlp_latency" if not on_gpu:
            return ["cpu"]
        case "mlp_latency":
            sparse = [row for row in content["rows"] if not row["variant"].startswith("dense")]
            found = {"centred" for row in sparse if row["variant"] == "centred"}
            batches = {row["batch"] for row in sparse}
            return sorted(
                found | {"one_row" if b == 1 else "few_rows" if b <= 4 else "batch" for b in batches}
            )
    return []


def merged(content: dict) -> bool:
    return content["experiment"] in PUT_TOGETHER and content["wall_s"] < MERGED_S


def origin(content: dict, commit: str, *, own: bool) -> dict:
    """That of the results which this version of a record, first in git at `commit`, was the first to have."""
    first = {"first": {"commit": commit, "utc": content["utc"]}}
    if merged(content):
        nothing = {"commit": None, "dirty": None, "begin": None, "seconds": None}
        rest = {"hardware": content["hardware"], "software": None, "ops": {}, "seed": None}
        return {"kind": UNKNOWN, **nothing, **rest, **first}
    end = datetime.strptime(content["utc"], "%Y-%m-%dT%H:%M:%SZ")
    measured = content["git"]["commit"]
    return {
        "kind": OWN if own else REBUILT,
        **content["git"],
        "begin": (end - timedelta(seconds=content["wall_s"])).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "seconds": content["wall_s"],
        "hardware": content["hardware"],
        "software": content["software"],
        "ops": {op: op_identity(op, measured) for op in ops(content)},
        "seed": content["parameters"].get("seed"),
        **({} if own else first),
    }


def equal(row: dict, other: dict) -> bool:
    """Bit-equal in every column that both have."""
    shared = [key for key in row if row[key] is not None and other.get(key) is not None]
    return row.get("tokens_per_s") is not None and all(row[key] == other[key] for key in shared)


def run(content: dict, row: dict) -> dict | None:
    """Of a fine-tuning's row what its run took, which no second run repeats to the bit."""
    method = row["method"].removesuffix(" recalibrated")
    runs = content["parameters"].get("runs") or []
    return next((each for each in runs if (each["method"], each["seed"]) == (method, row["seed"])), None)


def has(content: dict, row: dict, known: dict) -> bool:
    """Whether an earlier version of a record has a row that `known` has."""
    if content["experiment"] == "finetuning":
        found = run(content, row)
        return found is not None and found == run(known, row)
    return any(equal(row, other) for other in content["rows"])


def restored(content: dict) -> list[str]:
    """Sets packed scores whose beginning was cut to None; says of which rows."""
    lost = []
    for row in content["rows"]:
        for key in ("correct", "correct_norm"):
            packed = row.get(key)
            if isinstance(packed, dict) and "bits" in packed and not whole(packed):
                row[key] = None
                level = row.get("gate_sparsity")
                lost.append(
                    f"{row['method']} {'' if level is None else f'{level:.3g} '}{row['task']} ({key})"
                )
    return lost


def whole(packed: dict) -> bool:
    try:
        return len(base64.b64decode(packed["bits"], validate=True)) == -(-packed["count"] // 8)
    except ValueError:
        return False


def migrated(name: str) -> dict:
    known = versions(name)
    commit, content = known[-1]
    each_row = []
    for row in content["rows"]:
        commit, earliest = next(
            ((at, older) for at, older in known[:-1] if has(older, row, content)), known[-1]
        )
        each_row.append([origin(earliest, commit, own=earliest is content)])
    lost = restored(content)
    origins, places = gather(each_row)
    model = dict(content["model"])
    if model.get("id") in EMBEDDED:
        model["read_from"] = EMBEDDED[model["id"]].read_from
    notes = [f"the scores of single documents were lost when they were written, of: {', '.join(lost)}"]
    return {
        "schema": 2,
        "experiment": content["experiment"],
        "parameters": content["parameters"],
        "origins": origins,
        "rows": [{**row, "origins": runs} for row, runs in zip(content["rows"], places, strict=True)],
        "model": model,
        "data": content["data"],
        **({"notes": notes} if lost else {}),
        "written": content["utc"],
    }


def main() -> None:
    kinds = dict.fromkeys((OWN, REBUILT, UNKNOWN), 0)
    for name in git("ls-tree", "--name-only", f"{LAST}:{FOLDER}").split():
        content = migrated(name)
        (paths.RECORDS / name).write_text(json.dumps(content, indent=1, allow_nan=False) + "\n")
        for row in content["rows"]:
            for place in row["origins"]:
                kinds[content["origins"][place]["kind"]] += 1
        found = [f"{each['kind']} {(each['commit'] or '')[:7]}" for each in content["origins"]]
        print(f"{name}: {', '.join(found)}{'; scores lost' if content.get('notes') else ''}")
    print(kinds)


if __name__ == "__main__":
    main()
