"""Facts about GPUs: compute capability, driver, the code that the extension holds for them.

torch.compile traces these functions as constants, so that graphs have no guards on them. The facts do not change while
a process runs.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar

import torch

from . import extension

OLDEST = (8, 0)  # compute capability of the kernels
_Function = TypeVar("_Function", bound=Callable[..., Any])


def traced_as_constant(function: _Function) -> _Function:
    """As torch.compiler.assume_constant_result, which would import torch._dynamo: that takes seconds."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


@traced_as_constant
def capability(index: int | None) -> tuple[int, int] | None:
    """(major, minor) of NVIDIA's GPU `index`, None for the current one; None where torch drives none of NVIDIA's."""
    if torch.version.cuda is None or not torch.cuda.is_available():
        return None
    return torch.cuda.get_device_capability(index)


def _dotted(version: int) -> str:
    """13000 -> 13.0"""
    return f"{version // 1000}.{version % 1000 // 10}"


def _cuda_versions() -> tuple[int, int]:
    """(of CUDA that the driver supports, of the runtime in the extension), 13020 for 13.2; 0 where unknown."""
    if not extension.is_available() or not hasattr(extension.OPS, "cuda_versions"):
        return 0, 0
    driver, runtime = extension.OPS.cuda_versions()
    return driver, runtime


def _runs(arch: str, major: int, minor: int) -> bool:
    """Whether a GPU runs machine code for `arch`, such as 90a: that of its own major version, up to its minor one."""
    number, exact = int(arch.rstrip("af")), arch.endswith("a")
    return number == 10 * major + minor if exact else number // 10 == major and number % 10 <= minor


@traced_as_constant
def against_age(backend: str, index: int | None) -> str:
    """Why NVIDIA's GPU `index` is too old for `backend`; '' where it is not, and for GPUs of others."""
    found = capability(index)
    if found is None or found >= OLDEST:
        return ""
    have = f"{found[0]}.{found[1]}"
    return f"backend '{backend}' needs an NVIDIA GPU of compute capability 8.0 (Ampere) or newer, this one has {have}"


@traced_as_constant
def against_build(index: int | None) -> str:
    """Why NVIDIA's GPU `index` or its driver cannot run the extension's code; '' where nothing is against it."""
    driver, runtime = _cuda_versions()
    has, made = _dotted(driver), _dotted(runtime)
    if driver // 1000 < runtime // 1000:  # within a major version, older drivers run newer code
        return (
            f"backend 'cuda' was compiled with CUDA {made}, and this driver supports CUDA {has} at most: update the "
            f"driver, or build with a CUDA toolkit that it supports"
        )
    facts, found = extension.build_facts(), capability(index)
    if found is None or "cuda_archs" not in facts or any(_runs(arch, *found) for arch in facts["cuda_archs"]):
        return ""
    major, minor = found
    portable = [int(arch) for arch in facts.get("cuda_ptx", ()) if not arch.endswith(("a", "f"))]
    if not any(arch <= 10 * major + minor for arch in portable):
        return (
            f"backend 'cuda' holds code for {', '.join(facts['cuda_archs'])} and no PTX that compute capability "
            f"{major}.{minor} could run: build with LIIF_FAST_CUDA_ARCHS={major}{minor}"
        )
    if driver < runtime:  # the driver's compiler reads no PTX of a newer toolkit
        return (
            f"backend 'cuda' holds only PTX for compute capability {major}.{minor}, and a driver for CUDA {made} has "
            f"to compile it; this one supports CUDA {has}: update it, or build with LIIF_FAST_CUDA_ARCHS={major}{minor}"
        )
    return ""


def _driver_release() -> str:
    """NVIDIA's number of the driver, such as 580.65.06; '' where it is not found."""
    try:
        found = re.search(r"\s(\d{3,}\.[\d.]+)\s", Path("/proc/driver/nvidia/version").read_text())
    except OSError:
        found = None
    return found[1] if found else ""


def describe(device: torch.device) -> str:
    """The device, its driver and the versions of what compiled the kernels, for a report."""
    driver, runtime = _cuda_versions()
    name, found = str(device), capability(device.index) if device.type == "cuda" else None
    if device.type in ("cuda", "xpu"):
        name += f" ({getattr(torch, device.type).get_device_name(device)})"
    try:
        triton = metadata.version("triton")
    except metadata.PackageNotFoundError:
        triton = "none"
    parts = [name, f"compute capability {found[0]}.{found[1]}" if found else ""]
    parts += [f"driver {_driver_release() or 'unknown'}" + (f" for CUDA {_dotted(driver)}" if driver else "")]
    parts += [f"torch {torch.__version__}", f"Triton {triton}"]
    parts += [f"extension with CUDA {_dotted(runtime)}" if runtime else "extension without CUDA"]
    return ", ".join(part for part in parts if part)
