"""Launch configurations by device class and shape, and where the dense path is faster than the sparse one."""

from functools import cache

import torch


@cache
def has_pdl(device: torch.device) -> bool:
    """Programmatic dependent launch: NVIDIA, compute capability 9.0 and later."""
    if device.type != "cuda" or torch.version.hip is not None:
        return False
    return torch.cuda.get_device_capability(device) >= (9, 0)


@cache
def multiprocessors(device: torch.device) -> int:
    """Number of multiprocessors; on a CPU (interpreter) a few, so that toy shapes use several programs."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 3


def decode_config(device: torch.device, m: int, d: int) -> dict[str, int]:
    """One row: programs, warps a program, gate rows a tile, surviving rows a tile."""
    return {"programs": multiprocessors(device), "warps": 8, "gate_rows": 4, "take": 4}
