"""The machine of a result file: processor, threads, instruction set, versions, commit."""

from __future__ import annotations

import os
import platform
import re
import statistics
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from liif_fast.ops.backends import extension

_ROOT = Path(__file__).resolve().parent.parent
# The paths whose changes can change a timing, without results and documents.
_MEASURED = ("csrc", "liif_fast", ":(glob)bench/**/*.py", "setup.py")


def describe(device: str = "cpu") -> dict[str, Any]:
    """The processor and the threads in use, and the GPU where `device` is cuda."""
    info = _cpuinfo()
    ops = extension.OPS
    found = {
        "device": device,
        "cpu": info.get("model name") or platform.processor() or platform.machine(),
        "architecture": _architecture(info),
        "threads": torch.get_num_threads(),
        "instructions": ops.cpu_isa() if hasattr(ops, "cpu_isa") else "no extension",
        "load_before": round(os.getloadavg()[0], 2),
    }
    if device == "cuda":
        gpu = torch.cuda.get_device_properties(0)
        found |= {
            "gpu": gpu.name,
            "capability": f"sm_{gpu.major}{gpu.minor}",
            "gpu_memory_bytes": gpu.total_memory,
            "multiprocessors": gpu.multi_processor_count,
            "l2_bytes": getattr(gpu, "L2_cache_size", None),
            "driver": _nvidia_smi(["driver_version"]).get("driver_version", "unknown"),
        }
    return found


def state(device: str) -> dict[str, Any]:
    """Values that drift during a run: the load of a CPU; clocks in MHz, power in W and temperature in C of a GPU."""
    if device == "cpu":
        return {"load": round(os.getloadavg()[0], 2)}
    return _nvidia_smi(["clocks.sm", "clocks.mem", "clocks.max.sm", "power.draw", "temperature.gpu", "pstate"])


def _nvidia_smi(fields: list[str]) -> dict[str, Any]:
    """Fields of `nvidia-smi --query-gpu` for the first GPU; empty without that program."""
    command = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits", "--id=0"]
    try:
        line = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.splitlines()[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        return {}
    return dict(zip(fields, (value.strip() for value in line.split(","))))


def versions() -> dict[str, str]:
    """The versions of everything that can change a number."""
    found = {"python": platform.python_version(), "torch": str(torch.__version__)}
    if torch.version.cuda:
        found["cuda"] = torch.version.cuda
    for name in ("liif_fast", "triton", "numpy"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def commit() -> str:
    """The measured commit, with '+' appended where the measured code differs from it; 'unknown' outside git."""
    try:
        head = _git("rev-parse", "--short=12", "HEAD")
        return head + ("+" if _git("status", "--porcelain", "--", *_MEASURED) else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def slug(machine: dict[str, Any]) -> str:
    """The folder of the results: cpu-amd-epyc-zen4-2-threads, nvidia-h100-80gb-hbm3."""
    if machine.get("device") == "cuda":
        return re.sub(r"[^a-z0-9]+", "-", machine["gpu"].lower()).strip("-")
    name = re.sub(r"\((?:r|tm)\)|@.*|\b(?:cpu|processor)\b", " ", machine["cpu"].lower())
    threads = machine["threads"]
    parts = ["cpu", name, machine["architecture"], f"{threads}-thread{'s' if threads > 1 else ''}"]
    return re.sub(r"[^a-z0-9]+", "-", " ".join(part for part in parts if part)).strip("-")


BUSY_LOAD = 0.5  # load average above which other programs distort the numbers
SHARED = "Other programs ran too: times are longer than on a free machine. Ratios hold, since methods take turns."


def was_shared(rates: list[float]) -> bool:
    """Whether other programs slowed down the FMA loop: more than a fifth of its rates lie over 5 % below the median."""
    slow = [rate for rate in rates if rate < 0.95 * statistics.median(rates)]
    return len(slow) > len(rates) / 5


def _cpuinfo() -> dict[str, str]:
    """/proc/cpuinfo's entry of the first processor."""
    try:
        first = Path("/proc/cpuinfo").read_text().split("\n\n")[0]
    except OSError:
        return {}
    pairs = (line.split(":", 1) for line in first.splitlines() if ":" in line)
    return {key.strip(): value.strip() for key, value in pairs}


def _architecture(info: dict[str, str]) -> str:
    """AMD's generation, which virtual machines omit from the model name; '' where it is unknown."""
    if info.get("vendor_id") != "AuthenticAMD":
        return ""
    family, model = int(info["cpu family"]), int(info["model"])
    if family == 25:
        return "zen4" if model in range(0x10, 0x20) or model >= 0x60 else "zen3"
    return {23: "zen2" if model >= 0x30 else "zen", 26: "zen5"}.get(family, "")


def _git(*args: str) -> str:
    return subprocess.run(["git", *args], cwd=_ROOT, capture_output=True, text=True, check=True).stdout.strip()
