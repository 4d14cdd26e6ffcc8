"""The real spandrel, with stand-ins for the two functions of torchvision that it imports and that LIIF does not use.

spandrel requires torchvision, whose wheels fit one build of torch only.
"""

from __future__ import annotations

import sys
from types import ModuleType

import pytest


def import_or_skip(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    try:
        import torchvision.transforms.functional  # noqa: F401
    except (ImportError, RuntimeError):
        for name in ("torchvision", "torchvision.transforms", "torchvision.transforms.functional"):
            module = ModuleType(name)
            module.__dict__.update(InterpolationMode=None, rotate=None, normalize=None)
            monkeypatch.setitem(sys.modules, name, module)
    return pytest.importorskip("spandrel", reason="spandrel is not installed")
