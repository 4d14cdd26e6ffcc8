"""The check behind `liif-fast doctor --check`: every backend on every device, each in a process of its own.

A process compares small decodes and the other ops with the reference, then times a decode and a matrix product. One
that crashes or hangs becomes a row of the table. Its command is `python -m liif_fast.benchmark.check BACKEND DEVICE`.
It prints JSON objects: {"begin": step}, {"refused": reason}, {"step", "error", "limit"}, {"decode", "product"}.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from time import monotonic
from typing import Any, NamedTuple

import torch
from torch import Tensor

from liif_fast import ops
from liif_fast.benchmark import peak_rates, runs
from liif_fast.benchmark.cuda_timing import CudaClock, CudaDriver
from liif_fast.benchmark.problem import HIDDEN, OUTS, folded_flop, random_problem
from liif_fast.benchmark.timing import Clock, CpuClock
from liif_fast.ops import backends, first_use
from liif_fast.ops.limits import FIRST_USE
from liif_fast.utils import tables

COMMAND = (sys.executable, "-m", "liif_fast.benchmark.check")
SECONDS = 56.0  # for everything
_GPU_SHARE = 0.65  # of the time, where there are GPUs; they share it at the same time
_BACKENDS = {"cpu": ("cpu", "torch", "reference"), "cuda": ("cuda", "triton", "torch", "reference")}
# (dtype, training) of the paper's decoder. Few, because Triton compiles each for seconds.
_DECODES = ((torch.float32, False), (torch.float16, False), (torch.bfloat16, True))
_TIMED = {"cpu": ("float32", (32, 32), (96, 96)), "cuda": ("float16", (256, 256), (1024, 1024))}


class Row(NamedTuple):
    """One backend on one device. decode, product: measured operations per second, None where nothing was measured."""

    device: str
    backend: str
    result: str  # right, wrong, crashed, hung or refused,
    detail: str  # and why
    decode: float | None = None
    product: float | None = None


def devices() -> list[str]:
    """The CPU and every NVIDIA or AMD GPU."""
    return ["cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0))]


def check_all(places: Sequence[str], command: Sequence[str] = COMMAND, seconds: float = SECONDS) -> list[Row]:
    """The rows of all devices. The CPU comes first, alone: its rates would suffer from processes that drive GPUs.

    command: what runs one backend, with the names of the backend and of the device appended. seconds: for all rows.
    """
    begin = monotonic()
    gpus = [place for place in places if place != "cpu"]
    rows = []
    if "cpu" in places:
        rows += _check_device("cpu", command, seconds * (1 - _GPU_SHARE) if gpus else seconds)
    left = seconds - (monotonic() - begin)
    with ThreadPoolExecutor(max(len(gpus), 1)) as pool:
        for found in pool.map(lambda place: _check_device(place, command, left), gpus):
            rows += found
    return rows


def _check_device(place: str, command: Sequence[str], seconds: float) -> list[Row]:
    """The backends of a device one after the other; what one leaves of its time goes to the next ones."""
    names, end = _BACKENDS[place.split(":")[0]], monotonic() + seconds
    return [
        _run([*command, name, place], name, place, (end - monotonic()) / (len(names) - position))
        for position, name in enumerate(names)
    ]


def _run(command: list[str], backend: str, place: str, seconds: float) -> Row:
    environment = {**os.environ, "LIIF_FAST_FIRST_USE_CHECK": "0"}  # the process compares anyway
    environment.pop("LIIF_FAST_BACKEND", None)
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        child = subprocess.Popen(command, stdout=out, stderr=err, env=environment, start_new_session=True)
        try:
            code: int | None = child.wait(max(seconds, 1.0))
        except subprocess.TimeoutExpired:
            code = None
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)  # Triton's compilers too
            child.wait()
        out.seek(0)
        err.seek(0)
        lines = [json.loads(line) for line in out.read().splitlines() if line.startswith("{") and line.endswith("}")]
        last_words = (err.read().strip().splitlines() or [""])[-1][:300]
    found: dict[str, Any] = {key: value for line in lines for key, value in line.items()}
    step = found.get("begin", "the start")
    compared = [each for each in lines if "error" in each]
    wrong = [f"{each['step']} is off by {each['error']:.1e}" for each in compared if not each["error"] <= each["limit"]]
    if "refused" in found:
        return Row(place, backend, "refused", found["refused"])
    if code is None:
        return Row(place, backend, "hung", f"stopped in {step} after {seconds:.0f} s")
    if code:
        how = f"by signal {-code}" if code < 0 else f"with exit status {code}"
        return Row(place, backend, "crashed", f"in {step} {how}" + (f": {last_words}" if last_words else ""))
    result, detail = ("wrong", "; ".join(wrong)) if wrong else ("right", "")
    return Row(place, backend, result, detail, found["decode"], found["product"])


def render(rows: Sequence[Row]) -> str:
    """The table as text, and a line for each detail."""

    def rate(value: float | None) -> str:
        return "" if value is None else f"{value / 1e12:.3g}"

    def share(row: Row) -> str:
        return f"{100 * row.decode / row.product:.0f} %" if row.decode and row.product else ""

    cells = [[*row[:3], rate(row.decode), rate(row.product), share(row)] for row in rows]
    columns = ["device", "backend", "result", "decode, TFLOP/s", "matrix product, TFLOP/s", "share"]
    details = [f"{row.device} {row.backend} {row.result}: {row.detail}\n" for row in rows if row.detail]
    return tables.plain(columns, cells, "lllrrr") + "".join(details)


# ------------------------------------------------------------------------------------------------- in the other process


def _say(**fields: Any) -> None:
    print(json.dumps(fields), flush=True)


def _combination(
    backend: str, device: torch.device, dtype: torch.dtype, trains: bool, widths: tuple[int, ...]
) -> first_use.Combination:
    """The paper's decode: all switches of the first-use check on, no recomputing, no query term, no source."""
    place = backend, device.type, device.index, dtype, dtype
    return first_use.Combination(*place, (True, True, True), trains, trains, False, False, False, widths)


def _other_ops(backend: str, device: torch.device) -> Iterator[tuple[str, Callable[[str], list[Tensor]]]]:
    """(name, function from a backend's name to [result, *gradients]) of the ops apart from the decode, in float32."""
    c = _combination(backend, device, torch.float32, True, (64, OUTS))
    problem = first_use.make_problem(c, device)
    points = [t[:, :999].contiguous() for t in (problem.coord, problem.cell)]
    generator = torch.Generator().manual_seed(2)

    def random(*shape: int) -> Tensor:
        return (torch.rand(*shape, generator=generator) - 0.5).to(device)

    queries, latent = points[0].shape[1], 9 * problem.feat.shape[1]
    layers = [random(16, 3), random(latent * OUTS, 16), random(16), random(latent * OUTS)]
    blended = [random(1, queries, 4, OUTS), random(1, queries, 4).abs()]

    def with_grads(function: Callable[..., Any], tensors: list[Tensor]) -> Callable[[str], list[Tensor]]:
        def run(name: str) -> list[Tensor]:
            leaves = [tensor.detach().requires_grad_() for tensor in tensors]
            outs = function(*leaves, backend=name)
            outs = outs if isinstance(outs, tuple) else (outs,)
            total = torch.stack([(out.sin() * (1 + out.detach())).sum() for out in outs]).sum()
            return [*(out.detach() for out in outs), *torch.autograd.grad(total, leaves)]

        return run

    def metasr(feat: Tensor, coord: Tensor, cell: Tensor, *layers: Tensor, backend: str) -> Tensor:
        return ops.metasr_query(feat, coord, cell, layers[:2], layers[2:], backend=backend)

    yield "gather", with_grads(ops.gather, [problem.feat, *points])
    yield "ensemble", with_grads(ops.ensemble, blended)
    yield "metasr_query", with_grads(metasr, [problem.feat, *points, *layers])


def check(backend: str, device: torch.device) -> None:
    """Compare and time one backend, and print the lines that the module's docstring lists."""
    try:
        request = backends.OpRequest("decode", device.type, torch.float32, (*HIDDEN, OUTS), device.index)
        backends.BACKENDS[backend](request, raise_error=True)
    except RuntimeError as refusal:
        _say(refused=str(refusal))
        return
    for name, run in _other_ops(backend, device):
        _say(begin=name)
        for position, (found, expected) in enumerate(zip(run(backend), run("reference"), strict=True)):
            error = first_use.error_of("coord" if position > 1 else "result", found, expected).item()
            _say(step=f"tensor {position} of {name}", error=error, limit=FIRST_USE[torch.float32][1 if position else 0])
    for dtype, training in _DECODES:
        step = f"{str(dtype).removeprefix('torch.')} {'training' if training else 'inference'}"
        _say(begin=step)
        c = _combination(backend, device, dtype, training, (*HIDDEN, OUTS))
        for name, error, limit in first_use.compare(c, first_use.Decoders(ops.query, ops.render, ops.decode)):
            _say(step=f"{name}, {step}", error=error, limit=limit)
    _say(begin="timing")
    decode, product = _rates(backend, device)
    _say(decode=decode, product=product)


def _rates(backend: str, device: torch.device) -> tuple[float, float]:
    """Operations per second of a decode by the folded formulation's count, and of a large matrix product."""
    clock: Clock = CpuClock() if device.type == "cpu" else CudaClock(CudaDriver(device.index or 0), graphs=False)
    dtype, map_size, size = _TIMED[device.type]
    problem = random_problem(map_size, out_size=size, device=device)
    decode = runs.fused_decode(problem, dtype, size, backend)
    work = folded_flop(size[0] * size[1], map_size[0] * map_size[1])
    product = peak_rates.gemm(clock, dtype)
    decode()
    times = [(clock.once(decode), clock.once(product.candidate.run)) for _ in range(3)]
    return work / min(time for time, _ in times), product.work / min(time for _, time in times)


if __name__ == "__main__":
    check(sys.argv[1], torch.device(sys.argv[2]))
