"""The floor of any workload: `python -m bench.roofline [WORKLOAD ...] [--result FILE | --gemm TFLOPS --copy GBS]`.

A decode can be no faster than its multiplications at the rate of a matrix product, nor than its least traffic at the
rate of a copy. Both rates come from a saved result (--result), from the command line, or from a measurement made here.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import NamedTuple

import torch

from bench import results
from bench.workloads import WORKLOADS, Workload, folded_flop, least_bytes, original_flop
from liif_fast.benchmark import yardsticks
from liif_fast.benchmark.cuda_timing import CudaClock
from liif_fast.benchmark.timing import CpuClock, interleave
from liif_fast.benchmark.yardsticks import DTYPES

KINDS = ("decode", "size", "train", "gather", "ensemble")
_ROUNDS = 5


class Floor(NamedTuple):
    """Operations of the original and of the folded formulation, least bytes, and the seconds below which none goes."""

    original_flop: float
    folded_flop: float
    bytes: float
    compute_seconds: float
    memory_seconds: float

    @property
    def seconds(self) -> float:
        return max(self.compute_seconds, self.memory_seconds)

    @property
    def bound(self) -> str:
        return "arithmetic" if self.compute_seconds >= self.memory_seconds else "memory"


def floor(workload: Workload, dtype: str, gemm: float, copy: float) -> Floor:
    """Of a workload in `dtype`, at `gemm` operations and `copy` bytes a second."""
    multiplies = workload.kind not in ("gather", "ensemble")
    flop = folded_flop(workload) if multiplies else 0.0
    moved = least_bytes(workload, DTYPES[dtype].itemsize)
    return Floor(original_flop(workload) if multiplies else 0.0, flop, moved, flop / gemm, moved / copy)


def rates_of(result: dict, dtype: str) -> tuple[float, float]:
    """(operations, bytes) a second that a saved result measured. Raises ValueError where it holds none."""
    gemms = [
        r["gemm_flop_per_second"] for r in result["workloads"].values() if dtype in r.get("gemm_flop_per_second", {})
    ]
    copies = [r["copy_bytes_per_second"] for r in result["workloads"].values() if "copy_bytes_per_second" in r]
    if not gemms or not copies:
        raise ValueError(
            f"the result holds no {dtype} matrix product's rate, or no copy's: measure a decode and gather"
        )
    return gemms[0][dtype]["median"], copies[0]["median"]


def measured_rates(device: str, dtype: str) -> tuple[float, float]:
    """(operations, bytes) a second, measured here."""
    clock = CpuClock() if device == "cpu" else CudaClock()
    sticks = [yardsticks.gemm(clock, dtype), yardsticks.copy(clock)]
    interleave(clock, [], _ROUNDS, sticks)
    gemm, copy = (sorted(stick.rates.values())[_ROUNDS // 2] for stick in sticks)
    return gemm, copy


def _in_words(seconds: float) -> str:
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds / 1e-6:.3g} us"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.roofline", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    known = [name for name, workload in WORKLOADS.items() if workload.kind in KINDS]
    parser.add_argument("workloads", nargs="*", metavar="WORKLOAD", help=f"of {', '.join(known)}; default: all")
    parser.add_argument("--dtype", choices=("float32", "tf32", "bfloat16", "float16"), default="float32")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="to measure the rates on")
    parser.add_argument("--result", type=Path, help="take the rates from this file")
    parser.add_argument("--gemm", type=float, metavar="TFLOPS", help="10^12 operations a second")
    parser.add_argument("--copy", type=float, metavar="GBS", help="10^9 bytes a second, read and written")
    args = parser.parse_args(arguments)
    if unknown := [name for name in args.workloads if name not in known]:
        parser.error(f"{unknown[0]} is no workload with a floor: choose from {', '.join(known)}")
    if (args.gemm is None) != (args.copy is None):
        parser.error("--gemm and --copy belong together: give both or neither")
    try:
        if args.gemm is not None:
            gemm, copy = args.gemm * 1e12, args.copy * 1e9
        elif args.result:
            gemm, copy = rates_of(results.load(args.result), args.dtype)
        elif args.device == "cuda" and not torch.cuda.is_available():
            sys.exit("--device is cuda, but torch finds no GPU that it can use: give --gemm and --copy")
        else:
            gemm, copy = measured_rates(args.device, args.dtype)
    except (OSError, ValueError) as error:
        sys.exit(str(error))
    print(f"{args.dtype}: {gemm / 1e12:.4g} TFLOP/s, {copy / 1e9:.4g} GB/s, so {gemm / copy:.3g} operations a byte\n")
    print(f"{'workload':30}{'original':>14}{'folded':>14}{'traffic':>12}{'floor':>12}  bound by")
    for name in args.workloads or known:
        it = floor(WORKLOADS[name], args.dtype, gemm, copy)
        work = f"{it.original_flop / 1e9:9.4g} GFLOP{it.folded_flop / 1e9:8.4g} GFLOP"
        print(f"{name:30}{work}{it.bytes / 1e6:9.4g} MB{_in_words(it.seconds):>12}  {it.bound}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
