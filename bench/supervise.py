"""Watches the process that measures on a GPU: when it dies or hangs, the method that did it is recorded and left out.

The measuring process writes what it is about to run into the result file (`running`); so whoever comes after knows
what broke it. A kernel's invalid access breaks a CUDA context for good, which only a new process gets over.
"""

from __future__ import annotations

import ctypes
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench import results

METHOD_LIMIT_S = 200.0  # a method that is prepared, or a round of all of them
RESTARTS = 6
_POLL_S = 0.5
_SET_PARENT_DEATH_SIGNAL = 1  # prctl's PR_SET_PDEATHSIG


def child_command(path: Path, budget: float | None, rounds: int | None, quick: bool, threads: int) -> list[str]:
    """The command that goes on with the result file at `path`."""
    command = [sys.executable, "-m", "bench.run", "--device", "cuda", "--child", "--resume", str(path)]
    command += ["--threads", str(threads)]
    if budget is not None:
        command += ["--budget", str(budget)]
    if rounds is not None:
        command += ["--rounds", str(rounds)]
    return command + (["--quick"] if quick else [])


def end_with_parent() -> None:
    """Let this process be killed when the one that watches it is, so that it does not keep the GPU (Linux)."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "prctl"):
        libc.prctl(_SET_PARENT_DEATH_SIGNAL, signal.SIGKILL)


def run(path: Path, command: Sequence[str], *, method_limit_s: float = METHOD_LIMIT_S) -> int:
    """Run `command` until the result file at `path` is complete; returns how often it had to be started again.

    What was running when a child died or passed `method_limit_s` is added to the file's `lost` methods.
    """
    for restarts in range(RESTARTS + 1):
        reason = _watch(path, command, method_limit_s)
        result = results.load(path)
        running = result.pop("running", None)
        if not reason or "planned" not in result:
            return restarts
        blame(result, running, reason)
        results.write(result, path)
        print(f"  the measuring process {reason}; starting another without what it ran", file=sys.stderr, flush=True)
    return RESTARTS


def blame(result: dict[str, Any], running: dict[str, Any] | None, reason: str) -> None:
    """Leave out what was running: the method, or the whole workload where no single method is known."""
    if running is None:  # broken before or between methods: the next workload is to blame
        left = [name for name in result["planned"] if name not in result["workloads"]]
        running = {"workload": left[0], "method": ""} if left else None
    if running is None:
        return
    workload, method = running["workload"], running["method"]
    if method and method != "all in turns":
        result.setdefault("lost", {}).setdefault(workload, {})[method] = f"the measuring process {reason}"
    else:
        result["workloads"][workload] = {"about": workload, "skipped": f"the process {reason}", "methods": {}}


def _watch(path: Path, command: Sequence[str], method_limit_s: float) -> str:
    """Wait for a child; '' when it ended well, otherwise how it ended."""
    child = subprocess.Popen(command)
    try:
        while child.poll() is None:
            time.sleep(_POLL_S)
            since = results.load(path).get("running", {}).get("since")
            if since is not None and time.time() - since > method_limit_s:
                return f"hung for more than {method_limit_s:.0f} s"
    finally:
        if child.poll() is None:
            child.kill()
        child.wait()
    if "planned" not in results.load(path):
        return ""
    code = child.returncode
    return f"was ended by signal {-code}" if code < 0 else f"ended with exit code {code}"
