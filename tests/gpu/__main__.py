"""Tests and times every backend on a GPU within 8 minutes, into one report: `python3 -m tests.gpu --out DIR`.

README.md here lists the files in DIR, and how to bring the command to a machine without a network.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from tests.gpu import report

BUDGET_S = 470.0
SHARES = {
    "hopper-kernel": 0.2,
    "hopper-probes": 0.06,
    "check": 0.1,
    "tests": 0.35,
    "benchmarks": 0.23,
    "cycles": 0.06,
}  # of the budget; seconds left over go to the next steps
LOG = "log.txt"
_TAIL = 3000  # characters of a step's output in the report
PACKAGES = {"pytest": "pytest", "pytest-timeout": "pytest_timeout", "pytest-xdist": "xdist"}  # name: module
PACKAGES |= {"pytest-reportlog": "pytest_reportlog"}


def steps(out: Path, processes: int, backends: str) -> dict[str, list[str]]:
    """The command of each step; `{seconds}` in it becomes the time that the program may plan with."""
    tests = ["pytest", "tests/ops", "tests/gpu", "--backend", backends, "-p", "tests.gpu.plugin", "-q"]
    tests += ["-n", str(processes), "--maxschedchunk", "1", "--max-worker-restart", "100"]
    tests += ["--timeout", "90", "--timeout-method", "thread", "-p", "no:cacheprovider"]
    tests += ["--report-log", str(out / report.TESTS), "--report-log-exclude-logs-on-passed-tests"]
    timings = ["bench.run", "--device", "cuda", "--budget", "{seconds}", "--out", str(out), "--name", "gpu"]
    check = ["liif_fast", "doctor", "--check", "--output", str(out / "check.txt")]
    clocks = {name: ["tests.gpu.cycles", name] for name in ("hopper_probes", "cycles")}
    modules = {"hopper-kernel": ["tests.gpu.hopper"], "hopper-probes": clocks["hopper_probes"], "check": check}
    modules |= {"tests": tests, "benchmarks": timings, "cycles": clocks["cycles"]}
    return {name: [sys.executable, "-m", *words] for name, words in modules.items()}


def run(command: list[str], seconds: float, log: Path) -> dict[str, Any]:
    """Run a step for at most `seconds`, its output appended to `log`; end all its processes."""
    begin = time.monotonic()
    if seconds < 5:
        return {"status": "skipped", "seconds": 0.0, "note": "no time was left", "output": ""}
    command = [word.replace("{seconds}", f"{max(5.0, seconds - 15):.0f}") for word in command]
    with log.open("a") as file:
        print("====", *command, file=file, flush=True)
        start = file.tell()
        child = subprocess.Popen(command, cwd=report.ROOT, stdout=file, stderr=file, start_new_session=True)
        try:
            status = child.wait(seconds)
            ended = {"status": "failed" if status else "passed", "note": f"exit status {status}" if status else ""}
        except subprocess.TimeoutExpired:
            ended = {"status": "timed out", "note": f"stopped after {seconds:.0f} s"}
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
            child.wait()
    output = log.read_bytes()[start:].decode(errors="replace").replace(f"{report.ROOT}/", "")
    return {**ended, "seconds": round(time.monotonic() - begin, 1), "output": output[-_TAIL:]}


def main(arguments: list[str] | None = None) -> int:
    processes = min(12, os.cpu_count() or 1)
    parser = argparse.ArgumentParser(prog="python -m tests.gpu", description=__doc__)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--out", type=Path, metavar="DIR", help="folder for the report")
    what.add_argument("--collect", type=Path, metavar="DIR", help="file a run's report under bench/results/ and end")
    parser.add_argument("--budget", type=float, default=BUDGET_S, metavar="SECONDS", help="default: %(default)s")
    parser.add_argument("--backend", default="cuda,triton", metavar="NAMES", help="default: %(default)s")
    parser.add_argument("--only", nargs="+", choices=SHARES, metavar="STEP", help=f"some of {', '.join(SHARES)}")
    parser.add_argument("-n", type=int, default=processes, help="processes for the tests; default: %(default)s")
    args = parser.parse_args(arguments)
    if args.collect:
        try:
            print(*report.collect(args.collect), sep="\n")
        except ValueError as error:
            sys.exit(f"error: {error}")
        return 0
    missing = [name for name, module in PACKAGES.items() if importlib.util.find_spec(module) is None]
    if missing:
        sys.exit(
            f"error: {', '.join(missing)} not found: run `make gpu-packages` on a machine with a network, bring "
            "build/gpu/packages here and set PYTHONPATH to it"
        )
    facts = report.environment()
    if facts["gpu"] == "no GPU":
        sys.exit("error: torch finds no GPU that it can use: run `make test` for the checks of the CPU")
    args.out.mkdir(parents=True, exist_ok=True)
    out, begin, planned = args.out.resolve(), time.monotonic(), 0.0
    for old in (*out.glob("tests.*"), out / LOG):
        old.unlink(missing_ok=True)
    found = {"command": " ".join(sys.argv), "environment": facts, "steps": {}}
    result = report.write(out, found)
    chosen = args.only or [name for name in SHARES if "hopper" not in name or facts["capability"] == "sm_90"]
    for name, command in steps(out, args.n, args.backend).items():
        planned += SHARES[name] * args.budget
        if name in chosen:
            found["steps"][name] = run(command, planned - (time.monotonic() - begin), out / LOG)
            result = report.write(out, found)
    print(report.markdown(result))
    return 0 if report.is_good(result) else 1


if __name__ == "__main__":
    sys.exit(main())
