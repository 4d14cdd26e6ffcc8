"""The compiled extension ``liif_fast/_C.abi3.so``, or the one sentence why it is missing.

Loading registers its ops in ``torch.ops.liif_fast_C``. Nothing is compiled here and no GPU is touched.
LIIF_FAST_EXTENSION names another file to load instead (``make sanitize`` does so).
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

_state: dict[str, str] = {}  # {"reason": ...} once load() has run; '' when the extension is there


def path() -> Path:
    """The file that load() loads: LIIF_FAST_EXTENSION, else the one in the package."""
    chosen = os.environ.get("LIIF_FAST_EXTENSION")
    return Path(chosen) if chosen else PACKAGE / "_C.abi3.so"


@cache
def build_facts() -> dict[str, Any]:
    """What setup.py noted beside the extension: compiler, torch, cuda, cuda_archs, why_no_cuda; or only missing."""
    try:
        facts = json.loads((path().parent / "_build.json").read_text())
    except (OSError, ValueError):
        return {}
    return facts if isinstance(facts, dict) else {}


def _load(file: Path) -> str:
    """Load the file; returns '' or one sentence why that failed."""
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
    return ""


def load() -> None:
    """Load the extension, once; where that is impossible warn, once, and name the reason."""
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
    """One sentence why the extension is missing; '' when it is there."""
    load()
    return _state["reason"]
