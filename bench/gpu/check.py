"""What a check is: a function of a context and a judge. The judge keeps every measured value beside its limit.

A check does not stop at its first miss, so that one run on a borrowed GPU tells as much as it can. Whatever it raises
is its result too.
"""

from __future__ import annotations

import math
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

import torch

# What CUDA, PyTorch and Triton say of errors after which a process can use its GPU no more.
_STICKY = (
    "CUDA error",
    "AcceleratorError",
    "CUDA driver error",
    "illegal memory access",
    "illegal instruction",
    "misaligned address",
    "launch failure",
    "device-side assert",
)
PASSED, FAILED, SKIPPED, CRASHED = "passed", "failed", "skipped", "crashed"


class Context(NamedTuple):
    """Where and what to check. small: sizes for a CPU, where only the check itself is being tested."""

    device: torch.device
    backend: str
    small: bool = False

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"


class Skip(Exception):
    """Raised by a check that cannot run here; the message is the reason."""


@dataclass
class Outcome:
    """What came of one check. measured: [{what, value, sense, limit, met}], the worst value of each `what`."""

    name: str
    status: str
    note: str = ""
    seconds: float = 0.0
    measured: list[dict[str, Any]] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


class Judge:
    """Collects measured values and compares them with their limits; NaN meets none."""

    def __init__(self) -> None:
        self.measured: dict[str, dict[str, Any]] = {}
        self.notes: list[str] = []

    @property
    def failed(self) -> bool:
        return not all(entry["met"] for entry in self.measured.values())

    def at_most(self, what: str, value: float, limit: float) -> None:
        self._keep(what, value, "<=", limit, value - limit)

    def at_least(self, what: str, value: float, limit: float) -> None:
        self._keep(what, value, ">=", limit, limit - value)

    def true(self, what: str, value: bool) -> None:
        self._keep(what, bool(value), "is", True, 0.0 if value else 1.0)

    def note(self, sentence: str) -> None:
        """Something for the report that neither passes nor fails."""
        self.notes.append(sentence)

    def _keep(self, what: str, value: float | bool, sense: str, limit: float | bool, excess: float) -> None:
        before = self.measured.get(what)
        excess = math.inf if math.isnan(excess) else excess
        if before is None or excess > before["excess"]:
            shown = value if isinstance(value, bool) or math.isfinite(value) else str(value)  # JSON knows no NaN
            entry = {"what": what, "value": shown, "sense": sense, "limit": limit, "met": excess <= 0}
            self.measured[what] = {**entry, "excess": excess}


class Check(NamedTuple):
    """A named check; `run(context, judge)` measures and judges."""

    name: str
    run: Callable[[Context, Judge], None]


def run_check(check: Check, context: Context) -> Outcome:
    """Run one check and say what came of it; never raises but for interrupts."""
    judge = Judge()
    begin = time.monotonic()
    status, note = PASSED, ""
    try:
        check.run(context, judge)
        if context.on_gpu:
            torch.cuda.synchronize(context.device)  # an error in a kernel belongs to the check that launched it
        if not judge.measured:
            status, note = FAILED, "it judged nothing"
    except Skip as reason:
        status, note = SKIPPED, str(reason)
    except Exception as error:
        if refusal := refused(error, context.backend):
            status, note = SKIPPED, refusal
        else:
            last = traceback.extract_tb(error.__traceback__)[-1]
            status, note = CRASHED, f"{type(error).__name__}: {_first_line(error)} ({last.filename}:{last.lineno})"
    if judge.failed:
        status = FAILED if status != CRASHED else status
    note = "; ".join(part for part in (note, *judge.notes) if part)
    measured = [{key: value for key, value in entry.items() if key != "excess"} for entry in judge.measured.values()]
    return Outcome(check.name, status, note, round(time.monotonic() - begin, 3), measured)


def require_gpu(context: Context, what: str) -> None:
    """Skip with one sentence where `what` exists on CUDA devices only."""
    if not context.on_gpu:
        raise Skip(f"{what} needs a CUDA device, this is {context.device}")


def refused(error: Exception, backend: str) -> str:
    """The backend's own sentence where it refuses a problem (`backends.can_run_*`), else ''."""
    text = str(error)
    return text if isinstance(error, RuntimeError) and text.startswith(f"backend '{backend}'") else ""


def broke_the_device(outcome: Outcome) -> bool:
    """Whether a CUDA error stays in the process, so that nothing after it can be believed."""
    if outcome.status != CRASHED or "out of memory" in outcome.note:
        return False
    return any(words in outcome.note for words in _STICKY)


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:300] if lines else "no message"
