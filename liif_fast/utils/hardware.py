"""The processor's name, and devices that PyTorch can use."""

from __future__ import annotations

import platform
from pathlib import Path

import torch

from liif_fast.ops.dtypes import cpu_multiplies


def cpu_model() -> str:
    """The processor's name as the system reports it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def usable_device(device: torch.device | str) -> torch.device:
    """The device with its index; raises ValueError with PyTorch's reason if it cannot be used on this machine."""
    try:
        place = torch.ones(1, device=torch.device(device))
        place.item()  # fails on the device meta, which holds no numbers
    except Exception as error:  # each device type has its own
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
        raise ValueError(f"device {str(device)!r} cannot be used here: {reason}.") from error
    return place.device


def emulates(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether products of a 16-bit dtype on a device are far slower than those of float32: on x86 without them."""
    if device.type != "cpu" or dtype.itemsize != 2 or platform.machine().lower() not in ("x86_64", "amd64"):
        return False
    return hasattr(torch.cpu, "get_capabilities") and not cpu_multiplies(dtype)
