"""Triton's kernels on the CPU: the interpreter's tests in a process of their own (it is chosen before any import)."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def version(distribution: str) -> tuple[int, ...]:
    return tuple(map(int, importlib.metadata.version(distribution).split(".")[:2]))


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
def test_kernels_under_the_interpreter():
    if version("triton") < (3, 7) and version("numpy") >= (2, 4):
        pytest.skip("the interpreter of Triton 3.6 does not run with NumPy 2.4 or later")
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "tests/triton_interpreter"]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    environment.pop("LIIF_FAST_BACKEND", None)
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]
    passed = re.search(r"(\d+) passed", result.stdout)
    assert passed is not None and int(passed[1]) > 350, result.stdout[-500:]
