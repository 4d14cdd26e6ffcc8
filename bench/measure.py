"""The record of one workload: every method is prepared, compared with float64, and timed in turns with the others."""

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

from bench import machine, results, sizes
from bench.methods.method import Job, Method
from bench.methods.registry import exact, methods_for
from bench.workloads import Workload, flop, least_bytes, make_problem
from liif_fast.benchmark import peak_rates
from liif_fast.benchmark.runs import DTYPES, flat
from liif_fast.benchmark.timing import Candidate, Clock, PeakRate, failure, in_words, interleave, pair_ratios, summary

PREPARE_LIMIT_S = 150.0  # for one method; torch.compile may take long
GPU_ROUNDS = 100
IN_TURNS = "all in turns"  # passed to `on_method` when the timing starts
_LEAST_S = 10.0  # granted to everything that starts
_PREPARING = 0.6  # the largest share of the remaining time for preparing the methods of one workload
CREDIBLE_FRACTION = 1.02  # of the FMA peak; a larger fraction means that the peak was measured too low

Entries = dict[str, dict[str, Any]]


class TooSlow(Exception):
    """Preparing a method exceeded its time limit."""


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


def log(text: str) -> None:
    """Progress, on stderr."""
    print(text, file=sys.stderr, flush=True)


def measure(
    workload: Workload,
    clock: Clock,
    *,
    rounds: int | None = None,
    deadline: float | None = None,
    lost: Mapping[str, str] | None = None,
    on_method: Callable[[str], None] = lambda name: None,
) -> dict[str, Any]:
    """Everything about one workload that goes into a result file.

    Args:
        rounds: samples of each method; None: the workload's own number on a CPU, up to 100 on a GPU.
        deadline: of `perf_counter`; work that has not started by then is skipped.
        lost: methods that crashed or hung before, with the reason; they are not tried again.
        on_method: called with the name of the next method to run, and with IN_TURNS before the timing.
    """
    log(f"{workload.name}: {workload.about}")
    record: dict[str, Any] = {"about": workload.about, "kind": workload.kind, "queries": workload.total_queries}
    entries: Entries = {}
    methods = methods_for(workload, clock.device.type)
    for method in methods:
        entries[method.name] = entry = {"label": method.label, "dtype": method.dtype, "status": "ok"}
        if method.refusal:
            entry.update(status="refused", reason=method.refusal)
        elif lost and method.name in lost:
            entry.update(sizes.failed(lost[method.name]))
    pending = [method for method in methods if entries[method.name]["status"] == "ok"]
    record["warnings"] = []
    if workload.kind == "size":
        for method in pending:
            entry = entries[method.name]
            entry["limit_bytes"] = sizes.fused_limit(workload, DTYPES[method.dtype].itemsize)
            on_method(method.name)
            entry.update(_out_of_time(deadline) or sizes.measure(method, workload, clock, _left(deadline)))
    else:
        job = Job(workload, make_problem(workload, clock.device), clock)
        candidates = _prepare_all(job, pending, entries, deadline, on_method)
        on_method(IN_TURNS)
        rates = _rates(workload, clock)
        record["rounds"] = _time(job, list(candidates.values()), rates, rounds, deadline)
        record["peak_rates"] = {rate.name: summary(rate.rates) for rate in rates if rate.rates}
        for method in pending:
            if method.name in candidates:
                _add_times(entries[method.name], workload, method, candidates, rates)
        record["warnings"] = validity_warnings(rates, entries)
    for name in entries:
        _log_entry(name, entries[name])
    for warning in record["warnings"]:
        log(f"  {warning}")
    return {**record, "methods": entries}


def _prepare_all(
    job: Job, methods: list[Method], entries: Entries, deadline: float | None, on_method: Callable[[str], None]
) -> dict[str, Candidate]:
    """The methods that are ready to be timed, in their order; the entries of the others get the reason."""
    truth = flat(exact(job.workload, job.problem, job.clock))
    now = perf_counter()
    prepare_until = None if deadline is None else now + _PREPARING * (deadline - now)
    candidates = {}
    for method in sorted(methods, key=lambda method: method.late):
        entry = entries[method.name]
        if skipped := _out_of_time(prepare_until):
            entry.update(skipped)
            continue
        on_method(method.name)
        try:
            with time_limit(min(PREPARE_LIMIT_S, _left(deadline))):
                candidates[method.name] = _prepare(job, method, entry, truth)
        except Exception as error:  # any failure of a method is its result, with the reason
            if job.clock.is_broken():
                raise
            entry.update(sizes.failed(failure(error)))
    return {method.name: candidates[method.name] for method in methods if method.name in candidates}


def _prepare(job: Job, method: Method, entry: dict[str, Any], truth: Tensor) -> Candidate:
    run, remark = method.prepare(job)
    entry.update(_accuracy(job.workload, flat(run()), truth))
    candidate = Candidate(method.name, run)
    entry["peak_bytes"] = job.clock.peak(run)
    job.clock.warm_up(candidate)
    if remark:
        entry["note"] = remark
    if candidate.captured:
        entry["captured"] = True
    return candidate


def _rates(workload: Workload, clock: Clock) -> list[PeakRate]:
    if workload.kind in ("decode", "train"):
        return peak_rates.matmul_rates(clock)
    return [peak_rates.copy(clock)] if workload.kind in ("gather", "ensemble") else []


def _time(
    job: Job, candidates: list[Candidate], rates: list[PeakRate], rounds: int | None, deadline: float | None
) -> int:
    gpu = job.device.type == "cuda"
    limits = [limit for limit in (deadline, perf_counter() + job.workload.limit_s if gpu else None) if limit]
    rounds = rounds or (GPU_ROUNDS if gpu else job.workload.rounds)
    return interleave(job.clock, candidates, rounds, rates, deadline=min(limits, default=None))


def _left(deadline: float | None) -> float:
    return math.inf if deadline is None else max(_LEAST_S, deadline - perf_counter())


def _out_of_time(until: float | None) -> dict[str, Any] | None:
    """The entry of a method that cannot start any more; None while there is time."""
    if until is None or perf_counter() <= until:
        return None
    return {"status": "skipped", "reason": results.USED_UP}


def validity_warnings(rates: list[PeakRate], entries: Entries) -> list[str]:
    """Reasons to distrust a record: an unsteady FMA peak, or a method above it."""
    found = []
    if any(machine.was_shared(list(rate.rates.values())) for rate in rates if rate.name.startswith("fma_peak")):
        found.append(machine.SHARED)
    fractions = [entry.get("fraction_of", {}).get("fma_peak", {}).get("median", 0.0) for entry in entries.values()]
    if max(fractions, default=0.0) > CREDIBLE_FRACTION:
        found.append("A method exceeded the measured FMA peak, so the fractions of that peak are wrong.")
    return found


def _accuracy(workload: Workload, result: Tensor, truth: Tensor) -> dict[str, float]:
    """PSNR with the largest true value as peak; for gradients the relative norm of the error."""
    difference = result - truth
    if workload.passes != "forward":
        return {"gradient_error": float(f"{(difference.norm() / truth.norm()).item():.2g}")}
    mse = difference.square().mean().item()
    if mse == 0:
        return {}  # exact
    return {"psnr_db": round((10 * torch.log10(truth.abs().max() ** 2 / mse)).item(), 1)}


def _add_times(
    entry: dict[str, Any], workload: Workload, method: Method, candidates: dict[str, Candidate], rates: list[PeakRate]
) -> None:
    candidate = candidates[method.name]
    if candidate.error:
        entry.update(sizes.failed(candidate.error))
        return
    entry["seconds"] = summary(candidate.samples)
    entry["calls"] = candidate.calls
    if candidate.warm_l2:
        entry["warm_l2_seconds"] = summary(candidate.warm_l2)
    entry["mpixel_per_second"] = float(f"{workload.total_queries / entry['seconds']['median'] / 1e6:.4g}")
    original = candidates.get("original")
    if original and not original.error:
        entry["speedup"] = summary(pair_ratios(original.samples, candidate.samples))
    if not rates:
        return
    multiplies = rates[0].name != "copy"
    work = flop(workload, folded=method.folded) if multiplies else least_bytes(workload, DTYPES[method.dtype].itemsize)
    if multiplies:
        entry["gflop_per_second"] = float(f"{work / entry['seconds']['median'] / 1e9:.4g}")
    achieved = {turn: work / seconds for turn, seconds in candidate.samples.items()}
    for rate in rates:
        kind, _, dtype = rate.name.partition(" ")
        if dtype in ("", method.dtype) and rate.rates:
            entry.setdefault("fraction_of", {})[kind] = summary(pair_ratios(achieved, rate.rates))


def _log_entry(name: str, entry: dict[str, Any]) -> None:
    text = in_words(entry["seconds"]["median"]) if entry["status"] == "ok" else entry["reason"]
    speedup = f"{entry['speedup']['median']:8.2f} x" if "speedup" in entry else ""
    log(f"  {name:24}{text}{speedup}")
