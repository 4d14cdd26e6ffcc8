"""The benchmarks as a step: runs `bench.run` on the device for the time it is given and judges the promised figures."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from bench import results, targets
from bench.gpu.check import CRASHED, PASSED
from bench.gpu.steps import root

NAME = "gpu"  # of the result file, behind its date
_MARGIN_S = 15.0  # a method that has begun is finished


def run(device: str, out: Path, seconds: float, *extra: str) -> dict[str, Any]:
    """Time the workloads into `out`; what was measured stays there, however it ends."""
    budget = max(5.0, seconds - _MARGIN_S)
    command = [sys.executable, "-m", "bench.run", "--device", device, "--budget", f"{budget:.0f}"]
    command += ["--out", str(out), "--name", NAME, *extra]
    try:
        ended = f"status {subprocess.run(command, cwd=root(), timeout=seconds, check=False).returncode}"
    except subprocess.TimeoutExpired:
        ended = "its time limit"
    files = sorted(out.glob(f"*/*-{NAME}.json"), key=lambda path: path.stat().st_mtime)
    if not files:
        return {"status": CRASHED, "note": f"bench.run ended with {ended} and left no result"}
    return judge(results.load(files[-1]), files[-1].relative_to(out).as_posix(), ended)


def judge(result: dict[str, Any], file: str, ended: str) -> dict[str, Any]:
    """The promised figures, reached or missed. A missed one fails no step: a timing depends on the day."""
    lines = [verdict._asdict() for verdict in targets.verdicts(result)]
    timed = [name for name in result["workloads"] if results.timed(result, name)]
    if not timed:
        return {"status": CRASHED, "note": f"nothing was timed; bench.run ended with {ended}", "file": file}
    met = sum(line["met"] for line in lines)
    note = f"{len(timed)} workloads timed, {met} of {len(lines)} targets reached"
    return {"status": PASSED, "note": note, "file": file, "targets": lines, "ended": ended}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", type=Path, required=True, help="folder for bench.run's result file")
    parser.add_argument("--report", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=180.0)
    args = parser.parse_args()
    args.report.write_text(json.dumps(run(args.device, args.out, args.seconds)))


if __name__ == "__main__":
    main()
