"""Times the workloads and saves one result file: `python -m bench.run [--device cuda] [--budget SECONDS]`.

Needs torch, numpy and the dependencies of liif_fast. Workloads run in order of importance until --budget is used up.
Each has a process of its own, and the file is saved after each. A crash, a hang or a broken device therefore costs one
method: it is recorded with the reason, and the workload starts again without it. Out of memory is a result too.

The last line on stdout is the path of the file below --out: DEVICE/DATE-NAME.json. The exit code is 0 when at least one
method of one workload was timed. Run it on a machine without other work.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

from bench import child, machine, results
from bench.measure import IN_TURNS, log, measure
from bench.workloads import WORKLOADS
from liif_fast.benchmark.cuda_timing import CudaClock
from liif_fast.benchmark.timing import Clock, CpuClock

SILENCE_S = 200.0  # on a GPU the longest time for preparing a method, or for timing all of them
RESTARTS = 3  # of a workload
_SHARE = 0.5  # the largest share of the remaining time for one workload, to leave some for the others


def _measure_workload(
    send: Callable[[Any], None],
    name: str,
    device: str,
    threads: int,
    rounds: int | None,
    seconds: float | None,
    lost: dict[str, str],
) -> dict[str, Any]:
    """The record of a workload; runs in a process of its own."""
    torch.set_num_threads(threads)
    deadline = None if seconds is None else perf_counter() + seconds
    clock: Clock = CpuClock() if device == "cpu" else CudaClock()
    return measure(WORKLOADS[name], clock, rounds=rounds, deadline=deadline, lost=lost, on_method=send)


def record_of(name: str, device: str, rounds: int | None, until: float | None) -> dict[str, Any]:
    """The record of a workload, measured in a process of its own without the methods that crash or hang.

    rounds: samples of each method; None: the workload's own number. until: of `perf_counter`.
    """
    workload = WORKLOADS[name]
    skipped = {"about": workload.about, "kind": workload.kind, "methods": {}}
    lost: dict[str, str] = {}
    running = ""

    def on_message(method: str) -> None:
        nonlocal running
        running = method

    reason = workload.refusal(device)
    for _ in range(RESTARTS + 1):
        left = None if until is None else until - perf_counter()
        if left is not None and left <= 0:
            reason = reason or results.USED_UP
        if reason:
            break
        seconds, running = None if left is None else _SHARE * left, ""
        args = (name, device, torch.get_num_threads(), rounds, seconds, lost)
        try:
            if workload.kind == "size" and device == "cpu":  # each of its methods has a process of its own
                return _measure_workload(on_message, *args)
            silence_s = SILENCE_S if device == "cuda" else None
            return child.call(_measure_workload, *args, silence_s=silence_s, on_message=on_message)
        except child.ChildError as error:
            if running in ("", IN_TURNS):
                reason = str(error)
            else:
                lost[running] = str(error)
                log(f"  {running}: {error}; {name} starts again without it")
    reason = reason or f"{len(lost)} methods failed: {', '.join(lost)}"
    log(f"{name}: skipped, {reason}")
    return {**skipped, "skipped": reason}


def run(names: list[str], device: str, *, name: str, out: Path, rounds: int | None, budget: float | None) -> Path:
    """Measure workloads into a result file, which is saved after each; returns the file's path."""
    begin = perf_counter()
    result = {**results.begin(name, device, "bench.run"), "workloads": {}}
    for workload in names:
        start = perf_counter()
        record = record_of(workload, device, rounds, None if budget is None else begin + budget)
        record |= {"machine_state": machine.state(device), "seconds_taken": round(perf_counter() - start, 1)}
        result["workloads"][workload] = record
        result["seconds_taken"] = round(perf_counter() - begin)
        results.save(result, out)
    return results.save(result, out)


def _arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.run", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--budget", type=float, metavar="SECONDS", help="no work starts after this time; default: none")
    parser.add_argument("--only", nargs="+", choices=WORKLOADS, metavar="WORKLOAD", help="see --list")
    parser.add_argument("--rounds", type=int, help="samples of each method; default: per workload, 100 on a GPU")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of the CPU")
    parser.add_argument("--name", help="of the result file, after the date; default: full, or some with --only")
    parser.add_argument("--out", type=Path, default=results.FOLDER, metavar="DIR", help="folder for the result file")
    parser.add_argument("--list", action="store_true", help="list the workloads and exit")
    args = parser.parse_args(arguments)
    for option in ("rounds", "threads"):
        value = getattr(args, option)
        if value is not None and value < 1:
            parser.error(f"--{option} is {value}, but must be at least 1")
    if args.budget is not None and args.budget <= 0:
        parser.error(f"--budget is {args.budget:g}, but must be more than 0 seconds")
    return args


def main(arguments: list[str] | None = None) -> int:
    args = _arguments(arguments)
    if args.list:
        for workload in WORKLOADS.values():
            print(f"{workload.name:30}{workload.about}" + (f" (only {workload.device})" if workload.device else ""))
        return 0
    if args.device == "cuda" and not torch.cuda.is_available():
        sys.exit("--device is cuda, but torch finds no GPU that it can use: choose --device cpu")
    torch.set_num_threads(args.threads)
    names = [name for name in WORKLOADS if not args.only or name in args.only]
    name = args.name or ("some" if args.only else "full")
    path = run(names, args.device, name=name, out=args.out, rounds=args.rounds, budget=args.budget)
    print(path)
    workloads = results.load(path)["workloads"].values()
    return 0 if any("seconds" in entry for each in workloads for entry in each["methods"].values()) else 1


if __name__ == "__main__":
    sys.exit(main())
