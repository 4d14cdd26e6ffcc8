"""Triton's kernels on the CPU: the interpreter's tests in a process of their own (it is chosen before any import)."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def version(distribution: str) -> tuple[int, ...]:
    return tuple(map(int, importlib.metadata.version(distribution).split(".")[:2]))


def run_file(path: Path) -> tuple[int, str, int]:
    """(exit status, output, tests passed) of one file in a process of its own."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", path]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    environment.pop("LIIF_FAST_BACKEND", None)
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    passed = re.search(r"(\d+) passed", result.stdout)
    return result.returncode, result.stdout[-6000:] + result.stderr[-2000:], int(passed[1]) if passed else 0


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
def test_kernels_under_the_interpreter():
    if version("triton") < (3, 7) and version("numpy") >= (2, 4):
        pytest.skip("the interpreter of Triton 3.6 does not run with NumPy 2.4 or later")
    files = sorted((ROOT / "tests" / "triton" / "interpreter").glob("test_*.py"), key=lambda path: -path.stat().st_size)
    with ThreadPoolExecutor(2) as pool:
        results = list(pool.map(run_file, files))
    for status, output, passed in results:
        assert status == 0 and passed > 0, output
    assert sum(passed for _, _, passed in results) > 350
