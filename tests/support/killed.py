"""A `cats` command that is killed at its n-th change of a file, and begun again, as a person would."""

import json
import os
import subprocess
import sys

# Children are forked when everything is imported, which takes longest. A change of the disk under the folder
# is an audit event of Python: a child that has a number counts them, and kills itself at that one.
_PROGRAM = """
import json, os, signal, sys
import cats_cli
import cats.evaluation.command
import cats.finetuning.command

CHANGES = "os.rename", "os.remove", "os.mkdir", "os.link", "os.rmdir"

def child(arguments, at, how):
    read, write = os.pipe()
    pid = os.fork()
    if pid:
        os.close(write)
        changes = int(os.fdopen(read).read() or 0)
        return os.waitpid(pid, 0)[1], changes
    changes = 0

    def count(event, given):
        nonlocal changes
        written = event == "open" and isinstance(given[2], int) and given[2] & (os.O_WRONLY | os.O_RDWR)
        path = os.path.abspath(str(given[0])) if event in CHANGES or written else ""
        if path.startswith(os.path.abspath("runs")):
            changes += 1
            if changes == at:
                os.kill(os.getpid(), how)

    sys.addaudithook(count)
    status = cats_cli.main(arguments)
    os.write(write, str(changes).encode())
    os._exit(status)

whole = None
for arguments, share, how in json.loads(sys.argv[1]):
    at = None if share is None else 1 + int(share * whole)
    status, changes = child(arguments, at, how)
    whole = whole or changes
    print("status", status, at, flush=True)
"""


def commands(*wanted: tuple[list[str], float | None, int]) -> tuple[list[int], str]:
    """Run commands one after the other, each in a process of its own, and send those with a share a signal.

    A share in [0, 1) is of the changes of files that the first command, a whole one, made below the folder
    `runs`. Returns the wait statuses, and what was said.
    """
    done = subprocess.run(
        [sys.executable, "-c", _PROGRAM, json.dumps(wanted)],
        capture_output=True,
        text=True,
        timeout=500,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    statuses = [int(line.split()[1]) for line in done.stdout.splitlines() if line.startswith("status ")]
    assert len(statuses) == len(wanted), done.stderr[-2000:]
    return statuses, done.stdout + done.stderr
