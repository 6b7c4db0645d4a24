#!/usr/bin/env python3
"""Run the two commands as a new user would, on a fresh clone of the present commit, and say what each took.

python3 scripts/fresh_clone.py [--keep FOLDER] [TARGET ...]     targets of make; default: book book test
"""

import argparse
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def children() -> dict[int, list[int]]:
    """Process ids by their parent's."""
    found: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(stat.read_text(errors="replace").rpartition(")")[2].split()[1])
        except OSError:  # it ended in between
            continue
        found.setdefault(parent, []).append(int(stat.parent.name))
    return found


def memory_mb(root: int) -> float:
    """Memory of a process and all below it in MB, shared pages counted once."""
    tree, todo, total = children(), [root], 0.0
    while todo:
        process = todo.pop()
        todo += tree.get(process, [])
        try:
            lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
        except OSError:
            continue
        total += sum(int(line.split()[1]) for line in lines if line.startswith("Pss:")) / 1024
    return total


def run(target: str, clone: Path) -> tuple[int, float, float]:
    """Exit status, wall time in s and peak memory in MB of `make target`, started from another folder."""
    started = time.monotonic()
    process = subprocess.Popen(["make", "-C", str(clone), target], cwd="/", stdin=subprocess.DEVNULL)
    peak, done = [0.0], threading.Event()

    def watch():
        while not done.wait(1.0):
            peak[0] = max(peak[0], memory_mb(process.pid))

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    status = process.wait()
    done.set()
    watcher.join()
    return status, time.monotonic() - started, peak[0]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("targets", nargs="*", default=["book", "book", "test"])
    parser.add_argument("--keep", type=Path, help="clone into this folder and leave it")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="a new user ") as temporary:
        clone = (arguments.keep or Path(temporary) / "cats companion").absolute()
        subprocess.run(["git", "clone", "--quiet", str(ROOT), str(clone)], check=True)
        rows, worst = [], 0
        for target in arguments.targets:
            status, seconds, peak = run(target, clone)
            rows.append(f"make {target:<12} exit {status}  {seconds:6.0f} s  {peak / 1024:5.2f} GB at most")
            worst = worst or status
            if status:
                break
        print("\n".join(["", *rows]))
        return worst


if __name__ == "__main__":
    sys.exit(main())
