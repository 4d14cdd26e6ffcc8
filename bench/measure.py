"""One workload's record: every method prepared, judged against float64, then timed in turns with the others."""

from __future__ import annotations

import contextlib
import math
import signal
import sys
from collections.abc import Callable, Iterator, Mapping
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from bench import machine, sizes
from bench.method import Job, Method, forget_compiled
from bench.methods import exact, methods_for
from bench.targets import CREDIBLE_FRACTION
from bench.workloads import Workload, folded_flop, least_bytes, make_problem, original_flop
from liif_fast.benchmark import yardsticks
from liif_fast.benchmark.timing import (
    Clock,
    Contender,
    Yardstick,
    failure,
    interleave,
    make_ready,
    pair_ratios,
    summary,
)
from liif_fast.benchmark.yardsticks import DTYPES

PREPARE_LIMIT_S = 150.0  # torch.compile may not take longer
_LEAST_S = 10.0  # given to whatever is begun
GPU_ROUNDS = 100
_PREPARING = 0.6  # of the time that is left, at most so much goes into preparing one workload's methods
# Against these every method's ratio is kept, round by round, beside the one against the original.
RIVALS = ("original-fp16", "original-bf16", "original-tf32", "folded-compiled-bf16", "folded-compiled-fp32")
_MULTIPLIES = ("decode", "train")

Tell = Callable[[str], None]


class TooSlow(Exception):
    """Preparing a method took longer than it may."""


@contextlib.contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise TooSlow inside the block after so many seconds."""

    def stop(signum: int, frame: Any) -> None:
        raise TooSlow(f"preparing it took more than {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def note(text: str) -> None:
    """Progress, on stderr."""
    print(text, file=sys.stderr, flush=True)


def measure(
    workload: Workload,
    clock: Clock,
    *,
    quick: bool = False,
    rounds: int | None = None,
    deadline: float | None = None,
    only: set[str] | None = None,
    lost: Mapping[str, str] | None = None,
    tell: Tell = lambda name: None,
) -> dict[str, Any]:
    """Everything about one workload that goes into a result file.

    Args:
        quick: only the methods the project's promises are about.
        rounds: samples of each method; None: the workload's own on a CPU, up to 100 on a GPU.
        deadline: of `perf_counter`; what is not begun by then is skipped.
        only: names of the methods wanted; None is all.
        lost: methods that broke the process before, with the reason; they are not tried again.
        tell: called with the name of the method about to run ('' at the end), for whoever watches this process.
    """
    note(f"{workload.name}: {workload.about}")
    device = clock.device.type
    record: dict[str, Any] = {"about": workload.about, "kind": workload.kind, "queries": workload.total_queries}
    entries: dict[str, dict[str, Any]] = {}
    methods = [m for m in methods_for(workload, device, quick=quick) if only is None or m.name in only]
    for method in methods:
        entries[method.name] = entry = {"label": method.label, "dtype": method.dtype, "status": "ok"}
        if method.refusal:
            entry.update(status="refused", reason=method.refusal)
        elif lost and method.name in lost:
            entry.update(sizes.failed(lost[method.name]))
    pending = [method for method in methods if entries[method.name]["status"] == "ok"]
    if workload.kind == "size":
        _measure_sizes(workload, clock, pending, entries, deadline, tell)
    else:
        _measure_times(workload, clock, pending, entries, record, rounds, deadline, tell)
    tell("")
    record["methods"] = entries
    record["warnings"] = doubts(record)
    for doubt in record["warnings"]:
        note(f"  {doubt}")
    return record


def _measure_sizes(
    workload: Workload,
    clock: Clock,
    methods: list[Method],
    entries: dict[str, dict[str, Any]],
    deadline: float | None,
    tell: Tell,
) -> None:
    for method in methods:
        entry = entries[method.name]
        entry["allowed_bytes"] = sizes.allowance(workload, DTYPES[method.dtype].itemsize)
        tell(method.name)
        limit = math.inf if deadline is None else max(_LEAST_S, deadline - perf_counter())
        entry.update(_over(deadline) or sizes.measure(method, workload, clock, limit))
        _tell(method, entry)


def _measure_times(
    workload: Workload,
    clock: Clock,
    methods: list[Method],
    entries: dict[str, dict[str, Any]],
    record: dict[str, Any],
    rounds: int | None,
    deadline: float | None,
    tell: Tell,
) -> None:
    forget_compiled()
    now = perf_counter()
    prepared_by = None if deadline is None else now + _PREPARING * (deadline - now)
    problem = make_problem(workload, clock.device)
    truth = _flat(exact(workload, problem, clock))
    contenders = {}
    for method in sorted(methods, key=lambda method: method.late):
        tell(method.name)
        entry = entries[method.name]
        if over := _over(prepared_by):
            entry.update(over)
            continue
        limit = PREPARE_LIMIT_S if deadline is None else min(PREPARE_LIMIT_S, max(_LEAST_S, deadline - perf_counter()))
        contender = _prepare(Job(workload, problem, clock), method, entry, truth, limit)
        if contender:
            contenders[method.name] = contender
    del truth
    sticks: list[Yardstick] = []
    if workload.kind in _MULTIPLIES:
        sticks = yardsticks.matrix_rates(clock)
    elif workload.kind in ("gather", "ensemble"):
        sticks = [yardsticks.copy(clock)]
    gpu = clock.device.type == "cuda"
    wanted = rounds or (GPU_ROUNDS if gpu else workload.rounds)
    ordered = [contenders[method.name] for method in methods if method.name in contenders]
    until = [deadline] if deadline is not None else []
    if gpu:
        until.append(perf_counter() + workload.limit_s)
    tell("all in turns")
    record["rounds"] = interleave(clock, ordered, wanted, sticks, deadline=min(until, default=None))
    rates = {stick.name: stick.rates for stick in sticks if stick.rates}
    for kind, key in (("loop", "loop_flop_per_second"), ("gemm", "gemm_flop_per_second")):
        found = {name.split()[1]: summary(rate) for name, rate in rates.items() if name.startswith(kind)}
        if found:
            record[key] = found
    if "copy" in rates:
        record["copy_bytes_per_second"] = summary(rates["copy"])
    for method in methods:
        if method.name in contenders:
            _add_times(entries[method.name], workload, method, contenders, rates)
            _tell(method, entries[method.name])


def _over(until: float | None) -> dict[str, Any] | None:
    """The entry of a method that there is no time left for."""
    if until is None or perf_counter() <= until:
        return None
    return {"status": "skipped", "reason": "the time given to this run was used up"}


def _prepare(job: Job, method: Method, entry: dict[str, Any], truth: Tensor | None, limit_s: float) -> Contender | None:
    try:
        with time_limit(limit_s):
            run, remark = method.prepare(job)
            result = _flat(run())
            if truth is not None and result is not None:
                entry.update(_accuracy(job.workload, result, truth))
            del result
            contender = Contender(method.name, run)
            entry["peak_bytes"] = make_ready(job.clock, contender)
    except Exception as error:  # whatever stops a method is its result, with the reason
        if job.clock.is_broken():
            raise
        entry.update(sizes.failed(failure(error)))
        entry.pop("peak_bytes", None)
        note(f"  {method.name:24}{entry['reason']}")
        return None
    if remark:
        entry["note"] = remark
    if contender.captured:
        entry["captured"] = True
    return contender


def doubts(record: dict[str, Any]) -> list[str]:
    """Reasons not to believe a record: a yardstick's rate has to be steady, and above every method's."""
    found = []
    if any(map(machine.was_shared, record.get("loop_flop_per_second", {}).values())):
        found.append(machine.SHARED)
    fractions = [
        entry["fraction_of_loop"]["median"] for entry in record["methods"].values() if "fraction_of_loop" in entry
    ]
    if max(fractions, default=0.0) > CREDIBLE_FRACTION:
        found.append(
            "A method outran the multiply-add loop, so that its rate is no peak: do not rely on fractions of it."
        )
    return found


def _flat(result: Any) -> Tensor | None:
    """A result as float64 numbers in one row, images in the order of their queries [B, Q, O]."""
    if result is None:
        return None
    if isinstance(result, list):
        return torch.cat([part.double().flatten() for part in result])
    if result.dim() == 4 and result.shape[1] == 3:
        result = result.flatten(2).transpose(1, 2)
    return result.detach().double().flatten()


def _accuracy(workload: Workload, result: Tensor, truth: Tensor) -> dict[str, float]:
    """PSNR with the largest true value as peak; for gradients the norm of the error, relative."""
    difference = result - truth
    if workload.passes != "forward":
        return {"gradient_error": float(f"{(difference.norm() / truth.norm()).item():.2g}")}
    mse = difference.square().mean().item()
    if mse == 0:
        return {}  # exact
    return {"psnr_db": round((10 * torch.log10(truth.abs().max() ** 2 / mse)).item(), 1)}


def _add_times(
    entry: dict[str, Any],
    workload: Workload,
    method: Method,
    contenders: dict[str, Contender],
    rates: dict[str, dict[int, float]],
) -> None:
    contender = contenders[method.name]
    if contender.error:
        entry.update(sizes.failed(contender.error))
        return
    entry["seconds"] = summary(contender.samples)
    entry["calls"] = contender.calls
    if contender.hot:
        entry["hot_seconds"] = summary(contender.hot)
    entry["mpixel_per_second"] = float(f"{workload.total_queries / entry['seconds']['median'] / 1e6:.4g}")
    original = contenders.get("original")
    if original and not original.error:
        entry["speedup"] = summary(pair_ratios(original.samples, contender.samples))
    for rival in RIVALS:
        if rival in contenders and rival != method.name and not contenders[rival].error:
            ratios = pair_ratios(contenders[rival].samples, contender.samples)
            entry.setdefault("speedup_over", {})[rival] = summary(ratios)
    if workload.kind in _MULTIPLIES:
        flop = (folded_flop if method.folded else original_flop)(workload)
        entry["flop"] = flop
        entry["gflop_per_second"] = float(f"{flop / entry['seconds']['median'] / 1e9:.4g}")
        achieved = {turn: flop / seconds for turn, seconds in contender.samples.items()}
        for kind in ("loop", "gemm"):
            if f"{kind} {method.dtype}" in rates:
                ratios = pair_ratios(achieved, rates[f"{kind} {method.dtype}"])
                entry[f"fraction_of_{kind}"] = summary(ratios)
    elif "copy" in rates:
        item = DTYPES[method.dtype].itemsize
        moved = {turn: least_bytes(workload, item) / seconds for turn, seconds in contender.samples.items()}
        entry["fraction_of_copy"] = summary(pair_ratios(moved, rates["copy"]))


def _tell(method: Method, entry: dict[str, Any]) -> None:
    if entry["status"] != "ok":
        note(f"  {method.name:24}{entry['reason']}")
        return
    parts = [f"{entry['seconds']['median'] * 1e3:10.2f} ms"]
    if "speedup" in entry:
        parts.append(f"{entry['speedup']['median']:6.2f} x")
    for kind in ("loop", "gemm", "copy"):
        if f"fraction_of_{kind}" in entry:
            parts.append(f"{entry[f'fraction_of_{kind}']['median']:6.1%} of the {kind}")
    if entry.get("peak_bytes") is not None:
        parts.append(f"{entry['peak_bytes'] / 1e6:8.0f} MB")
    note(f"  {method.name:24}" + "  ".join(parts))
