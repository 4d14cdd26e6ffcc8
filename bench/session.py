"""A run on its way: the result file's contents, what is measured into them, and when time is up."""

from __future__ import annotations

import time
from pathlib import Path
from time import perf_counter
from typing import Any

from bench import machine, results
from bench.measure import measure, note
from bench.workloads import WORKLOADS
from liif_fast.benchmark.timing import Clock

# The most that one workload may take of the time that is left; those behind it are less important, but not worthless.
_SHARE = 0.5


def begin(device: str, names: list[str], *, name: str, command: str) -> dict[str, Any]:
    """A result file's contents before anything is measured; `planned` workloads are still to do."""
    described = machine.describe(device)
    machine.warn_if_busy(described)
    return {
        "schema": results.SCHEMA,
        "name": name,
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "command": command,
        "commit": machine.commit(),
        "machine": described,
        "versions": machine.versions(),
        "started": time.time(),
        "planned": names,
        "workloads": {},
    }


class Session:
    """Measures workloads into a result, which is saved after each where there is a folder for it.

    Args:
        result: from `begin`, or a result file's contents that was not finished.
        clock: of the device.
        folder: below which the file is written; None writes none.
        quick: only the methods the project's promises are about.
        rounds: samples of each method; None: the workloads' own.
        budget: seconds since the result was begun, after which nothing is begun; None is no limit.
    """

    def __init__(
        self,
        result: dict[str, Any],
        clock: Clock,
        folder: Path | None,
        *,
        quick: bool = False,
        rounds: int | None = None,
        budget: float | None = None,
    ) -> None:
        self.result = result
        self._clock, self._folder, self._quick, self._rounds, self._budget = clock, folder, quick, rounds, budget
        spent = time.time() - result["started"]
        self._deadline = None if budget is None else perf_counter() + budget - spent
        self._save()

    def measure(self, name: str, only: set[str] | None = None) -> dict[str, Any]:
        """The record of a workload, measured if it is not in the result yet; `only` names the methods wanted."""
        workloads = self.result["workloads"]
        if name not in workloads:
            workloads[name] = self._record(name, only)
            self.result.pop("running", None)
            self._save()
        return workloads[name]

    def finish(self) -> None:
        """Take out what only an unfinished result needs, and save for the last time."""
        self.result["seconds_taken"] = round(time.time() - self.result["started"])
        for key in ("planned", "started", "running"):
            self.result.pop(key, None)
        self._save()

    def _record(self, name: str, only: set[str] | None) -> dict[str, Any]:
        workload, device = WORKLOADS[name], self._clock.device.type
        now = perf_counter()
        reason = workload.refusal(device)
        if not reason and self._deadline is not None and now > self._deadline:
            reason = f"the {self._budget:.0f} s given to this run were used up"
        if not reason:
            lost = self.result.get("lost", {})
            try:
                record = measure(
                    workload,
                    self._clock,
                    quick=self._quick,
                    rounds=self._rounds,
                    deadline=None if self._deadline is None else now + _SHARE * (self._deadline - now),
                    only=only,
                    lost=lost.get(name, {}),
                    tell=lambda method: self._tell(name, method),
                )
                record["machine_state"] = machine.state(device)
                record["seconds_taken"] = round(perf_counter() - now, 1)
                return record
            except (RuntimeError, MemoryError) as error:
                if self._clock.is_broken():
                    raise
                reason = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no message'}"
        note(f"{name}: skipped, {reason}")
        return {"about": workload.about, "kind": workload.kind, "skipped": reason, "methods": {}}

    def _tell(self, workload: str, method: str) -> None:
        """For whoever watches this process on a GPU."""
        if self._clock.device.type != "cpu":
            self.result["running"] = {"workload": workload, "method": method, "since": time.time()}
            self._save()

    def _save(self) -> None:
        if self._folder is not None:
            results.save(self.result, self._folder)
