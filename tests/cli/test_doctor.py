"""`liif-fast doctor`: it reports everything, gives reasons, and never fails. `--check` runs every backend."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import liif_fast
from liif_fast.benchmark import check
from liif_fast.cli import doctor
from liif_fast.cli import main as cli
from liif_fast.ops import backends
from liif_fast.ops.backends import extension
from tests.helpers import needs_cpu

ROOT = Path(__file__).resolve().parents[2]


def rows(text: str) -> dict[str, str]:
    """The report's `name  value` lines; a backend's name follows its section's."""
    found, section = {}, ""
    for line in text.splitlines():
        section = section if line.startswith(" ") else line.strip()
        name, value = line[:27].strip(), line[27:].strip()
        found[f"{section} {name}" if section == "Backends" else name] = value
    return found


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
    assert f"  {'cuda':<25} cannot run: there is no GPU" in doctor.report()


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


@pytest.mark.prove
def test_without_the_extension_the_reason_is_given_and_the_exit_code_is_zero() -> None:
    script = "from liif_fast.cli import doctor; raise SystemExit(doctor.main())"
    command = [sys.executable, "-W", "ignore", "-c", script]
    environment = {**os.environ, "LIIF_FAST_EXTENSION": "/nowhere/_C.abi3.so"}
    environment.pop("LIIF_FAST_BACKEND", None)
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    found = rows(result.stdout)
    assert found["missing"] == "LIIF_FAST_EXTENSION names '/nowhere/_C.abi3.so', which is not a file"
    assert found["Backends cpu"].startswith("cannot run: ") and found["missing"] in found["Backends cpu"]
    assert found["LIIF_FAST_EXTENSION"] == "/nowhere/_C.abi3.so"


# Runs a check after a change of backend cpu: what a wrong kernel, a crash, a hang and a refusal look like.
PLANTED = """
import os, sys, time
from liif_fast.benchmark import check
from liif_fast.ops import backends
from liif_fast.ops.backends import cpu

mistake = sys.argv[1]
right = cpu.decode
def decode(inputs, save, coord_grad):
    if mistake == "crash" and save:
        os.abort()
    if mistake == "error":
        raise RuntimeError("a CUDA kernel could not be launched")
    if mistake == "hang":
        time.sleep(600)
    out, saved = right(inputs, save, coord_grad)
    return out.roll(1, 1) if mistake == "wrong" else out, saved
cpu.decode = decode
check.HIDDEN = (16, 16)
def refuse(request, raise_error=False):
    raise RuntimeError("backend 'cpu' takes another day off")
if mistake == "refuse":
    backends.BACKENDS["cpu"] = refuse
check._rates = lambda backend, device: (2e12, 4e12)
check.check("cpu", check.torch.device(sys.argv[2]))
"""
RESULTS = {
    "hang": ("hung", "stopped in float32 inference after "),  # first, when it may take the smallest share of the time
    "wrong": ("wrong", "the result of query, float32 inference is off by "),
    "crash": ("crashed", "in bfloat16 training by signal 6"),
    "error": ("crashed", "in float32 inference with exit status 1: RuntimeError: a CUDA kernel could not be launched"),
    "refuse": ("refused", "backend 'cpu' takes another day off"),
    "nothing": ("right", ""),
}


@pytest.mark.prove
@needs_cpu
def test_every_check_ends_in_a_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A backend that fails takes neither the next one nor the report with it. Mistakes have the places of backends."""
    mistakes, planted, file = list(RESULTS), tmp_path / "planted.py", tmp_path / "report.txt"
    planted.write_text(PLANTED)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("LIIF_FAST_BACKEND", "reference")  # is no reason to refuse a backend
    monkeypatch.setattr(check, "_BACKENDS", {"cpu": mistakes})
    command, found = [sys.executable, "-W", "ignore", str(planted)], check.check_all
    monkeypatch.setattr(check, "check_all", lambda places: found(["cpu"], command, seconds=90.0))
    begin = time.monotonic()
    assert cli.main(["doctor", "--check", "--output", str(file)]) == 1
    assert time.monotonic() - begin < 90
    text = capsys.readouterr().out
    lines = [line.split() for line in text.splitlines()][1:]
    for line, mistake in zip(lines, mistakes, strict=False):
        result, detail = RESULTS[mistake]
        assert line[:3] == ["cpu", mistake, result]
        assert not detail or f"cpu {mistake} {result}: {detail}" in text
    assert lines[len(mistakes) - 1][3:] == ["2", "4", "50", "%"]
    report = file.read_text()
    assert report.startswith("Versions\n") and "\nCheck\ndevice  backend" in report and str(Path.home()) not in report


def test_a_refusal_is_no_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [check.Row("cpu", "cpu", "refused", "it is too old"), check.Row("cpu", "torch", "right", "")]
    monkeypatch.setattr(check, "check_all", lambda places: rows)
    assert cli.main(["doctor", "--check", "--output", str(tmp_path / "report.txt")]) == 0
    assert "cpu cpu refused: it is too old" in capsys.readouterr().out


def test_the_check_runs_every_backend_on_every_device_within_a_minute(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    clock = [100.0]

    def run(command: list[str], backend: str, place: str, seconds: float) -> check.Row:
        clock[0] += seconds if backend in ("cpu", "cuda", "triton") else 0.0  # they hang
        return check.Row(place, backend, "hung", f"{seconds:.0f}")

    monkeypatch.setattr(check, "_run", run)
    monkeypatch.setattr(check, "monotonic", lambda: clock[0])
    rows = check.check_all(check.devices())
    expected = [("cpu", name) for name in ("cpu", "torch", "reference")]
    expected += [("cuda:0", name) for name in ("cuda", "triton", "torch", "reference")]
    assert [row[:2] for row in rows] == expected
    assert clock[0] - 100 < check.SECONDS < 60 and all(float(row.detail) > 6 for row in rows)


@needs_cpu
@pytest.mark.parametrize("name", ["cpu", "torch", "reference"])
def test_a_check_compares_every_op_and_measures_rates(
    name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(check, "HIDDEN", (16, 16))
    monkeypatch.setitem(check._TIMED, "cpu", ("float32", (8, 8), (20, 20)))
    check.check(name, torch.device("cpu"))
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    steps = [line["step"] for line in lines if "step" in line]
    for op in ("gather", "ensemble", "metasr_query", "query, float32 inference", "render, bfloat16 training"):
        assert any(op in step for step in steps), op
    assert all(line["error"] <= line["limit"] for line in lines if "error" in line)
    assert lines[-1]["decode"] > 0 and lines[-1]["product"] > 0
