"""The compiled extension ``liif_fast/_C.abi3.so``, or one sentence with the reason why it is missing.

Loading registers its ops in ``torch.ops.liif_fast_C``. This module compiles nothing and uses no GPU. Two variables are
read when the extension is loaded:
LIIF_FAST_EXTENSION   another file to load instead (``make sanitize`` sets it)
LIIF_FAST_CPU_ISA     avx512, avx2 or portable: the largest instruction set that the CPU kernels may use; auto (default)
                      is the largest of the processor. The bfloat16 kernels need avx512.
"""

from __future__ import annotations

import json
import os
import re
import warnings
from functools import cache
from pathlib import Path
from typing import Any

import torch

PACKAGE = Path(__file__).resolve().parents[2]
MIN_TORCH = (2, 11)
_REBUILD = "build it with `python setup.py build_ext --inplace`, or reinstall the package"

_state: dict[str, str] = {}  # {"reason": ...} after load(); '' when the extension is loaded


def path() -> Path:
    """The file that load() loads: LIIF_FAST_EXTENSION, else the one in the package."""
    chosen = os.environ.get("LIIF_FAST_EXTENSION")
    return Path(chosen) if chosen else PACKAGE / "_C.abi3.so"


@cache
def build_facts() -> dict[str, Any]:
    """The contents of _build.json: compiler, torch, cuda, cuda_archs, why_no_cuda; `missing` alone without a build."""
    try:
        facts = json.loads((path().parent / "_build.json").read_text())
    except (OSError, ValueError):
        return {}
    return facts if isinstance(facts, dict) else {}


def _load(file: Path) -> str:
    """Load the file; returns '' or one sentence why it cannot be loaded. A wrong LIIF_FAST_CPU_ISA is an error."""
    version = torch.__version__
    if tuple(int(part) for part in re.findall(r"\d+", version)[:2]) < MIN_TORCH:
        return f"torch {version} is installed, but the extension needs torch>=2.11; upgrade torch"
    if not file.is_file():
        if os.environ.get("LIIF_FAST_EXTENSION"):
            return f"LIIF_FAST_EXTENSION names {str(file)!r}, which is not a file"
        if why := build_facts().get("missing"):
            return f"the package was built without it: {why}"
        return f"{file} does not exist; {_REBUILD}"
    try:
        torch.ops.load_library(str(file))
    except (OSError, RuntimeError) as error:  # wrong platform, a symbol this torch lacks, ops registered twice
        cause = " ".join(str(error).split())[:300]
        return f"{file} does not load into torch {version} ({cause}); {_REBUILD}"
    torch.ops.liif_fast_C.cpu_isa()  # raises a RuntimeError that names the value of LIIF_FAST_CPU_ISA and the choices
    return ""


def load() -> None:
    """Load the extension once; when that is impossible, warn once with the reason."""
    if _state:
        return
    _state["reason"] = _load(path())
    if _state["reason"]:
        warnings.warn(
            f"liif_fast runs without its C++ extension, on the slow reference backend: {_state['reason']}",
            RuntimeWarning,
            stacklevel=2,
        )


def is_available() -> bool:
    """Whether the extension's ops are in torch.ops.liif_fast_C."""
    load()
    return not _state["reason"]


def reason() -> str:
    """One sentence why the extension is missing; '' when it is loaded."""
    load()
    return _state["reason"]
