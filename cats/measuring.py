"""Measure on this machine's GPU what a chapter else draws from records, by the programs of kernels/bench."""

import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from tempfile import TemporaryFile

from cats import paths
from cats.errors import CatsError

BENCH = paths.ROOT / "kernels" / "bench"
SHIPPED, MEASURED = "h100", "measured"  # how the names of records begin


def prefix(source: str, runs: Iterable[tuple], *, folder: Path | None = None) -> str:
    """How the names of a chapter's records begin; with source "measure" they are measured first.

    `runs`: (program, slug, argument, ...) of kernels/bench, the slug without its beginning; each writes its
    record to data/records, or to `folder`. Raises CatsError for another source, without a clone, and with the
    program's own words where one fails, as without a GPU.
    """
    if source == "recorded":
        return SHIPPED
    if source != "measure":
        raise CatsError(f'source is {source!r}: take "recorded", or "measure" on a machine with a GPU.')
    for program, slug, *arguments in runs:
        _run(program, f"{MEASURED}-{slug}" if slug else MEASURED, arguments, folder)
    return MEASURED


def _run(program: str, slug: str, arguments: list, folder: Path | None) -> None:
    """One program, its table printed as it comes; what compilers say of their work beside it is not."""
    script = paths.in_clone(BENCH) / f"{program}.py"
    command = [sys.executable, str(script), *map(str, arguments), "--slug", slug]
    command += ["--output", str(folder or paths.in_clone(paths.RECORDS))]
    known = os.environ.get("PYTHONPATH")
    path = os.pathsep.join([str(paths.ROOT), str(paths.ROOT / "kernels"), *([known] if known else [])])
    env = {**os.environ, "PYTHONPATH": path}
    with TemporaryFile("w+", errors="replace") as beside:
        with subprocess.Popen(command, env=env, text=True, stdout=subprocess.PIPE, stderr=beside) as process:
            for line in process.stdout:
                print(line, end="", flush=True)
        if process.returncode:
            beside.seek(0)
            said = [line.strip() for line in beside if line.strip()]
            raise CatsError(said[-1] if said else f"{script.name} ended with status {process.returncode}.")
