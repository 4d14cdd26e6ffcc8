"""Times the workloads and saves one result file: `python -m bench.run [--device cuda] [--budget SECONDS]`.

Needs torch, numpy and what liif_fast itself needs. Workloads run in order of importance until --budget is used up, and
the file is written anew after each of them, so that whatever stops the run costs only what was not yet done. On a GPU
the work is done by a child process: a crash, a hang or a broken device costs one method, which is recorded with the
reason, and the run goes on. Out of memory is a result too.

The last line on stdout is the file's path, below --out: DEVICE/DATE-NAME.json. The exit code is 0 when at least one
method of one workload was timed. Run it on a machine that does nothing else.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

from bench import results, supervise, targets
from bench.session import Session, begin
from bench.workloads import WORKLOADS
from liif_fast.benchmark.cuda_timing import CudaClock
from liif_fast.benchmark.timing import CpuClock


def chosen(only: list[str] | None, quick: bool) -> list[str]:
    """Names of the workloads of a run, in order of importance."""
    if only:
        return [name for name in WORKLOADS if name in only]
    return [name for name, workload in WORKLOADS.items() if workload.quick or not quick]


def _arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.run", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--budget", type=float, metavar="SECONDS", help="nothing is begun after so long; default: none")
    parser.add_argument("--quick", action="store_true", help="only what the project promises")
    parser.add_argument("--only", nargs="+", choices=WORKLOADS, metavar="WORKLOAD", help="see --list")
    parser.add_argument("--rounds", type=int, help="samples of each method; default: the workload's own, 100 on a GPU")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of the CPU")
    parser.add_argument("--name", help="of the result file, behind the date; default: quick, full or some")
    parser.add_argument("--out", type=Path, default=results.FOLDER, metavar="DIR", help="folder for the result file")
    parser.add_argument("--list", action="store_true", help="name the workloads and end")
    parser.add_argument("--resume", type=Path, metavar="FILE", help="go on with a result file that was not finished")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    for option in ("rounds", "threads"):
        value = getattr(args, option)
        if value is not None and value < 1:
            parser.error(f"--{option} is {value}, but must be at least 1")
    if args.budget is not None and args.budget <= 0:
        parser.error(f"--budget is {args.budget:g}, but must be more than 0 seconds")
    return args


def main(arguments: list[str] | None = None) -> int:
    args = _arguments(arguments)
    if args.list:
        for workload in WORKLOADS.values():
            print(f"{workload.name:30}{workload.about}" + (f" (only {workload.device})" if workload.device else ""))
        return 0
    torch.set_num_threads(args.threads)
    if args.child:
        supervise.end_with_parent()
    if args.device == "cuda" and not torch.cuda.is_available():
        sys.exit("--device is cuda, but torch finds no GPU that it can use: choose --device cpu")
    if args.resume:
        try:
            result = results.load(args.resume)
        except (OSError, ValueError) as error:
            sys.exit(str(error))
        if "planned" not in result:
            sys.exit(f"{args.resume} is finished: there is nothing to go on with")
        folder = args.resume.parent.parent
    else:
        name = args.name or ("some" if args.only else "quick" if args.quick else "full")
        command = " ".join(["python -m bench.run", *(sys.argv[1:] if arguments is None else arguments)])
        result = begin(args.device, chosen(args.only, args.quick), name=name, command=command)
        folder = args.out
    if args.device == "cuda" and not args.child:
        path = results.save(result, folder)
        supervise.run(path, supervise.child_command(path, args.budget, args.rounds, args.quick, args.threads))
        result = results.load(path)
    else:
        clock = CpuClock() if args.device == "cpu" else CudaClock()
        session = Session(result, clock, folder, quick=args.quick, rounds=args.rounds, budget=args.budget)
        for name in result["planned"]:
            session.measure(name)
        session.finish()
        path = results.path_of(result, folder)
    if not args.child:
        for verdict in targets.verdicts(result):
            kept = "kept" if verdict.met else "MISSED"
            print(f"{kept:7} {verdict.what}: {verdict.measured} (wanted {verdict.wanted})")
        print(path)
    return 0 if any(results.timed(result, name) for name in result["workloads"]) else 1


if __name__ == "__main__":
    sys.exit(main())
