"""Times every workload and saves one result file: `python -m bench.run [--quick]`.

The whole run takes under a quarter of an hour on two cores, `--quick` two to three minutes: what the project promises
of its CPU kernels, and nothing else. Run it on a machine that does nothing else.
"""

from __future__ import annotations

import argparse
import sys
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from bench import machine, results, targets
from bench.measure import measure
from bench.timing import note
from bench.workloads import WORKLOADS


def run(names: list[str], *, quick: bool, rounds: int | None = None, name: str = "full") -> dict[str, Any]:
    """Measure the named workloads; what a result file holds."""
    described = machine.describe()
    machine.warn_if_busy(described)
    return {
        "schema": results.SCHEMA,
        "name": name,
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "command": " ".join(["python -m bench.run", *sys.argv[1:]]),
        "commit": machine.commit(),
        "machine": described,
        "versions": machine.versions(),
        "workloads": {each: measure(WORKLOADS[each], quick=quick, rounds=rounds) for each in names},
    }


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="only what the project promises")
    parser.add_argument("--only", nargs="+", choices=WORKLOADS, metavar="WORKLOAD", help=", ".join(WORKLOADS))
    parser.add_argument("--rounds", type=int, help="samples of each method; default: the workload's own")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--name", help="of the result file, behind the date; default: quick, full or some")
    parser.add_argument("--results", type=Path, default=results.FOLDER, help="folder for the result file")
    args = parser.parse_args()
    if args.rounds is not None and args.rounds < 1:
        parser.error(f"--rounds is {args.rounds}, but must be at least 1")
    if args.threads < 1:
        parser.error(f"--threads is {args.threads}, but must be at least 1")
    return args


def main() -> None:
    args = _arguments()
    torch.set_num_threads(args.threads)
    names = args.only or [name for name, workload in WORKLOADS.items() if workload.quick or not args.quick]
    name = args.name or ("some" if args.only else "quick" if args.quick else "full")
    result = run(names, quick=args.quick, rounds=args.rounds, name=name)
    path = results.save(result, args.results)
    for target in targets.TARGETS:
        if verdict := targets.judge(target, result["workloads"]):
            kept = "kept" if verdict.met else "MISSED"
            print(f"{kept:7} {verdict.what}: {verdict.measured} (wanted {verdict.wanted})")
    note(f"Saved in {path}. `python -m bench.report` brings it into the README.")


if __name__ == "__main__":
    main()
