"""Checks and times every backend on a GPU in minutes: `python -m bench.gpu --out DIR`.

Needs python3 with torch >= 2.11, what liif_fast itself needs and the built extension; no network, no pytest. Where nvcc
or compute-sanitizer are missing, their steps are skipped and say so. Every step runs in processes of its own: a crash
or a hang costs one check. DIR gets report.json, report.md, log.txt and DEVICE/DATE-gpu.json with the timings; then
`python -m bench.gpu --collect DIR` files them under bench/results/.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

from bench.gpu import report, runner, steps

_LOG_BYTES = 4 << 20


def _arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder for the report")
    parser.add_argument("--budget", type=float, default=steps.BUDGET, metavar="SECONDS", help="%(default)s")
    parser.add_argument("--only", nargs="+", metavar="STEP", help="see --list")
    parser.add_argument("--device", default="cuda", help="%(default)s; cpu tries the checks themselves")
    parser.add_argument("--backend", nargs="+", metavar="NAME", help="cuda and triton; on a CPU cpu")
    parser.add_argument("--list", action="store_true", help="name the steps and end")
    parser.add_argument("--collect", type=Path, metavar="DIR", help="file a run's results under bench/results/ and end")
    args = parser.parse_args(arguments)
    if not args.list and (args.out is None) == (args.collect is None):
        parser.error("give either --out or --collect")
    if args.budget <= 0:
        parser.error(f"--budget is {args.budget:g}, but must be more than 0 seconds")
    return args


def _phases(args: argparse.Namespace) -> list[steps.Phase]:
    backends = tuple(args.backend or (("cpu",) if args.device == "cpu" else ("cuda", "triton")))
    phases = steps.phases(args.device, backends)
    known = [step.name for phase in phases for step in phase.steps]
    for name in args.only or ():
        if name not in known:
            sys.exit(f"--only names {name}, which is no step: choose among {', '.join(known)}")
    wanted = set(args.only or known)
    for phase in phases:
        wanted |= {step.needs for step in phase.steps if step.name in wanted and step.needs}
    wanted.add("facts")
    chosen = [phase._replace(steps=tuple(s for s in phase.steps if s.name in wanted)) for phase in phases]
    return [phase for phase in chosen if phase.steps]


def main(arguments: list[str] | None = None) -> int:
    args = _arguments(arguments)
    if args.collect:
        try:
            filed = report.collect(args.collect)
        except ValueError as error:
            sys.exit(f"error: {error}")
        print(*filed, sep="\n")
        return 0
    phases = _phases(args)
    if args.list:
        for phase in phases:
            print(f"{phase.name} ({phase.seconds:.0f} s): {', '.join(step.name for step in phase.steps)}")
        return 0
    args.out.mkdir(parents=True, exist_ok=True)
    command = " ".join(["python -m bench.gpu", *(sys.argv[1:] if arguments is None else arguments)])
    begin = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="liif-fast-gpu-") as scratch:
        setting = runner.Setting(args.device, Path(scratch), args.out.resolve(), small=args.device == "cpu")

        def save(records: dict) -> None:
            report.write(records, args.out, command=command, seconds=time.monotonic() - begin)
            _keep_logs(Path(scratch), args.out / "log.txt")

        records = runner.run_phases(phases, setting, args.budget, save)
    print(report.summary({"steps": records}))
    failed = report.failed(records)
    print(f"{len(records) - len(failed)} of {len(records)} steps without failures in {time.monotonic() - begin:.0f} s")
    if failed:
        print(f"failed: {', '.join(failed)}")
    return 1 if failed else 0


def _keep_logs(scratch: Path, target: Path) -> None:
    """All steps' output in one file: a borrowed machine gives few files back."""
    share = _LOG_BYTES // max(1, len(logs := sorted(scratch.glob("*.log"))))
    with target.open("wb") as file:
        for log in logs:
            file.write(f"==== {log.stem}\n".encode() + log.read_bytes()[-share:] + b"\n")


if __name__ == "__main__":
    sys.exit(main())
