"""The processes of one evaluation: one, or several under `accelerate launch`, that share the documents."""

import os
from collections.abc import Callable
from dataclasses import dataclass

import torch

from cats.errors import CatsError


@dataclass(frozen=True)
class Processes:
    """`rank` of `size` processes; `device` is this one's."""

    rank: int
    size: int
    device: str

    @property
    def leads(self) -> bool:
        return self.rank == 0

    def share(self, numbers):
        """Every `size`-th of `numbers`, from this process' own."""
        return numbers[self.rank :: self.size]

    def gather(self, value) -> list:
        """The values of all processes, in order of rank, on every one of them."""
        if self.size == 1:
            return [value]
        values: list = [None] * self.size
        torch.distributed.all_gather_object(values, value)
        return values

    def leading(self, work: Callable):
        """What `work()` returns on each process. The first one's ends before the others begin: what it wrote
        they read.
        """
        for turn in (True, False):
            if self.leads == turn:
                result = work()
            self.gather(None)
        return result

    def leave(self) -> None:
        """The end for all: a process that exits with its connections open may abort, or abort another."""
        if self.size > 1:
            torch.distributed.barrier()
            torch.distributed.destroy_process_group()

    def agree(self, decision: bool) -> bool:
        """The first process' decision, for what depends on the clock or the disk."""
        return self.gather(decision)[0]


def join(device: str) -> Processes:
    """This process' place: alone on `device`, or one of those that `accelerate launch` started.

    Raises CatsError where there are more processes than GPUs.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        return Processes(0, 1, device)
    from accelerate import PartialState  # it starts the processes' communication

    on_gpu = torch.device(device).type == "cuda"
    local = int(os.environ.get("LOCAL_RANK", "0"))
    if on_gpu and local >= torch.cuda.device_count():
        raise CatsError(
            f"accelerate started process {local + 1} but there are {torch.cuda.device_count()} GPUs here: "
            "lower --num_processes."
        )
    state = PartialState(cpu=not on_gpu)
    return Processes(state.process_index, state.num_processes, f"cuda:{local}" if on_gpu else device)
