"""Launch configurations by device class and shape."""

import math
from functools import cache

import torch
import triton


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


def launch_options(device: torch.device, config: dict[str, int], pdl: bool) -> dict:
    """Options of a launch on NVIDIA: PDL, and as few registers as let `programs` share a multiprocessor."""
    if device.type != "cuda" or torch.version.hip is not None:
        return {}
    registers = 65536 // (32 * config["warps"] * config["programs"]) // 8 * 8
    return {"maxnreg": min(255, registers)} | ({"launch_pdl": True} if pdl else {})


# One row, by the largest hidden size it holds for: programs a multiprocessor, warps, gate rows and survivors
# a tile, columns a tile, whether survivors are read ahead, and whether z is compared at once. Best of some
# hundred configurations each on an H200 in bfloat16, from 512 x 1536 to 8192 x 28672 (hidden x intermediate).
DECODE = {
    512: (4, 2, 4, 4, 512, True, True),
    1024: (3, 4, 16, 4, 1024, True, True),
    1280: (4, 2, 4, 2, 512, True, True),
    1792: (3, 4, 4, 2, 1024, True, True),
    2048: (2, 4, 8, 4, 1024, True, True),
    3072: (3, 4, 4, 2, 1024, True, True),
    4096: (2, 8, 4, 4, 4096, False, True),
    5632: (2, 4, 4, 2, 1024, True, True),
    math.inf: (2, 8, 2, 1, 2048, True, False),
}
SMALL = (2, 4, 8, 8, 1024, False, True)  # layers whose weight matrices have at most SMALL_SIZE numbers
SMALL_SIZE = 2_500_000
DECODE_NAMES = ("programs", "warps", "rows", "take", "cols", "ahead", "at_once")


def decode_config(m: int, d: int, element_size: int) -> dict[str, int]:
    """One row: the entry of DECODE for weights [m, d], its rows fewer where a number takes four bytes."""
    values = next(values for largest, values in DECODE.items() if d <= largest)
    if d > 512 and m * d <= SMALL_SIZE:
        values = SMALL
    config = dict(zip(DECODE_NAMES, values, strict=True))
    for name in ("rows", "take"):
        config[name] = max(1, config[name] * 2 // max(2, element_size))
    config["cols"] = min(config["cols"], triton.next_power_of_2(d))
    return config


def few_config(device: torch.device, d: int, element_size: int) -> dict[str, int]:
    """Two to four rows: 16 KB of weights a tile, and four programs of four warps a multiprocessor.

    On an H100 at 4096 x 11008 this was 8 to 30 % faster than fewer, larger programs. `registers` a thread
    keep four programs on a multiprocessor; `take` neurons of `cols` columns are a tile of down; with
    `tensor_rows` rows or more, tensor cores (`batch`) compute gate and up.
    """
    width = triton.next_power_of_2(d)
    rows = max(1, min(8, 16384 // (width * element_size)))
    return {
        "programs": 4 * multiprocessors(device), "warps": 4, "registers": 128,
        "rows": rows, "cols": min(1024, width), "take": 4, "tensor_rows": 4,
    }  # fmt: skip


# Five to 16 rows, by device class. `gate_up`: programs a multiprocessor, warps, and for each of its phases
# neurons x columns a tile and tiles in flight; `down`: programs a multiprocessor, warps, columns a program,
# neurons a tile, pipeline stages (two a tile in flight: a tile waits for its list of neurons).
BATCH = {
    "hopper": {
        "programs": 2, "warps": 4, "gate_rows": 64, "gate_cols": 128, "gate_stages": 5,
        "up_rows": 64, "up_cols": 128, "up_stages": 5,
        "down_programs": 2, "down_warps": 4, "cols": 256, "take": 32, "down_stages": 6,
    },
    "other": {
        "programs": 2, "warps": 4, "gate_rows": 64, "gate_cols": 64, "gate_stages": 3,
        "up_rows": 32, "up_cols": 128, "up_stages": 3,
        "down_programs": 2, "down_warps": 4, "cols": 64, "take": 32, "down_stages": 6,
    },
    "float32": {
        "programs": 2, "warps": 4, "gate_rows": 16, "gate_cols": 32, "gate_stages": 3,
        "up_rows": 16, "up_cols": 32, "up_stages": 3,
        "down_programs": 2, "down_warps": 4, "cols": 64, "take": 16, "down_stages": 4,
    },
    "interpreter": {
        "programs": 2, "warps": 4, "gate_rows": 32, "gate_cols": 512, "gate_stages": 1,
        "up_rows": 32, "up_cols": 512, "up_stages": 1,
        "down_programs": 2, "down_warps": 4, "cols": 512, "take": 32, "down_stages": 1,
    },
}  # fmt: skip


def batch_config(device: torch.device, element_size: int) -> dict[str, int]:
    """Up to 16 rows: an entry of BATCH, programs counted for the whole device."""
    if device.type != "cuda":
        kind = "interpreter"
    elif element_size > 2:  # no tensor core multiplies float32 without rounding: its tiles are for FMA
        kind = "float32"
    else:
        kind = "hopper" if has_pdl(device) and torch.cuda.get_device_capability(device)[0] == 9 else "other"
    config = dict(BATCH[kind])
    config["programs"] *= multiprocessors(device)
    config["down_programs"] *= multiprocessors(device)
    return config
