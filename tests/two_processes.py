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
{sharded}
importlib.import_module(sys.argv[1])
children = []
for rank in "01":
    os.environ |= {"RANK": rank, "LOCAL_RANK": rank}
    children.append(os.fork())
    if not children[-1]:
        os._exit(cats_cli.main(sys.argv[2:]))
sys.exit(any(os.waitpid(child, 0)[1] for child in children))
"""

# accelerate splits weights on GPUs alone; PyTorch does on a CPU too.
_SHARDED_ON_CPU = """
from accelerate.state import AcceleratorState, DistributedType
begin = AcceleratorState.__init__
def with_plugin(self, *arguments, fsdp_plugin=None, **options):
    begin(self, *arguments, fsdp_plugin=fsdp_plugin, **options)
    self.distributed_type = DistributedType.FSDP
    if fsdp_plugin is not None:
        self.fsdp_plugin = fsdp_plugin
AcceleratorState.__init__ = with_plugin
"""
SHARDED = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "false",
}


def run(module: str, *arguments: str, sharded: bool = False) -> None:
    """Wait for both to end well; `module` is what the command would import. `sharded`: under FSDP."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    group = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
    program = _PROGRAM.replace("{sharded}", _SHARDED_ON_CPU if sharded and "cuda" not in arguments else "")
    environment = {**os.environ, **group, **(SHARDED if sharded else {})}
    done = subprocess.run(
        [sys.executable, "-c", program, module, *arguments],
        env=environment, capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
