"""Triton's kernels as it compiles them, without a GPU: registers, shared memory, stack, tensor cores, rounding."""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "tests" / "triton" / "aot" / "compile_all.py"
BUDGET = json.loads((ROOT / "tests" / "triton" / "budget.json").read_text())
ARCHS = (80, 86, 90, 100)
SHARED_LIMIT = {80: 163 << 10, 86: 99 << 10, 90: 227 << 10, 100: 227 << 10}
# Kernels whose only products and sums are geometry, which must not contract.
GEOMETRY_ONLY = ("gather_forward_kernel", "latent_kernel")

VERSION = importlib.metadata.version("triton") if importlib.util.find_spec("triton") else ""
pytestmark = [pytest.mark.prove, pytest.mark.skipif(not VERSION, reason="Triton is not installed")]
budgeted = pytest.mark.skipif(
    not VERSION.startswith("3.7."), reason=f"budgets of registers and stack are for Triton 3.7, this is {VERSION}"
)


@cache
def compile_all(arch: int) -> list[dict]:
    """The script's report; cached in build/ until its sources or Triton change."""
    digest = hashlib.sha256(f"{arch} {importlib.metadata.version('triton')}".encode())
    for path in (SCRIPT, *sorted((ROOT / "liif_fast" / "ops" / "backends" / "triton").glob("*.py"))):
        digest.update(path.name.encode() + path.read_bytes())
    cached = ROOT / "build" / "triton_reports" / f"{arch}-{digest.hexdigest()[:16]}.json"
    if not cached.exists():
        environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
        result = subprocess.run([sys.executable, SCRIPT, str(arch)], capture_output=True, text=True, env=environment)
        assert result.returncode == 0, result.stderr[-4000:]
        cached.parent.mkdir(parents=True, exist_ok=True)
        cached.write_text(result.stdout.splitlines()[-1])
    return json.loads(cached.read_text())


def kernels(arch: int) -> Iterator[tuple[str, dict]]:
    for kernel in compile_all(arch):
        yield kernel["kernel"] + (f"/{kernel['variant']}" if kernel["variant"] else ""), kernel


def test_every_kernel_compiles_and_has_a_budget():
    """Compute capability 9.0 has every variant."""
    written = {
        line.split("(")[0].removeprefix("def ")
        for path in (ROOT / "liif_fast" / "ops" / "backends" / "triton").glob("*.py")
        for line in path.read_text().splitlines()
        if line.startswith("def ") and line.split("(")[0].endswith("_kernel")
    }
    assert {kernel["kernel"] for _, kernel in kernels(90)} == written
    assert {name for name, _ in kernels(90)} == set(BUDGET)


@budgeted
@pytest.mark.parametrize("arch", ARCHS)
def test_kernels_stay_within_their_budgets(arch):
    over = {
        name: (resource, kernel[resource], BUDGET[name][resource])
        for name, kernel in kernels(arch)
        for resource in ("registers", "shared", "stack")
        if kernel[resource] > BUDGET[name][resource]
    }
    assert not over


@pytest.mark.parametrize("arch", ARCHS)
def test_kernels_fit_the_shared_memory(arch):
    needed = {name: kernel["shared"] for name, kernel in kernels(arch)}
    assert needed and max(needed.values()) <= SHARED_LIMIT[arch]


def fused_decodes(arch: int) -> list[tuple[str, dict]]:
    return [(name, kernel) for name, kernel in kernels(arch) if name.startswith("fused_decode_")]


def test_the_decode_uses_hoppers_tensor_cores():
    hgmma = [kernel["hgmma"] for name, kernel in fused_decodes(90) if not name.endswith("ieee")]
    assert len(hgmma) >= 8 and min(hgmma) > 0


@pytest.mark.parametrize("arch", ARCHS)
def test_float32_multiplies_in_the_chosen_precision(arch):
    tf32 = [kernel for name, kernel in fused_decodes(arch) if name.endswith("tf32")]
    ieee = [kernel for name, kernel in fused_decodes(arch) if name.endswith("ieee")]
    others = [kernel for name, kernel in fused_decodes(arch) if not name.endswith(("tf32", "ieee"))]
    assert len(tf32) == 3 and all(kernel["tensor"] == kernel["tf32"] > 0 for kernel in tf32)
    assert len(ieee) == 3 and all(kernel["tensor"] == 0 and kernel["fma"] > 0 for kernel in ieee)
    assert len(others) >= 3 and all(kernel["tensor"] > 0 and kernel["tf32"] == 0 for kernel in others)


@budgeted
@pytest.mark.parametrize("arch", ARCHS)
def test_the_decode_spills_nothing(arch):
    stack = {name: kernel["stack"] for name, kernel in fused_decodes(arch)}
    assert {
        f"fused_decode_forward_kernel/{variant}"
        for variant in ("grid", "grid-tf32", "grid-ieee", "save", "save-tf32", "save-ieee", "save-padded")
    } <= set(stack)
    assert not any(stack.values())


@pytest.mark.parametrize("arch", [arch for arch in ARCHS if arch != 86])
def test_geometry_does_not_contract_to_fused_multiply_adds(arch):
    seen = {kernel["kernel"]: kernel["fma"] for _, kernel in kernels(arch) if kernel["kernel"] in GEOMETRY_ONLY}
    assert seen == dict.fromkeys(GEOMETRY_ONLY, 0)
    assert any(kernel["fma"] for _, kernel in kernels(arch))  # others do contain them
