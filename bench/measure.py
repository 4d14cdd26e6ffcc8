"""One workload's record: every method prepared, judged against float64, then timed in turns with the others."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from bench import memory, timing
from bench.methods import Method, exact, methods_for
from bench.targets import CREDIBLE_FRACTION
from bench.timing import Contender, note, pair_ratios, summary
from bench.workloads import Problem, Workload, folded_flop, make_problem, original_flop

PREPARE_LIMIT_S = 150.0  # torch.compile may not take longer


class TooSlow(Exception):
    """Preparing a method took longer than `PREPARE_LIMIT_S`."""


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


def measure(workload: Workload, *, quick: bool, rounds: int | None = None) -> dict[str, Any]:
    """Everything about one workload that goes into a result file."""
    note(f"{workload.name}: {workload.about}")
    methods = methods_for(workload, quick)
    record: dict[str, Any] = {"about": workload.about, "kind": workload.kind, "queries": workload.total_queries}
    if workload.kind == "memory":
        record["methods"] = {method.name: _memory(workload, method) for method in methods}
        return record
    problem = make_problem(workload)
    truth = _flat(workload, exact(workload, problem))
    entries: dict[str, dict[str, Any]] = {}
    contenders = {}
    for method in methods:
        entries[method.name], contender = _prepare(workload, problem, method, truth)
        if contender:
            contenders[method.name] = contender
    del truth
    loops = timing.interleave(list(contenders.values()), rounds or workload.rounds, timing.loop_dtypes())
    for method in methods:
        if method.name in contenders:
            _add_times(entries[method.name], workload, method, contenders, loops)
            _tell(method, entries[method.name])
    record["loop_flop_per_second"] = {dtype: summary(rates) for dtype, rates in loops.items()}
    record["methods"] = entries
    record["warnings"] = doubts(record)
    for doubt in record["warnings"]:
        note(f"  {doubt}")
    return record


def doubts(record: dict[str, Any]) -> list[str]:
    """Reasons not to believe a record: the loop's rate has to be steady, and above every method's."""
    found = []
    # Only another program slows the loop down. 4 of 5 samples within 5 % of the median are steady.
    if any(rates["p20"] < 0.95 * rates["median"] for rates in record["loop_flop_per_second"].values()):
        found.append("The processor was shared with other programs: do not rely on these numbers.")
    fractions = [entry["fraction_of_loop"]["median"] for entry in record["methods"].values() if _has_fraction(entry)]
    if max(fractions, default=0.0) > CREDIBLE_FRACTION:
        found.append(
            "A method outran the multiply-add loop, so that its rate is no peak: do not rely on fractions of it."
        )
    return found


def _has_fraction(entry: dict[str, Any]) -> bool:
    return "fraction_of_loop" in entry


def _describe(method: Method) -> dict[str, Any]:
    return {"label": method.label, "dtype": method.dtype, "status": "ok"}


def _memory(workload: Workload, method: Method) -> dict[str, Any]:
    dtype = torch.bfloat16 if method.dtype == "bfloat16" else torch.float32
    entry = {**_describe(method), "allowed_bytes": memory.allowance(workload, dtype)}
    entry.update(memory.measure(method.name, workload))
    spent = f"{entry['peak_bytes'] / 1e6:.0f} MB" if entry["status"] == "ok" else entry["reason"]
    note(f"  {method.name:24}{spent}")
    return entry


def _prepare(
    workload: Workload, problem: Problem, method: Method, truth: Tensor
) -> tuple[dict[str, Any], Contender | None]:
    entry = _describe(method)
    try:
        with time_limit(PREPARE_LIMIT_S):
            run, remark = method.prepare(workload, problem)
            entry.update(_accuracy(workload, _flat(workload, run()), truth))
            contender = Contender(method.name, run)
            timing.warm_up(contender)
    except Exception as error:  # whatever stops a method is its result, with the reason
        reason = timing.failure(error)
        entry.update(status="out of memory" if reason == "out of memory" else "failed", reason=reason)
        note(f"  {method.name:24}{reason}")
        return entry, None
    if remark:
        entry["note"] = remark
    return entry, contender


def _flat(workload: Workload, result: Any) -> Tensor:
    """A result as float64 numbers, in the order [B, Q, O] for whatever decodes."""
    if isinstance(result, list):
        return torch.cat([part.double().flatten() for part in result])
    if workload.kind == "decode" and result.dim() == 4:
        result = result.flatten(2).transpose(1, 2)
    return result.double().flatten()


def _accuracy(workload: Workload, result: Tensor, truth: Tensor) -> dict[str, float]:
    """PSNR with the largest true value as peak; for gradients the norm of the error, relative."""
    difference = result - truth
    if workload.kind == "train":
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
    loops: dict[str, list[float]],
) -> None:
    contender = contenders[method.name]
    if contender.error:
        entry.update(status="out of memory" if contender.error == "out of memory" else "failed", reason=contender.error)
        return
    entry["seconds"] = summary(contender.samples)
    entry["mpixel_per_second"] = float(f"{workload.total_queries / entry['seconds']['median'] / 1e6:.4g}")
    original = contenders.get("original")
    if original and not original.error:
        entry["speedup"] = summary(pair_ratios(original.samples, contender.samples))
    if workload.kind in ("decode", "train"):
        flop = (folded_flop if method.folded else original_flop)(workload)
        entry["flop"] = flop
        rates = [flop / seconds for seconds in contender.samples]
        entry["gflop_per_second"] = float(f"{flop / entry['seconds']['median'] / 1e9:.4g}")
        if method.dtype in loops:
            entry["fraction_of_loop"] = summary(pair_ratios(rates, loops[method.dtype]))


def _tell(method: Method, entry: dict[str, Any]) -> None:
    if entry["status"] != "ok":
        note(f"  {method.name:24}{entry['reason']}")
        return
    parts = [f"{entry['seconds']['median'] * 1e3:10.2f} ms"]
    if "speedup" in entry:
        parts.append(f"{entry['speedup']['median']:6.2f} x")
    if "fraction_of_loop" in entry:
        parts.append(f"{entry['fraction_of_loop']['median']:6.1%} of the loop")
    note(f"  {method.name:24}" + "  ".join(parts))
