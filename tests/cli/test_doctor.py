"""`liif-fast doctor`: it reports everything, gives reasons, and never fails."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import liif_fast
from liif_fast.cli import doctor
from liif_fast.ops import backends
from liif_fast.ops.backends import extension

ROOT = Path(__file__).resolve().parents[2]


def rows(text: str) -> dict[str, str]:
    """The report's `name  value` lines. `cpu` is both a device and a backend; the backend's line replaces the first."""
    lines = [line.strip() for line in text.splitlines() if line.startswith("  ")]
    return {line[:20].strip(): line[20:].strip() for line in lines}


def test_report_names_versions_devices_and_environment(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LIIF_FAST_BACKEND", "reference")
    assert doctor.main() == 0
    found = rows(capsys.readouterr().out)
    assert found["liif_fast"] == liif_fast.__version__
    assert found["torch"].startswith(torch.__version__)
    assert found["python"].startswith(".".join(map(str, sys.version_info[:3])))
    assert found["threads"].startswith(f"{torch.get_num_threads()} of ")
    assert found["cpu"] and found["numpy"] and found["triton"]
    assert found["LIIF_FAST_BACKEND"] == "reference"


def test_every_backend_runs_or_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    text = doctor.report().split("Backends\n")[1].split("Environment")[0]
    for name, runs, reason in backends.report():
        line = next(line for line in text.splitlines() if line.split()[0] == name)
        assert line.endswith("  runs") if runs else line.endswith(f"cannot run: {reason}")
    monkeypatch.setattr(backends, "report", lambda: [("cuda", False, "there is no GPU")])
    assert "  cuda                 cannot run: there is no GPU" in doctor.report()


def test_gpus_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = SimpleNamespace(name="Some GPU", major=9, minor=0, total_memory=80 * 2**30)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: gpu)
    found = rows(doctor.report())
    assert found["cuda:0"] == found["cuda:1"] == "Some GPU, sm_90, 80 GiB"


def test_build_facts_are_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    facts = {"compiler": "g++ 12", "torch": "2.13.0", "cuda": "13.0", "cuda_archs": ["80", "90a"], "cuda_ptx": ["80"]}
    monkeypatch.setattr(extension, "is_available", lambda: True)
    monkeypatch.setattr(extension, "build_facts", lambda: facts)
    assert rows(doctor.report())["CUDA toolkit"] == "13.0, for architectures 80, 90a, with PTX for 80"
    monkeypatch.setattr(extension, "build_facts", lambda: {**facts, "cuda": None, "why_no_cuda": "no nvcc was found"})
    assert rows(doctor.report())["CUDA toolkit"] == "none (no nvcc was found)"


def test_without_the_extension_the_reason_is_given_and_the_exit_code_is_zero() -> None:
    script = "from liif_fast.cli import doctor; raise SystemExit(doctor.main())"
    command = [sys.executable, "-W", "ignore", "-c", script]
    environment = {**os.environ, "LIIF_FAST_EXTENSION": "/nowhere/_C.abi3.so"}
    environment.pop("LIIF_FAST_BACKEND", None)
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    found = rows(result.stdout)
    assert found["missing"] == "LIIF_FAST_EXTENSION names '/nowhere/_C.abi3.so', which is not a file"
    assert found["cpu"].startswith("cannot run: ") and found["missing"] in found["cpu"]
    assert found["LIIF_FAST_EXTENSION"] == "/nowhere/_C.abi3.so"
