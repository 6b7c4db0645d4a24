"""Where a result comes from: the run that measured it, and how a page says it."""

import json
import time
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from types import NoneType
from typing import NotRequired, TypedDict

from cats.records import identity
from cats.records.environment import git, hardware, software

OWN, REBUILT, UNKNOWN = "own", "rebuilt", "unknown"
_UTC = "%Y-%m-%dT%H:%M:%SZ"


class Origin(TypedDict):
    """One run; where its origin was not kept, the first record with its results and that one's hardware."""

    kind: str  # own: written by the run itself; rebuilt: from an earlier version of the record; unknown
    commit: str | None  # at the run's begin; None outside of a clone
    dirty: bool | None  # whether library or kernels differed from the commit
    begin: str | None  # UTC
    seconds: float | None  # of the whole run
    hardware: dict  # device, driver (None on a CPU), memory_gb, count
    software: dict | None  # versions
    ops: dict[str, str | None]  # the identity of each op that was measured
    seed: int | None
    first: NotRequired[dict]  # {"commit", "utc"} of the first record with these results, where not this one


def begin(*, seed: int | None = None, ops: Sequence[str] = (), started: float | None = None) -> Origin:
    """The origin of a run that begins now, or at `started` (`time.time()`); `ended` sets its seconds.

    `ops`: names of `cats.records.identity.OPS`.
    """
    at = datetime.fromtimestamp(time.time() if started is None else started, UTC)
    return {
        "kind": OWN,
        **git(),
        "begin": at.strftime(_UTC),
        "seconds": None,
        "hardware": hardware(),
        "software": software(),
        "ops": {op: identity.today(op) for op in ops},
        "seed": seed,
    }


def ended(origin: Origin, seconds: float) -> Origin:
    """The origin of a result that was there so many seconds after its run had begun."""
    return {**origin, "seconds": round(seconds, 3)}


def gather(each_row: Sequence[Iterable[Origin]]) -> tuple[list[Origin], list[list[int]]]:
    """The runs that rows come from, each once with the seconds of its last result, and each row's places."""
    runs: dict[str, Origin] = {}
    places = []
    for origins in each_row:
        keys = [json.dumps({**each, "seconds": None}, sort_keys=True) for each in origins]
        for key, each in zip(keys, origins, strict=True):
            seconds = [known["seconds"] for known in (runs.get(key), each) if known and known["seconds"]]
            runs[key] = {**each, "seconds": max(seconds, default=None)}
        places.append(keys)
    order = {key: place for place, key in enumerate(runs)}
    return list(runs.values()), [sorted({order[key] for key in keys}) for keys in places]


def days(origins: Iterable[Origin]) -> str:
    """The day or the range of days on which runs began, or were first recorded, as words; empty for none."""
    found = sorted(each["begin"] or each["first"]["utc"] for each in origins)
    if not found:
        return ""
    first, last = (datetime.strptime(each, _UTC) for each in (found[0], found[-1]))
    until = f"{last.day} {last:%B %Y}"
    if first.date() == last.date():
        return until
    if first.year != last.year:
        return f"{first.day} {first:%B %Y} to {until}"
    return f"{first.day}{f' {first:%B}' if first.month != last.month else ''} to {until}"


def sentence(origins: Sequence[Origin], rows: Sequence[Sequence[int]]) -> str:
    """ "170 results of 4 runs, 24 to 29 November 2026, commits …", and of which the origin was not kept.

    `rows`: for each result the places of its runs in `origins`; none where nothing at all is known.
    """
    known = [place for place, each in enumerate(origins) if each["kind"] != UNKNOWN]
    traced = [places for places in rows if places and set(places) <= set(known)]
    lost = len(rows) - len(traced)
    parts = []
    if traced:
        runs = [origins[place] for place in sorted({place for places in traced for place in places})]
        commits = dict.fromkeys(_commit(each) for each in runs)
        parts.append(
            f"{_count(len(traced), 'result')} of {_count(len(runs), 'run')}, {days(runs)}, "
            f"commit{'s' * (len(commits) > 1)} {', '.join(commits)}"
        )
    if lost:
        others = [each for place, each in enumerate(origins) if place not in known]
        when = f", first recorded {days(others)}" if others else ""
        parts.append(f"origin of the run not kept for {_count(lost, 'result')}{when}")
    return "; ".join(parts)


def _count(number: int, word: str) -> str:
    return f"{number:,} {word}{'s' * (number != 1)}"


def _commit(origin: Origin) -> str:
    commit = origin["commit"][:7] if origin["commit"] else "unknown"
    return f"{commit} with changes" if origin["dirty"] else commit


_WHOLE = {
    "kind": str,
    "commit": (str, NoneType),
    "dirty": (bool, NoneType),
    "begin": (str, NoneType),
    "seconds": (int, float, NoneType),
    "hardware": dict,
    "software": (dict, NoneType),
    "ops": dict,
    "seed": (int, NoneType),
}


def is_whole(origin: dict) -> bool:
    """Whether an origin read from a file has all of its parts, each of its type."""
    typed = all(name in origin and isinstance(origin[name], kinds) for name, kinds in _WHOLE.items())
    if not typed or origin["kind"] not in (OWN, REBUILT, UNKNOWN):
        return False
    if not isinstance(origin["hardware"].get("device"), str) or "driver" not in origin["hardware"]:
        return False
    named = {"torch", "triton", "transformers"}.issubset(
        origin["software"] or {"torch", "triton", "transformers"}
    )
    first = origin.get("first")
    begun = origin["begin"] or (first.get("utc") if isinstance(first, dict) else None)
    try:
        return named and datetime.strptime(begun, _UTC) is not None
    except (TypeError, ValueError):
        return False
