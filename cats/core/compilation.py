"""The limit of torch.compile that a process with many models runs into."""

import torch


def allow(count: int) -> None:
    """Let one function be compiled `count` times: torch runs it eager, or raises, beyond 8 in a process."""
    limits = torch._dynamo.config
    limits.recompile_limit = max(limits.recompile_limit, count)
