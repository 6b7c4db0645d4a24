"""The hardware, software, commit and kernels that a measurement was made with."""

import hashlib
import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path

import torch

from cats import paths

_DRIVER_QUERY = ("--query-gpu=driver_version", "--format=csv,noheader")
_PACKAGES = ("torch", "triton", "transformers", "lm_eval")


def describe() -> dict:
    """{"hardware", "software", "git", "kernel_hash"} as a record holds them; no host name, no path."""
    return {
        "hardware": hardware(),
        "software": software(),
        "git": git(),
        "kernel_hash": kernel_hash(gpu=torch.cuda.is_available()),
    }


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


# Set from the records, and a kernel of its own that no record was measured with yet.
_APART = ("crossover.py", "centred.py")


def kernel_hash(gpu: bool) -> str:
    """sha256 over the names and bytes of the source files that the GPU's or the CPU's kernels are made of."""
    digest = hashlib.sha256()
    for source in sorted(paths.KERNELS.glob("*.py")):
        if source.name.startswith("cpu") != gpu and source.name not in _APART:
            digest.update(source.name.encode() + b"\0" + source.read_bytes())
    return digest.hexdigest()


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
