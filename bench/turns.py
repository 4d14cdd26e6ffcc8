"""Programs that time loops in turns: their arguments, and the measured part of their result."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from bench import results
from bench.measure import log, validity_warnings
from liif_fast.benchmark import peak_rates
from liif_fast.benchmark.cuda_timing import CudaClock
from liif_fast.benchmark.timing import Candidate, Clock, CpuClock, in_words, interleave, pair_ratios, summary


def parser(module: str, about: str | None) -> argparse.ArgumentParser:
    """A program's arguments; `about` is its docstring."""
    made = argparse.ArgumentParser(
        prog=f"python -m bench.{module}", description=about, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    made.add_argument("--rounds", type=int, help="default: 5 on a CPU, 50 on a GPU")
    made.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of the CPU")
    made.add_argument("--results", type=Path, default=results.FOLDER)
    return made


def start(args: argparse.Namespace) -> tuple[Clock, int]:
    """The clock and the number of rounds that the arguments ask for; sets the number of threads."""
    torch.set_num_threads(args.threads)
    if args.device == "cuda":
        return CudaClock(graphs=False), args.rounds or 50
    return CpuClock(), args.rounds or 5


def take_turns(
    clock: Clock, runs: Mapping[str, Callable[[], Any]], rounds: int, baseline: Callable[[str], str | None]
) -> dict[str, Any]:
    """Warm up every run, then time them in turns: rounds, peak rates, warnings and entries of a result.

    baseline: the name of the run that a run of this name is compared with; None for no speedup.
    """
    candidates = {name: Candidate(name, run) for name, run in runs.items()}
    for name, candidate in candidates.items():
        candidate.run()  # compiles, in variants with torch.compile
        clock.warm_up(candidate)
        log(f"{name}: ready")
    rates = peak_rates.matmul_rates(clock)
    done = interleave(clock, list(candidates.values()), rounds, rates)
    entries: dict[str, Any] = {}
    for name, candidate in candidates.items():
        if candidate.error:
            entries[name] = {"failed": candidate.error}
            continue
        entries[name] = {"seconds": summary(candidate.samples)}
        first = candidates.get(baseline(name) or "")
        if first and first.samples:
            entries[name]["speedup"] = summary(pair_ratios(first.samples, candidate.samples))
        log(f"{name}: {in_words(entries[name]['seconds']['median'])}")
    return {
        "rounds": done,
        "peak_rates": {rate.name: summary(rate.rates) for rate in rates if rate.rates},
        "warnings": validity_warnings(rates, entries),
        "entries": entries,
    }
