"""Runs phases of steps inside a time budget: processes with limits, and a new process where one broke."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from bench.gpu import worker
from bench.gpu.check import CRASHED, FAILED, PASSED, SKIPPED, Outcome
from bench.gpu.steps import CHECKS, Phase, Step, root

CHECK_LIMIT_S = 75.0  # one check; the first of a process loads and compiles
START_LIMIT_S = 90.0  # from a process's start to its first check: imports, beside many others
_POLL_S = 0.1
_TAIL = 3000  # characters of a step's output that go into the report


class Setting(NamedTuple):
    """device, scratch: a folder for what need not come back; out: the folder that does; small: sizes for a CPU."""

    device: str
    scratch: Path
    out: Path
    small: bool = False
    check_limit: float = CHECK_LIMIT_S


def run_phases(
    phases: Sequence[Phase],
    setting: Setting,
    budget: float,
    save: Callable[[dict[str, dict[str, Any]]], None],
) -> dict[str, dict[str, Any]]:
    """Run all phases; every step's record by name. `save` is called with what there is after each phase.

    A phase may use its share of the budget and whatever those before it left over.
    """
    begin = time.monotonic()
    records: dict[str, dict[str, Any]] = {}
    shares = sum(phase.seconds for phase in phases)
    planned = 0.0
    for phase in phases:
        planned += budget * phase.seconds / max(shares, 1e-9)
        left = planned - (time.monotonic() - begin)
        say(f"{phase.name}: {len(phase.steps)} steps, at most {left:.0f} s")
        with ThreadPoolExecutor(max_workers=len(phase.steps) or 1) as pool:
            futures = {step.name: pool.submit(_run_step, step, setting, left, dict(records)) for step in phase.steps}
            for name, future in futures.items():
                records[name] = future.result()
        save(records)
        if phase.required and any(records[step.name]["status"] == FAILED for step in phase.steps):
            break
    return records


def _run_step(step: Step, setting: Setting, limit: float, before: dict[str, dict[str, Any]]) -> dict[str, Any]:
    begin = time.monotonic()
    try:
        if limit <= 1:
            record = _skipped("no time was left for it")
        elif step.needs and before.get(step.needs, {}).get("status") not in (PASSED, FAILED):
            reason = before.get(step.needs, {}).get("note") or "it did not run"
            record = _skipped(f"it needs {step.needs}: {reason}")
        elif step.kind == CHECKS:
            record = _run_checks(step, setting, limit)
        else:
            record = _run_command(step, setting, limit)
    except Exception as error:  # of the harness itself: the other steps go on
        record = {"status": CRASHED, "note": f"{type(error).__name__}: {error}"}
    record["seconds"] = round(time.monotonic() - begin, 1)
    say(
        f"  {step.name}: {record['status']} in {record['seconds']} s"
        + (f": {record['note']}" if record.get("note") else "")
    )
    return record


def _skipped(reason: str) -> dict[str, Any]:
    return {"status": SKIPPED, "note": reason}


# ------------------------------------------------------------------------------------------------------------- checks


def _run_checks(step: Step, setting: Setting, limit: float) -> dict[str, Any]:
    """A module's checks, in `shards` processes at a time."""
    until = time.time() + limit
    with ThreadPoolExecutor(max_workers=step.shards) as pool:
        futures = [pool.submit(_run_shard, step, setting, until, shard) for shard in range(step.shards)]
        shards = [future.result() for future in futures]
    outcomes = [outcome for found, _ in shards for outcome in found]
    notes = [note for _, note in shards if note]
    record: dict[str, Any] = {"status": overall(outcome["status"] for outcome in outcomes), "checks": outcomes}
    counts = {status: sum(o["status"] == status for o in outcomes) for status in (PASSED, FAILED, CRASHED, SKIPPED)}
    record["note"] = ", ".join(f"{count} {status}" for status, count in counts.items() if count)
    if record["status"] == SKIPPED and outcomes:
        record["note"] += f": {outcomes[0]['note']}"
    if notes:
        record["status"] = CRASHED
        record["note"] = "; ".join([record["note"], *notes]).strip("; ")
    return record


def overall(statuses: Any) -> str:
    """A step is as bad as its worst check; it is skipped where all of them are."""
    found = set(statuses)
    return next((status for status in (CRASHED, FAILED, PASSED) if status in found), SKIPPED)


def _run_shard(step: Step, setting: Setting, until: float, shard: int) -> tuple[list[dict[str, Any]], str]:
    """One shard's outcomes; where its process dies or hangs, that check is the one to blame and the rest goes on."""
    results = setting.scratch / f"{step.name}-{shard}.jsonl"
    results.unlink(missing_ok=True)
    argv = [sys.executable, "-m", "bench.gpu.worker", step.module, "--backend", step.backend]
    argv += ["--results", str(results), "--device", setting.device, "--shard", f"{shard}/{step.shards}"]
    argv += ["--until", str(until - 2)] + (["--small"] if setting.small else [])
    idle_starts = 0
    while time.time() < until:
        log = setting.scratch / f"{step.name}-{shard}.log"
        known = len(worker.read(results)[0])
        status = _watch(argv, log, results, until, setting.check_limit)
        outcomes, running, finished = worker.read(results)
        if finished:
            return list(outcomes.values()), ""
        if running:
            _blame(results, running, status, log)
        idle_starts = 0 if running or len(outcomes) > known else idle_starts + 1
        if idle_starts == 2:  # it dies before its first check
            return list(outcomes.values()), f"the worker does not start: {tail(log, 400)}"
    outcomes, _, _ = worker.read(results)
    for check in worker.checks_of(step.module, shard, step.shards):
        outcomes.setdefault(check.name, Outcome(check.name, SKIPPED, worker.NO_TIME).as_dict())
    return list(outcomes.values()), ""


def _blame(results: Path, running: str, status: int | str, log: Path) -> None:
    """Writes the outcome of the check that was running when its process ended."""
    if isinstance(status, str):
        why = f"stopped by {status}"
    else:
        name = signal.Signals(-status).name if status < 0 else f"exit status {status}"
        why = f"its process died with {name}: {tail(log, 400)}"
    with results.open("a") as file:
        file.write("\n" + json.dumps({"outcome": Outcome(running, CRASHED, why).as_dict()}) + "\n")


def _watch(argv: Sequence[str], log: Path, results: Path, until: float, check_limit: float) -> int | str:
    """Run a worker; its exit status, or what stopped it where a check hangs or time is up."""
    with log.open("ab") as file:
        process = _start(argv, file, threads=2)  # there are many of them at a time
        written = size = results.stat().st_size if results.exists() else 0
        since = time.monotonic()
        while True:
            try:
                return process.wait(timeout=_POLL_S)
            except subprocess.TimeoutExpired:
                pass
            now = results.stat().st_size if results.exists() else 0
            if now != size:
                size, since = now, time.monotonic()
            limit = START_LIMIT_S if size == written else check_limit
            if time.time() >= until:
                end(process)
                return "the step's time limit"
            if time.monotonic() - since > limit:
                end(process)
                return f"the time limit of one check, {limit:.0f} s"


# ------------------------------------------------------------------------------------------------------------ commands


def _run_command(step: Step, setting: Setting, limit: float) -> dict[str, Any]:
    """A program with a report of its own: {'status', 'note', ...}."""
    report, log = setting.scratch / f"{step.name}.json", setting.scratch / f"{step.name}.log"
    report.unlink(missing_ok=True)
    names = {
        "report": str(report),
        "seconds": f"{max(1.0, limit - 5):.0f}",
        "device": setting.device,
        "scratch": str(setting.scratch),
        "out": str(setting.out),
    }
    with log.open("ab") as file:
        process = _start([word.format(**names) for word in step.argv], file)
        try:
            status: int | str = process.wait(timeout=limit)
        except subprocess.TimeoutExpired:
            end(process)
            status = f"its time limit of {limit:.0f} s"
    try:
        record = json.loads(report.read_text())
    except (OSError, ValueError):
        record = {}
    if "status" not in record:
        why = f"stopped by {status}" if isinstance(status, str) else f"it ended with status {status} and no report"
        record.update(status=CRASHED, note=f"{why}: {tail(log, 600)}")
    elif isinstance(status, str):
        record["note"] = f"{record.get('note', '')}; stopped by {status}".strip("; ")
    record["output"] = tail(log, _TAIL)
    return record


def _start(argv: Sequence[str], log: Any, threads: int | None = None) -> subprocess.Popen:
    """A program in the project's folder and in a process group of its own, so that its children end with it."""
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    if threads:
        environment["OMP_NUM_THREADS"] = str(threads)
    environment["PYTHONPATH"] = os.pathsep.join(p for p in (str(root()), os.environ.get("PYTHONPATH", "")) if p)
    return subprocess.Popen(
        argv, stdout=log, stderr=subprocess.STDOUT, cwd=root(), env=environment, start_new_session=True
    )


def end(process: subprocess.Popen) -> None:
    """End a program and its children."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def tail(log: Path, characters: int) -> str:
    """The end of an output, its lines joined where it is short."""
    text = log.read_text(errors="replace").strip() if log.exists() else ""
    text = text[-characters:]
    return " | ".join(text.split("\n")[-4:]) if characters < 1000 else text


def say(sentence: str) -> None:
    print(sentence, flush=True)
