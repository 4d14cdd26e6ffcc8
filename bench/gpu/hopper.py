"""The measurements that decide the Hopper kernel's design (bench/hopper/probe.cu): built where nvcc is, run on sm_90.

`python -m bench.gpu.hopper build --folder DIR --report FILE`, then `run`. Each rate also stands as a fraction of what
cuBLAS gives before and after in the same step, and of the tensor cores' 4096 operations a clock and multiprocessor.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import statistics
import subprocess
from pathlib import Path
from typing import Any

from bench.gpu.check import CRASHED, FAILED, PASSED, SKIPPED

SOURCE = Path(__file__).resolve().parents[1] / "hopper" / "probe.cu"
PROGRAM = "probe"
FLAGS = ["-std=c++17", "-O3", "-gencode", "arch=compute_90a,code=sm_90a", "-Xptxas", "-v"]
# ptxas says these where it makes wgmma wait for each other, or ignores a hand-over of registers.
NOTES = re.compile(r"\(C75(?:0\d|1\d)\)[^\n]*")
SPILL_BYTES = 16  # the clock, once, outside every loop
ERROR = 1e-2  # of the largest value; bf16 operands, float32 sums
FLOP_PER_BLOCK = 2.0 * 64 * 256 * 64 * 2  # both warpgroups' products with a weight block
FLOP_PER_CLOCK = 4096.0
GEMM_SIZE = 8192


def find_nvcc() -> str | None:
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")]
    candidates = [f"{home}/bin/nvcc" for home in homes if home] + ["nvcc", "/usr/local/cuda/bin/nvcc"]
    return next((path for path in map(shutil.which, candidates) if path), None)


def build(folder: Path, seconds: float) -> dict[str, Any]:
    """Compile the probes; failed where ptxas serialises wgmma or spills."""
    nvcc = find_nvcc()
    if nvcc is None:
        return {"status": SKIPPED, "note": "nvcc is not installed here"}
    command = [nvcc, *FLAGS, "-o", str(folder / PROGRAM), str(SOURCE)]
    try:
        made = subprocess.run(command, capture_output=True, text=True, timeout=seconds, check=False)
    except subprocess.TimeoutExpired:
        return {"status": FAILED, "note": f"nvcc took more than {seconds:.0f} s"}
    said = made.stdout + made.stderr
    if made.returncode:
        return {"status": FAILED, "note": f"nvcc failed: {said[-400:]}"}
    return judge_build(said)


def judge_build(said: str) -> dict[str, Any]:
    """What ptxas says of the probes: no note about serialised wgmma, no spills in the loops."""
    notes = sorted(set(NOTES.findall(said)))
    spills = [int(number) for number in re.findall(r"(\d+) bytes spill stores", said)]
    record = {"notes": notes, "kernels": len(spills), "largest_spill_bytes": max(spills, default=0)}
    if notes:
        return {"status": FAILED, "note": notes[0][:200], **record}
    if max(spills, default=0) > SPILL_BYTES:
        return {"status": FAILED, "note": f"{max(spills)} bytes of registers are spilled", **record}
    return {"status": PASSED, "note": f"{len(spills)} kernels, no serialised wgmma", **record}


def run(folder: Path, seconds: float) -> dict[str, Any]:
    """Run the probes between two measurements of cuBLAS."""
    import torch

    if not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0):
        return {"status": SKIPPED, "note": "the probes need a GPU of compute capability 9.0"}
    if not (folder / PROGRAM).is_file():
        return {"status": SKIPPED, "note": "the probes are not built"}
    before = cublas_rate()
    try:
        done = subprocess.run(
            [str(folder / PROGRAM)], capture_output=True, text=True, timeout=max(1.0, seconds - 8), check=False
        )
    except subprocess.TimeoutExpired as late:
        return {"status": CRASHED, "note": "the probes did not end in time", "output": str(late.stdout or "")[-2000:]}
    after = cublas_rate()
    if done.returncode:
        return {
            "status": CRASHED,
            "note": f"status {done.returncode}: {done.stderr.strip()[-300:]}",
            "output": done.stdout,
        }
    return judge_run(json.loads(done.stdout), statistics.mean((before, after)))


def judge_run(probes: dict[str, Any], cublas: float) -> dict[str, Any]:
    """Rates beside cuBLAS's (TFLOP/s); failed where a probe's result is wrong."""
    wrong = []
    for name, probe in probes.items():
        if not isinstance(probe, dict):
            continue
        if "tflop_per_second" in probe:
            probe["of_cublas"] = round(probe["tflop_per_second"] / cublas, 4)
            probe["of_clock"] = round(FLOP_PER_BLOCK / FLOP_PER_CLOCK / probe["cycles_per_block"], 4)
            if not probe["error"] <= ERROR:
                wrong.append(f"{name} is wrong by {probe['error']:g}")
    rate = probes.get("both_multicast", {}).get("of_cublas", 0.0)
    note = f"wgmma with multicast at {rate:.0%} of cuBLAS bf16 ({cublas:.0f} TFLOP/s)"
    record = {"probes": probes, "cublas_tflop_per_second": round(cublas, 1)}
    if wrong:
        return {"status": FAILED, "note": "; ".join(wrong), **record}
    return {"status": PASSED, "note": note, **record}


def cublas_rate(repetitions: int = 20) -> float:
    """TFLOP/s of a large bf16 product of random numbers; the median."""
    import torch

    a, b = (torch.randn(GEMM_SIZE, GEMM_SIZE, device="cuda").bfloat16() for _ in range(2))
    out = torch.empty_like(a)
    times = []
    for repetition in range(repetitions + 5):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        torch.matmul(a, b, out=out)
        end.record()
        end.synchronize()
        if repetition >= 5:
            times.append(begin.elapsed_time(end) * 1e-3)
    return 2.0 * GEMM_SIZE**3 / statistics.median(times) * 1e-12


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("verb", choices=("build", "run"))
    parser.add_argument("--folder", type=Path, required=True, help="where the program is or will be")
    parser.add_argument("--report", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=120.0)
    args = parser.parse_args()
    verb = build if args.verb == "build" else run
    args.report.write_text(json.dumps(verb(args.folder, args.seconds)))


if __name__ == "__main__":
    main()
