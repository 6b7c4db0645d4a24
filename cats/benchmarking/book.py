"""What a new user's two commands take on this machine: `cats measure book`.

Clones the present commit into a fresh folder, runs the targets of make there one after the other, and writes
a record build: a row for each with its seconds, cores and peak memory.
"""

import os
import subprocess
import tempfile
import threading
import time
from argparse import Namespace
from pathlib import Path

import psutil

from cats import paths
from cats.benchmarking import workload
from cats.errors import CatsError


def measure(options: Namespace) -> None:
    """Run the targets in a fresh clone, print what each took, and write one record."""
    paths.in_clone(paths.RECORDS)
    started = time.time()
    rows = []
    with tempfile.TemporaryDirectory(prefix="a new user ") as folder:
        clone = Path(folder) / "cats companion"
        subprocess.run(["git", "clone", "--quiet", paths.ROOT, clone], check=True)
        for target in options.targets:
            status, seconds, peak_gb = run(target, clone)
            if status:
                raise CatsError(f"make {target} ended with {status} in a fresh clone: it says why above.")
            step = f"make {target}"
            again = ", again" * sum(row["step"].startswith(step) for row in rows)
            rows.append(
                {
                    "step": step + again,
                    "seconds": round(seconds, 1),
                    "cores": len(os.sched_getaffinity(0)),
                    "memory_gb": round(peak_gb, 2),
                }
            )
            print(f"{rows[-1]['step']:<18} {seconds:6.0f} s  {peak_gb:5.2f} GB at most", flush=True)
    workload.record("build", options, rows, {"id": "none"}, {"corpus": "none"}, started)


def run(target: str, clone: Path) -> tuple[int, float, float]:
    """Exit status, wall time in s and peak memory in GB of `make target`, started from another folder."""
    started = time.monotonic()
    command = ["make", "--no-print-directory", "-C", str(clone), target]
    process = subprocess.Popen(command, cwd="/", stdin=subprocess.DEVNULL)
    peak, done = [0.0], threading.Event()

    def watch() -> None:
        while not done.wait(1.0):
            peak[0] = max(peak[0], memory_gb(process.pid))

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    status = process.wait()
    done.set()
    watcher.join()
    return status, time.monotonic() - started, peak[0]


def memory_gb(root: int) -> float:
    """Memory of a process and all below it in GB, pages that they share counted once."""
    total = 0
    try:
        tree = [psutil.Process(root), *psutil.Process(root).children(recursive=True)]
    except psutil.NoSuchProcess:
        return 0.0
    for process in tree:
        try:
            total += process.memory_full_info().pss
        except (psutil.NoSuchProcess, psutil.AccessDenied):  # it ended in between
            continue
    return total / 1e9
