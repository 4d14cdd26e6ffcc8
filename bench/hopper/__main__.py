"""Builds and runs the Hopper probes (probe.cu): `python -m bench.hopper [--build-only]`.

Building needs nvcc, running a GPU of compute capability 9.0. The output is JSON: for every probe its rate, also as a
fraction of the cuBLAS rate measured before and after, and of the tensor cores' 4096 operations per clock and
multiprocessor. The exit code is 1 if the build spills registers or serializes wgmma, or if a result is wrong.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from liif_fast.benchmark.cuda_timing import CudaClock
from liif_fast.benchmark.peak_rates import gemm
from liif_fast.benchmark.timing import interleave

SOURCE = Path(__file__).resolve().parent / "probe.cu"
FLAGS = ["-std=c++17", "-O3", "-gencode", "arch=compute_90a,code=sm_90a", "-Xptxas", "-v"]
# The notes of ptxas where it serializes wgmma instructions or ignores a change of the register count.
NOTES = re.compile(r"\(C75(?:0\d|1\d)\)[^\n]*")
MAX_SPILL_BYTES = 16  # the clock, once, outside every loop
MAX_ERROR = 1e-2  # of the largest value; bf16 operands, float32 sums
FLOP_PER_BLOCK = 2.0 * 64 * 256 * 64 * 2  # the products of both warpgroups with a weight block
FLOP_PER_CLOCK = 4096.0
LIMIT_S = 120.0  # for the compiler, and for the probes


class ProbeError(Exception):
    """The probes cannot be built or run, or their results are wrong; the message is the reason."""


def build(program: Path) -> dict[str, Any]:
    """Compile the probes; returns the number of kernels and their largest spill."""
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    nvcc = shutil.which(f"{home}/bin/nvcc") or shutil.which("nvcc")
    if nvcc is None:
        raise ProbeError("nvcc is not installed: set CUDA_HOME to a CUDA toolkit")
    done = _run([nvcc, *FLAGS, "-o", str(program), str(SOURCE)])
    if done.returncode:
        raise ProbeError(f"nvcc failed: {(done.stdout + done.stderr)[-400:]}")
    return check_build(done.stdout + done.stderr)


def check_build(output: str) -> dict[str, Any]:
    """Check ptxas's output: no serialized wgmma, no spills in loops."""
    if notes := NOTES.findall(output):
        raise ProbeError(f"ptxas serializes wgmma: {notes[0][:200]}")
    spills = [int(number) for number in re.findall(r"(\d+) bytes spill stores", output)]
    if max(spills, default=0) > MAX_SPILL_BYTES:
        raise ProbeError(f"{max(spills)} bytes of registers are spilled, at most {MAX_SPILL_BYTES} are allowed")
    return {"kernels": len(spills), "largest_spill_bytes": max(spills, default=0)}


def run(program: Path) -> dict[str, Any]:
    """Run the probes between two measurements of cuBLAS."""
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0):
        raise ProbeError("the probes need a GPU of compute capability 9.0: use --build-only elsewhere")
    before = cublas_rate()
    done = _run([str(program)])
    if done.returncode:
        raise ProbeError(f"the probes ended with status {done.returncode}: {done.stderr.strip()[-300:]}")
    return check_run(json.loads(done.stdout), statistics.mean((before, cublas_rate())))


def check_run(probes: dict[str, Any], cublas: float) -> dict[str, Any]:
    """The probes' rates as fractions of cuBLAS's (in TFLOP/s) and of the clock; raises where a result is wrong."""
    rates = {name: probe for name, probe in probes.items() if isinstance(probe, dict) and "tflop_per_second" in probe}
    for name, probe in rates.items():
        if not probe["error"] <= MAX_ERROR:  # NaN is wrong too
            raise ProbeError(f"the result of {name} is wrong by {probe['error']:g} of the largest value")
        probe["of_cublas"] = round(probe["tflop_per_second"] / cublas, 4)
        probe["of_clock"] = round(FLOP_PER_BLOCK / FLOP_PER_CLOCK / probe["cycles_per_block"], 4)
    return {"probes": probes, "cublas_tflop_per_second": round(cublas, 1)}


def cublas_rate(rounds: int = 20) -> float:
    """TFLOP/s of a large bf16 matrix product; the median."""
    clock = CudaClock(graphs=False)
    rate = gemm(clock, "bfloat16")
    interleave(clock, [], rounds, [rate])
    return statistics.median(rate.rates.values()) * 1e-12


def _run(command: list[str]) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S, check=False)
    except subprocess.TimeoutExpired as error:
        raise ProbeError(f"{Path(command[0]).name} took more than {LIMIT_S:.0f} s") from error


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.hopper", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--build-only", action="store_true", help="compile the probes and check the compiler's output")
    args = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder) / "probe"
        try:
            report = build(program)
            if not args.build_only:
                report |= run(program)
        except ProbeError as error:
            sys.exit(str(error))
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
