"""The Hopper kernel in the first minutes of a GPU: 20 decodes and their gradients against float64, rates, sanitizers.

`python -m tests.gpu.hopper` prints JSON. It ends with status 1 where a decode is wrong or the kernel does not run.
"""

from __future__ import annotations

import json
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch

from liif_fast import ops
from liif_fast.benchmark.cuda_timing import CudaClock
from liif_fast.benchmark.peak_rates import gemm
from liif_fast.benchmark.problem import random_problem
from liif_fast.benchmark.runs import Run, original_training, training
from liif_fast.benchmark.timing import Candidate, Clock, PeakRate, interleave
from liif_fast.ops import backends, first_use
from tests.backends import KINDS, TABLE, Backend, Kind
from tests.gpu import sanitizer
from tests.helpers import Case
from tests.ops.decoding import decode, gradients, make_problem
from tests.ops.tolerances import check_decode

PAPER, ROUNDS, SANITIZER_S = (256, 256, 256, 256), 20, 40
LOGGED = ("clocks.sm", "power.draw", "temperature.gpu")  # by nvidia-smi
BACKEND = TABLE["hopper-emulated"]._replace(device="cuda", most_queries=1 << 20)
# Tiles: none whole, one, several for every block of a cluster. Layers, outputs, corners, maps, batches.
SHAPES = (
    Case(channels=8, queries=1, hidden=PAPER),
    Case(channels=8, height=24, width=24, queries=9216, hidden=PAPER),
    Case(2, 64, 48, 37, 40_001, PAPER),
    Case(2, 16, 33, 20, 5000, (128,) * 7, 5, local_ensemble=False),
    Case(3, 16, 20, 33, 3333, PAPER, 2, cell_decode=False),
    Case(1, 16, 31, 31, 20_000, (256, 256), 16),
    Case(2, 16, 17, 9, 700, (64, 256, 256), 3),
    Case(1, 16, 17, 9, 20_000, (256,) * 9, 3, local_ensemble=False),
    Case(1, 3, 1, 1, 129, (160, 144, 192), 3, feat_unfold=False),
    Case(1, 8, 40, 40, 60_000, (128, 16, 96, 128), 3),
)
CASES = [(KINDS[3 + i % 2], case, mode) for i, case in enumerate(SHAPES) for mode in ("points", "grid")]


def check(backend: Backend, cases: Sequence[tuple[Kind, Case, str]] = CASES) -> list[str]:
    """What is wrong with which case, one sentence each."""
    wrong = []
    for kind, case, mode in cases:
        try:
            check_decode(backend, kind, case, mode)
        except (AssertionError, RuntimeError) as error:
            wrong.append(f"{kind.name}, {mode}, {case}: {' '.join(str(error).split())[:200]}")
    return wrong


def run_sanitized(device: str = "cuda", case: Case = SHAPES[1]) -> None:
    """Decodes of several tiles for every block and their gradients, for racecheck and synccheck."""
    for hidden in (case.hidden, (128, 128)):
        problem = make_problem(case._replace(hidden=hidden), KINDS[3], "fixed", device)
        with torch.no_grad():
            decode(problem, "cuda")
        gradients(decode(problem, "cuda"), problem.leaves)
    if device == "cuda":
        torch.cuda.synchronize()
    print(sanitizer.FINISHED, flush=True)


def watch(run: Callable[[], Any], seconds: float = 0.5) -> dict[str, float]:
    """Medians of clock (MHz), power (W) and temperature while `run` is repeated, and the lowest clock; {} where
    nvidia-smi cannot log them."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return {}
    device = f"--id=GPU-{torch.cuda.get_device_properties(0).uuid}"
    command = [program, device, f"--query-gpu={','.join(LOGGED)}", "--format=csv,noheader,nounits", "-lms", "20"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as log:
        assert log.stdout is not None
        log.stdout.readline()  # it has begun
        begin = time.monotonic()
        while time.monotonic() - begin < seconds:
            for _ in range(10):
                run()
            torch.cuda.synchronize()
        log.terminate()
        lines = [line.split(",") for line in log.stdout.read().splitlines()]
    numbers = [[float(cell) for cell in line] for line in lines if len(line) == len(LOGGED) and "[" not in line[0]]
    if not numbers:
        return {}
    columns = list(zip(*numbers, strict=True))
    found = {name: statistics.median(column) for name, column in zip(LOGGED, columns, strict=True)}
    return {**found, "lowest clocks.sm": min(columns[0]), "samples": len(numbers)}


def time_in_turns(clock: Clock, runs: Mapping[str, Run]) -> tuple[list[Candidate], PeakRate, float]:
    """The runs, and cuBLAS in the same rounds with its rate in TFLOP/s."""
    candidates = [Candidate(name, run) for name, run in runs.items()]
    for candidate in candidates:
        clock.warm_up(candidate)
    cublas = gemm(clock, "bfloat16")
    interleave(clock, candidates, ROUNDS, [cublas])
    for candidate in candidates:
        if candidate.error:
            raise RuntimeError(f"{candidate.name}: {candidate.error}")
        candidate.seconds = statistics.median(candidate.samples.values())
    return candidates, cublas, statistics.median(cublas.rates.values()) * 1e-12


def training_rate(clock: Clock, batch: int = 16, side: int = 48) -> dict[str, Any]:
    """Of the paper's training step of the decoder, next to the original in PyTorch with autocast; both in bfloat16."""
    problem = random_problem((side, side), queries=side**2, batch=batch, device=clock.device)
    runs = {
        "step": training(problem, "bfloat16", query=partial(ops.query, backend="cuda")),
        "original": original_training(problem, "bfloat16"),
    }
    (step, plain), _, library = time_in_turns(clock, runs)
    reached = 3 * 2.0 * batch * side**2 * 4 * 3 * 256**2 / step.seconds * 1e-12  # forward, gradients of both operands
    return {
        "step_milliseconds": round(step.seconds * 1e3, 4),
        "original_milliseconds": round(plain.seconds * 1e3, 4),
        "speedup": round(plain.seconds / step.seconds, 2),
        "tflop_per_second": round(reached, 1),
        "cublas_tflop_per_second": round(library, 1),
        "of_cublas": round(reached / library, 4),
        "target": {"step_milliseconds": 0.62, "speedup": 5},
    }


def rate(clock: Clock) -> dict[str, Any]:
    """Of 1024x1024 pixels from a 256x256 map, in bfloat16: the decode alone, the products of hidden layers counted."""
    device, size = clock.device, (1024, 1024)
    feat, _, _, weights, biases = random_problem((256, 256), out_size=size, device=device).to(torch.bfloat16)
    with torch.no_grad():
        latent_map = ops.fold(feat, weights[0])

    def run() -> torch.Tensor:
        with torch.no_grad():
            return ops.render(feat, size, weights, biases, latent_map=latent_map, backend="cuda")

    (candidate,), cublas, library = time_in_turns(clock, {"decode": run})
    reached = 2.0 * size[0] * size[1] * 4 * 3 * 256**2 / candidate.seconds * 1e-12
    return {
        "milliseconds": round(candidate.seconds * 1e3, 4),
        "tflop_per_second": round(reached, 1),
        "cublas_tflop_per_second": round(library, 1),
        "of_cublas": round(reached / library, 4),
        "repeated": watch(candidate.run),
        "cublas_repeated": watch(cublas.candidate.run),
    }


def main() -> None:
    first_use.ENABLED = False  # the cases are the check
    if sys.argv[1:] == ["--sanitized"]:
        run_sanitized()
        return
    if reason := backends.against_hopper(backends.OpRequest("decode", "cuda", torch.bfloat16, (*PAPER, 3))):
        sys.exit(reason)
    wrong = check(BACKEND)
    clock = CudaClock()
    rates = {} if wrong else {"inference": rate(clock), "training": training_rate(clock)}
    print(json.dumps({"cases": len(CASES), "wrong": wrong, **rates}, indent=1), flush=True)
    for tool in () if wrong or sanitizer.find() is None else ("racecheck", "synccheck"):
        reasons, summary = sanitizer.run(tool, ["tests.gpu.hopper", "--sanitized"], SANITIZER_S)
        print(json.dumps({tool: summary, "wrong": reasons}, indent=1), flush=True)
        wrong += reasons
    if wrong:
        sys.exit(1)


if __name__ == "__main__":
    main()
