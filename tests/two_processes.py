"""A `cats` command in two processes, as `accelerate launch` or torchrun start it."""

import os
import socket
import subprocess
import sys

import pytest
import torch

_TWO_GPUS = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
DEVICES = ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, _TWO_GPUS])]

# Forked when everything is imported, which takes longest.
_PROGRAM = """
import importlib, os, sys
import cats_cli
importlib.import_module(sys.argv[1])
children = []
for rank in "01":
    os.environ |= {"RANK": rank, "LOCAL_RANK": rank}
    children.append(os.fork())
    if not children[-1]:
        os._exit(cats_cli.main(sys.argv[2:]))
sys.exit(any(os.waitpid(child, 0)[1] for child in children))
"""


def run(module: str, *arguments: str) -> None:
    """Wait for both to end well; `module` is what the command would import."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    group = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", _PROGRAM, module, *arguments]
    done = subprocess.run(command, env={**os.environ, **group}, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-2000:]
