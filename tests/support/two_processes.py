"""A `cats` command in two processes, as `accelerate launch` or torchrun start it."""

import json
import socket
import subprocess
import sys
from collections.abc import Sequence

import pytest
import torch

_TWO_GPUS = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
DEVICES = ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, _TWO_GPUS])]
SHARDED = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "false",
}

# Forked when everything is imported, which takes longest.
_PROGRAM = """
import importlib, json, os, sys
import cats_cli
importlib.import_module(sys.argv[1])

def split_on_a_cpu():  # accelerate splits weights on GPUs alone, PyTorch anywhere
    from accelerate.state import AcceleratorState, DistributedType
    begin = AcceleratorState.__init__
    def with_plugin(self, *arguments, fsdp_plugin=None, **options):
        begin(self, *arguments, fsdp_plugin=fsdp_plugin, **options)
        self.distributed_type = DistributedType.FSDP
        if fsdp_plugin is not None:
            self.fsdp_plugin = fsdp_plugin
    AcceleratorState.__init__ = with_plugin

for environment, arguments in json.loads(sys.argv[2]):
    children = []
    for rank in "01":
        children.append(os.fork())
        if not children[-1]:
            os.environ |= {"RANK": rank, "LOCAL_RANK": rank, **environment}
            if "ACCELERATE_USE_FSDP" in environment and "cuda" not in arguments:
                split_on_a_cpu()
            os._exit(cats_cli.main(arguments))
    if any(os.waitpid(child, 0)[1] for child in children):
        sys.exit(1)
"""


def run(module: str, *arguments: str, sharded: Sequence[str] = ()) -> None:
    """Wait for both to end well; `module` is what the command would import.

    `sharded`: another command, run behind it in the same way, with its weights split by FSDP.
    """
    launches = [(_group(), arguments)]
    if sharded:
        launches.append((_group() | SHARDED, sharded))
    command = [sys.executable, "-c", _PROGRAM, module, json.dumps(launches)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-2000:]


def _group() -> dict[str, str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    return {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
