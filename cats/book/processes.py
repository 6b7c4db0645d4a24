"""The processes that a run of chapters starts: this environment's kernel, and none that outlives the run."""

import contextlib
import ctypes
import importlib.util
import json
import os
import signal
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psutil

from cats.errors import CatsError

_PARENT_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG of Linux's prctl(2)
# A Jupyter kernel runs this line first: without it a kernel whose parent was killed goes on computing.
END_WITH_PARENT = f"_ = __import__('ctypes').CDLL(None).prctl({_PARENT_DEATH_SIGNAL}, {int(signal.SIGKILL)})"


def end_with_parent() -> None:
    """Linux ends this process when the process that started it ends, however that happens."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PARENT_DEATH_SIGNAL, int(signal.SIGKILL))


def kernel_arguments() -> list[str]:
    """What is added to the command line of each kernel: fewer log lines, and the end with its parent."""
    arguments = ["--IPKernelApp.log_level=CRITICAL"]  # no line about each kernel's start and end
    if sys.platform == "linux":
        arguments.append(f"--IPKernelApp.exec_lines={END_WITH_PARENT}")
    return arguments


@contextlib.contextmanager
def own_kernel() -> Iterator[None]:
    """Within it the Jupyter kernel `python3` is this environment's, whatever other Jupyter folders name so.

    Raises CatsError where ipykernel is not installed.
    """
    if importlib.util.find_spec("ipykernel") is None:
        raise CatsError("This environment has no Jupyter kernel: install ipykernel into it.")
    before = os.environ.get("JUPYTER_PATH")
    with tempfile.TemporaryDirectory() as folder:
        kernel = Path(folder) / "kernels" / "python3"
        kernel.mkdir(parents=True)
        command = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
        specification = {"argv": command, "display_name": "Python 3", "language": "python"}
        (kernel / "kernel.json").write_text(json.dumps(specification), encoding="utf-8")
        os.environ["JUPYTER_PATH"] = os.pathsep.join([folder, *([before] if before else [])])
        try:
            yield
        finally:
            if before is None:
                del os.environ["JUPYTER_PATH"]
            else:
                os.environ["JUPYTER_PATH"] = before


def end_children() -> None:
    """End every process that this one has started, and what those have started, at once."""
    children = psutil.Process().children(recursive=True)
    for child in children:
        with contextlib.suppress(psutil.NoSuchProcess):
            child.kill()
    psutil.wait_procs(children, timeout=5)
