"""How much memory a model and an evaluation will take, said before anything is loaded."""

import os
from dataclasses import dataclass

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig

from cats.core.accounting import account
from cats.errors import CatsError

_KEPT_LOGITS = 4  # GB: the harness keeps no more of them


@dataclass(frozen=True)
class Estimate:
    """Gigabytes (10^9 bytes): `weights`, and `working` memory for one call of `tokens` tokens at least."""

    weights: float
    working: float

    @property
    def total(self) -> float:
        return self.weights + self.working

    def __str__(self) -> str:
        return f"{self.total:.1f} GB ({self.weights:.1f} of weights, {self.working:.1f} to work in)"


def estimate(config: PretrainedConfig, dtype: str, *, tokens: int = 2048) -> Estimate:
    """For the weights in `dtype` and a call of `tokens` tokens, from the configuration alone.

    A layer at work holds gate, up, their product and a mask or two, each of the intermediate size, and the
    logits.
    """
    text = config.get_text_config()
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(text)
    size = getattr(torch, dtype).itemsize
    shape = account(model)
    logits = min(tokens * text.vocab_size * (size + 4) / 1e9, _KEPT_LOGITS)
    working = tokens * (5 * shape.intermediate_size + 6 * shape.hidden_size) * size / 1e9 + logits
    return Estimate(_parameters(model) * size / 1e9, working)


def kind(device: str) -> str:
    """What a device is, "cpu" or "cuda"; CatsError for any other, which nothing here was tried on."""
    try:
        name = torch.device("cpu" if device == "auto" else device).type
    except RuntimeError as error:
        raise CatsError(f"Unknown device {device!r}: use cpu, cuda, cuda:0 or auto.") from error
    if name not in ("cpu", "cuda"):
        raise CatsError(f"The device {device!r} is not supported: use cpu, cuda, cuda:0 or auto.")
    return name


def check_device(device: str) -> None:
    """Raise CatsError for a device that is unknown, unsupported or not there."""
    if kind(device) != "cuda":
        return
    if not torch.cuda.is_available():
        raise CatsError(f"{device} was asked for and PyTorch sees no GPU here: use device=cpu.")
    number = torch.device(device).index or 0
    if number >= torch.cuda.device_count():
        raise CatsError(f"There is no {device}, PyTorch finds {torch.cuda.device_count()} GPUs here.")


def available(device: str) -> float:
    """Free memory in GB: of one GPU, of all of them for "auto", or what the machine has without one."""
    if device == "auto" and torch.cuda.is_available():
        return sum(torch.cuda.mem_get_info(number)[0] for number in range(torch.cuda.device_count())) / 1e9
    check_device(device)
    if kind(device) == "cuda":
        return torch.cuda.mem_get_info(device)[0] / 1e9
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES") / 1e9 + _reclaimable()


def check(name: str, config: PretrainedConfig, dtype: str, device: str, *, tokens: int = 2048) -> Estimate:
    """The estimate for calls of `tokens` tokens; raises CatsError where the device has less memory free.

    Nothing is loaded for it.
    """
    needed = estimate(config, dtype, tokens=tokens)
    free = available(device)
    if needed.total > free:
        raise CatsError(
            f"{name} in {dtype} needs about {needed} and {device} has {free:.1f} GB free: "
            "use bfloat16, a larger device, device auto for several GPUs, a smaller batch or a smaller model."
        )
    return needed


def _parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _reclaimable() -> float:
    """GB of file cache, which Linux gives back on demand."""
    try:
        with open("/proc/meminfo") as lines:
            values = dict(line.split(":", 1) for line in lines)
        return (int(values["MemAvailable"].split()[0]) - int(values["MemFree"].split()[0])) * 1024 / 1e9
    except (OSError, KeyError, ValueError):
        return 0.0
