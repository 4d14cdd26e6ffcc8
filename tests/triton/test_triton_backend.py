"""When the triton backend runs, the reasons it gives where it cannot, and when the package imports Triton."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from liif_fast.ops import backends
from tests.helpers import reason_against

ROOT = Path(__file__).resolve().parents[2]


def spec_of(path):
    return lambda _name: importlib.machinery.ModuleSpec("triton", None, origin=str(path))


@pytest.mark.parametrize(
    ("version", "reason"),
    [("3.6.0", ""), ("3.7.1+git", ""), ("4.0", ""), ("3.5.1", "this is 3.5.1: upgrade"), ("2.3.1", "this is 2.3.1")],
)
def test_an_old_triton_is_named(tmp_path, monkeypatch, version, reason):
    (tmp_path / "__init__.py").write_text(f'"""isort:skip_file"""\n__version__ = {version!r}\n')
    monkeypatch.setattr(importlib.util, "find_spec", spec_of(tmp_path / "__init__.py"))
    found = backends._find_triton()
    assert reason in found and bool(found) == bool(reason)


def test_a_missing_triton_is_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda _name: None)
    monkeypatch.setattr(backends, "_TRITON_PROBLEM", backends._find_triton())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert "needs Triton >= 3.6, which is not installed" in reason_against("triton", "decode", torch.float32, "cuda")


@pytest.mark.parametrize("op", ["gather", "ensemble", "decode", "metasr_query"])
def test_gpus_of_every_vendor_are_taken(op, monkeypatch):
    monkeypatch.setattr(backends, "_TRITON_PROBLEM", "")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.xpu, "is_available", lambda: True)
    monkeypatch.setattr(torch.version, "cuda", None)  # as on AMD
    for device in ("cuda", "xpu"):
        for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
            assert reason_against("triton", op, dtype, device) == ""
        assert "takes float64, float32, bfloat16 or float16" in reason_against("triton", op, torch.int32, device)
    for device in ("cpu", "mps", "meta"):
        assert f"takes tensors on a GPU, these are on '{device}'" in reason_against("triton", op, torch.float32, device)


def test_an_old_gpu_and_a_missing_one_are_named(monkeypatch):
    monkeypatch.setattr(backends, "_TRITON_PROBLEM", "")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.xpu, "is_available", lambda: False)
    for device in ("cuda", "xpu"):
        assert "needs a GPU, and torch finds none" in reason_against("triton", "decode", torch.float32, device)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _index: (7, 5))
    assert "8.0 (Ampere) or newer, this one has 7.5" in reason_against("triton", "decode", torch.float32, "cuda")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _index: (8, 0))
    assert reason_against("triton", "decode", torch.float32, "cuda") == ""


def test_triton_comes_after_cuda_in_the_table():
    names = list(backends.BACKENDS)
    assert names.index("triton") == names.index("cuda") + 1
    assert [name for name, _, _ in backends.report()] == names


@pytest.mark.prove
def test_nothing_imports_our_kernels_or_the_compiler_before_an_op_needs_them():
    """torch may import Triton and its compiler itself; this package must not: they take seconds."""
    code = (
        "import sys, torch; slow = {'triton', 'torch._dynamo'} - set(sys.modules); import liif_fast.cli.doctor;"
        "liif_fast.ops.gather(torch.rand(1, 2, 3, 4).requires_grad_(), torch.zeros(1, 5, 2))[0].sum().backward();"
        "assert not slow & set(sys.modules), slow & set(sys.modules);"
        "assert not any(name.startswith('liif_fast.ops.backends.triton') for name in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_geometry_has_the_functions_of_the_other_backends():
    source = (ROOT / "csrc" / "geometry.h").read_text()
    functions = set(re.findall(r"^LIIF_HOST_DEVICE \S+ (\w+)\(", source, re.M))
    functions -= {"add_rounded", "mul_rounded"}  # an option of every launch: triton/launch.py
    mirrored = set(re.findall(r"^def (\w+)\(", (ROOT / "liif_fast/ops/backends/triton/geometry.py").read_text(), re.M))
    assert {"pixel_center", "find_neighbor", "area_weights"} < functions <= mirrored
