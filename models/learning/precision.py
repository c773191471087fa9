"""In which arithmetic a network learns."""

import contextlib
from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any, Literal

import torch
from torch import nn

from models.errors import UsageError
from models.settings.train import Mode

Arithmetic = Literal["fp32", "bf16", "fp16"]


def arithmetic(
    asked: Literal["auto", "fp32", "bf16", "fp16"], device: str, mode: Mode, network: nn.Module
) -> Arithmetic:
    """The arithmetic for a device: what was asked for, or the fastest that the device is built for.

    Where only a head learns, its inputs are computed once and as the exported model will compute them: fp32 on a CPU.
    Raises UsageError for what the device cannot do.
    """
    cuda = device.startswith("cuda")
    if asked == "auto":
        if cuda:
            return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
        return "bf16" if mode != "features" and _cpu_has_bf16() and not _is_depthwise(network) else "fp32"
    if asked == "fp16" and not cuda:
        raise UsageError("--precision fp16 needs a GPU: on a CPU use fp32 or bf16")
    return asked


def _is_depthwise(network: nn.Module) -> bool:
    """Whether it has convolutions of few channels each, which spend their time in memory: bf16 makes them no faster.

    On a CPU with bf16, ResNet-18 trains 1.8 times as fast with it, MobileNetV2 .9 times.
    """
    return any(isinstance(module, nn.Conv2d) and module.groups > 1 for module in network.modules())


def _cpu_has_bf16() -> bool:
    """Whether the CPU multiplies bf16 itself; where it is emulated it is slower than fp32."""
    capabilities: Mapping[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return any(capabilities.get(name, False) for name in ("avx512_bf16", "amx_bf16"))


def autocast(chosen: Arithmetic, device: torch.device) -> AbstractContextManager:
    """The context in which losses and outputs are computed."""
    if chosen == "fp32":
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=torch.bfloat16 if chosen == "bf16" else torch.float16)
