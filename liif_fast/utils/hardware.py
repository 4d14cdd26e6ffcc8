"""The processor's name, and devices that PyTorch can use."""

from __future__ import annotations

import platform
from pathlib import Path

import torch


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
        found = torch.empty(1, device=torch.device(device)).device
        if found.type == "meta":
            raise RuntimeError("it computes shapes without numbers")
        return found
    except (RuntimeError, AssertionError, NotImplementedError, ImportError, AttributeError) as error:
        reason = str(error).strip().splitlines()[0].split(". ")[0].rstrip(".")
        raise ValueError(f"device {str(device)!r} cannot be used here: {reason}.") from error
