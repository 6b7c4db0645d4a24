"""The hardware, software and commit that a measurement is made with; no host name, no path."""

import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path

import torch

from cats import paths

_DRIVER_QUERY = ("--query-gpu=driver_version", "--format=csv,noheader")
_PACKAGES = ("torch", "triton", "transformers", "lm_eval")


def hardware() -> dict:
    """The GPU where there is one, else the CPU: device, driver, memory in GB, count."""
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        return {
            "device": properties.name,
            "driver": _output("nvidia-smi", *_DRIVER_QUERY).split("\n")[0],
            "memory_gb": round(properties.total_memory / 1e9, 1),
            "count": torch.cuda.device_count(),
        }
    return {
        "device": _cpu_name(),
        "driver": None,
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
        "count": os.cpu_count(),
    }


def software() -> dict:
    """Versions of Python, of the packages that results depend on (None where missing), and of CUDA."""
    versions = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = None
    return {**versions, "cuda": torch.version.cuda}


def git() -> dict:
    """The commit, and whether the library or the kernels differ from it; both None outside a clone."""
    commit = _output("git", "-C", str(paths.ROOT), "rev-parse", "HEAD")
    if not commit:
        return {"commit": None, "dirty": None}
    changes = _output("git", "-C", str(paths.ROOT), "status", "--porcelain", "--", "cats", "kernels")
    return {"commit": commit, "dirty": bool(changes)}


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _output(*command: str) -> str:
    """A program's output, empty where it fails or does not exist."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip()
