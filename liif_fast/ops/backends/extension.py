"""The compiled extension ``liif_fast/_C.abi3.so``, or one sentence with the reason why it is missing.

Loading registers its ops in ``torch.ops``, under a namespace that follows from the package's name: copies of it run
side by side. This module compiles nothing and uses no GPU. Two variables are read when the extension is loaded:
LIIF_FAST_EXTENSION   another file to load instead (``make sanitize`` sets it)
LIIF_FAST_CPU_ISA     avx512, avx2, neon or portable: the largest instruction set that the CPU kernels may use; auto
                      (default) is the largest of the processor. The bfloat16 kernels need avx512 or neon.
"""

from __future__ import annotations

import ctypes
import json
import os
import re
import warnings
from functools import cache
from pathlib import Path
from typing import Any

import torch

from ..namespace import NATIVE_NAMESPACE

PACKAGE = Path(__file__).resolve().parents[2]
MIN_TORCH = (2, 11)
OPS = getattr(torch.ops, NATIVE_NAMESPACE)  # the ops, once load() has succeeded
# pip keeps the wheels that it builds, so that a plain reinstallation would repeat a wheel without the extension.
_REBUILD = (
    "build it by `python setup.py build_ext --inplace`"
    if (PACKAGE.parent / "setup.py").is_file()
    else "run `python -m pip install --no-build-isolation --no-cache-dir .` in the folder of the package's sources"
)

_state: dict[str, str] = {}  # {"reason": ...} after load(); '' when the extension is loaded


def path() -> Path:
    """The file that load() loads: LIIF_FAST_EXTENSION, else the one in the package."""
    chosen = os.environ.get("LIIF_FAST_EXTENSION")
    return Path(chosen) if chosen else PACKAGE / "_C.abi3.so"


@cache
def build_facts() -> dict[str, Any]:
    """The contents of _build.json: how the extension was built, `missing` with the reason why not, or `noarch`."""
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
        if build_facts().get("noarch"):
            return "this variant of the kernel is made of Python and Triton alone"
        if why := build_facts().get("missing"):
            return f"the package was built without it ({why}); {_REBUILD}"
        return f"{file} does not exist; {_REBUILD}"
    try:
        register = ctypes.CDLL(str(file)).liif_fast_register
    except (OSError, AttributeError) as error:  # wrong platform, a symbol this torch lacks, a file of another version
        cause = " ".join(str(error).split())[:300]
        return f"{file} does not load into torch {version} ({cause}); {_REBUILD}"
    register.argtypes, register.restype = [ctypes.c_char_p], ctypes.c_char_p
    if refusal := register(NATIVE_NAMESPACE.encode()):
        return f"{file} cannot be used: {refusal.decode()}"
    OPS.cpu_isa()  # raises a RuntimeError that names the value of LIIF_FAST_CPU_ISA and the choices
    return ""


def load() -> None:
    """Load the extension once; when that is impossible, warn once with the reason."""
    if _state:
        return
    _state["reason"] = _load(path())
    if _state["reason"] and not build_facts().get("noarch"):
        warnings.warn(
            f"liif_fast runs without its C++ extension, in the slower calls of PyTorch: {_state['reason']}",
            RuntimeWarning,
            stacklevel=2,
        )


def is_available() -> bool:
    """Whether the extension's ops can be called."""
    load()
    return not _state["reason"]


def reason() -> str:
    """One sentence why the extension is missing; '' when it is loaded."""
    load()
    return _state["reason"]
