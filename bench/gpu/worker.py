"""One process that runs one module's checks: `python -m bench.gpu.worker bench.gpu.chain --results FILE ...`.

Every check leaves two lines of JSON: that it began, then what came of it. So whoever started this process knows, when
it dies or hangs, which check did that, and can go on behind it in a new one (`runner.py`).
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from importlib import import_module
from pathlib import Path
from typing import Any

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # or cuBLAS refuses deterministic products

import torch

from bench.gpu.check import SKIPPED, Check, Context, Outcome, broke_the_device, run_check

DEVICE_BROKEN = 70  # exit status: a CUDA error stays in this process, run the other checks in a new one
NO_TIME = "no time was left for it"


def checks_of(module: str, shard: int = 0, shards: int = 1) -> list[Check]:
    """Every `shards`-th check of a module, beginning at number `shard`."""
    return list(import_module(module).checks())[shard::shards]


def run(checks: list[Check], context: Context, results: Path, *, done: set[str], until: float) -> int:
    """Run what is not done yet, until the clock (`time.time()`) says stop; returns the exit status."""
    with results.open("a") as file:

        def say(entry: dict[str, Any]) -> None:
            file.write(json.dumps(entry) + "\n")
            file.flush()

        for check in checks:
            if check.name in done:
                continue
            if time.time() >= until:
                say({"outcome": Outcome(check.name, SKIPPED, NO_TIME).as_dict()})
                continue
            say({"began": check.name})
            outcome = run_check(check, context)
            say({"outcome": outcome.as_dict()})
            if broke_the_device(outcome):
                return DEVICE_BROKEN
            if context.on_gpu:
                torch.cuda.empty_cache()
        say({"finished": True})
    return 0


def read(results: Path) -> tuple[dict[str, dict[str, Any]], str, bool]:
    """Outcomes by name, the check that began and did not end ('' for none), and whether all are done."""
    outcomes: dict[str, dict[str, Any]] = {}
    running, finished = "", False
    for line in results.read_text().splitlines() if results.exists() else ():
        try:
            entry = json.loads(line)
        except ValueError:  # the process died in the middle of a line
            continue
        if "began" in entry:
            running = entry["began"]
        elif "outcome" in entry:
            outcomes[entry["outcome"]["name"]] = entry["outcome"]
            running = ""
        finished = finished or "finished" in entry
    return outcomes, running, finished


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("module", help="a module with a function checks()")
    parser.add_argument("--results", type=Path, required=True, help="file to append lines of JSON to")
    parser.add_argument("--backend", required=True)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--small", action="store_true", help="sizes for a CPU")
    parser.add_argument("--shard", default="0/1", help="i/n: every n-th check, beginning at number i")
    parser.add_argument("--until", type=float, default=float("inf"), help="seconds since 1970 when to stop beginning")
    args = parser.parse_args()
    shard, shards = map(int, args.shard.split("/"))
    outcomes, running, _ = read(args.results)
    done = set(outcomes) | ({running} if running else set())
    device = torch.device(args.device)
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", 0)  # as tensors name it
    context = Context(device, args.backend, args.small)
    return run(checks_of(args.module, shard, shards), context, args.results, done=done, until=args.until)


if __name__ == "__main__":
    sys.exit(main())
