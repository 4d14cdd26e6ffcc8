"""The steps of a run: what each is, how long it may take, what runs beside what.

Steps of one phase run at the same time, each in processes of its own; a phase that times something has one step. The
phases stand in the order of what they are worth, since a borrowed GPU may be taken back.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import NamedTuple

CHECKS, COMMAND = "checks", "command"


class Step(NamedTuple):
    """kind `checks`: a module's checks through `worker.py`, in `shards` processes. kind `command`: argv of a program
    that writes its report, a JSON object, to the file that takes the place of {report}; {seconds} is its time limit.
    """

    name: str
    kind: str
    module: str = ""
    backend: str = ""
    shards: int = 1
    argv: tuple[str, ...] = ()
    needs: str = ""  # a step that must have run


class Phase(NamedTuple):
    """seconds: its share of a budget of BUDGET seconds; what it leaves over goes to the phases behind it.

    required: without it there is no point in going on.
    """

    name: str
    seconds: float
    steps: tuple[Step, ...]
    required: bool = False


BUDGET = 470.0
_DEVICE, _REPORT, _SECONDS = ("--device", "{device}"), ("--report", "{report}"), ("--seconds", "{seconds}")


def _program(module: str, *arguments: str) -> tuple[str, ...]:
    return (sys.executable, "-m", module, *arguments)


def phases(device: str, backends: tuple[str, ...] = ("cuda", "triton")) -> tuple[Phase, ...]:
    """All steps for a device; on 'cpu' those that exist there."""
    # Triton compiles every variant of a kernel in the process that asks for it, on one processor.
    shards = {"chain-triton": 8, "pieces-triton": 2, "citizen-triton": 2}
    chain = []
    for name in ("chain", "pieces", "citizen", "indices", "large"):
        for backend in backends:
            step = f"{name}-{backend}"
            chain.append(Step(step, CHECKS, f"bench.gpu.{name}", backend, shards.get(step, 1)))
    look = Step("facts", COMMAND, argv=_program("bench.gpu.facts", *_DEVICE, *_REPORT))
    facts = Phase("facts", 60, (look,), required=True)  # the first import of torch from a cold disk
    if not device.startswith("cuda"):
        return (facts, Phase("checks", BUDGET, tuple(chain)))
    sanitizers = [
        Step(
            f"sanitizer-{tool}",
            COMMAND,
            argv=_program("bench.gpu.sanitizer", tool, *_REPORT, *_SECONDS),
        )
        for tool in ("memcheck", "racecheck", "initcheck", "synccheck")
    ]
    timings = _program("bench.gpu.benchmarks", *_DEVICE, *_REPORT, *_SECONDS, "--out", "{out}")
    return (
        facts,
        Phase("checks", 130, (*chain, Step("hopper-build", COMMAND, argv=_hopper("build")))),
        Phase("benchmarks", 165, (Step("bench", COMMAND, argv=timings),)),
        Phase("hopper", 30, (Step("hopper", COMMAND, argv=_hopper("run"), needs="hopper-build"),)),
        Phase("sanitizers", 85, tuple(sanitizers)),
    )


def _hopper(verb: str) -> tuple[str, ...]:
    return _program("bench.gpu.hopper", verb, "--folder", "{scratch}", *_REPORT, *_SECONDS)


def root() -> Path:
    """The project's folder, where every step runs."""
    return Path(__file__).resolve().parents[2]
