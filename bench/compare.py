"""Names what got slower between two results: `python -m bench.compare OLD.json NEW.json`.

A time is worse when it lies beyond the noise of both files: the new 20th percentile above the old 80th. What fails
now and did not before, takes more than 2 % more memory, or lost more than 1 dB, is worse too. The exit code is 1 where
anything is worse.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any, NamedTuple

from bench import results

MEMORY_SLACK = 1.02
PSNR_SLACK_DB = 1.0


class Change(NamedTuple):
    """One method of one workload that differs by more than noise."""

    workload: str
    method: str
    what: str
    worse: bool


def compare(old: dict[str, Any], new: dict[str, Any]) -> list[Change]:
    """Everything that both results measured and that differs. Raises ValueError for results of two devices."""
    devices = [results.path_of(result).parent.name for result in (old, new)]
    if devices[0] != devices[1]:
        raise ValueError(f"the results are of two machines, {devices[0]} and {devices[1]}: times cannot be compared")
    found = []
    for workload, record in old["workloads"].items():
        for name, before in record["methods"].items():
            after = new["workloads"].get(workload, {}).get("methods", {}).get(name)
            if after is not None:
                found += [Change(workload, name, what, worse) for what, worse in _changes(before, after)]
    return found


def _changes(before: dict[str, Any], after: dict[str, Any]) -> list[tuple[str, bool]]:
    if before["status"] == "ok" and after["status"] in ("failed", "out of memory", "refused"):
        return [(f"ran before, now: {after['reason']}", True)]
    if before["status"] in ("failed", "out of memory", "refused") and after["status"] == "ok":
        return [(f"runs now, before: {before['reason']}", False)]
    found = []
    if "seconds" in before and "seconds" in after:
        a, b = before["seconds"], after["seconds"]
        ratio = f"{a['median'] * 1e3:.4g} -> {b['median'] * 1e3:.4g} ms ({b['median'] / a['median'] - 1:+.0%})"
        if b["p20"] > a["p80"]:
            found.append((f"slower: {ratio}", True))
        elif b["p80"] < a["p20"]:
            found.append((f"faster: {ratio}", False))
    low, high = before.get("peak_bytes"), after.get("peak_bytes")
    if low and high and max(low, high) > MEMORY_SLACK * min(low, high) and abs(high - low) > 10**6:
        found.append((f"memory: {low / 1e6:.0f} -> {high / 1e6:.0f} MB", high > low))
    if abs(drop := before.get("psnr_db", 0.0) - after.get("psnr_db", 0.0)) > PSNR_SLACK_DB and "psnr_db" in after:
        found.append((f"accuracy: {before.get('psnr_db')} -> {after['psnr_db']} dB", drop > 0))
    return found


def machine_changes(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Yardsticks that differ beyond noise: then it is the machine that changed."""
    found = []
    for workload, record in old["workloads"].items():
        other = new["workloads"].get(workload, {})
        for key in ("loop_flop_per_second", "gemm_flop_per_second"):
            for dtype, a in record.get(key, {}).items():
                b = other.get(key, {}).get(dtype)
                if b and (b["p80"] < a["p20"] or b["p20"] > a["p80"]):
                    what = f"{key.partition('_')[0]} {dtype}"
                    rates = f"{a['median'] / 1e9:.0f} -> {b['median'] / 1e9:.0f} GFLOP/s"
                    found.append(f"{workload}: the machine's {what} changed, {rates}")
    return found


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.compare", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    args = parser.parse_args(arguments)
    try:
        old, new = results.load(args.old), results.load(args.new)
        changes = compare(old, new)
    except (OSError, ValueError) as error:
        sys.exit(str(error))
    for line in machine_changes(old, new):
        print(f"note    {line}")
    for change in sorted(changes, key=lambda change: not change.worse):
        print(f"{'WORSE' if change.worse else 'better':8}{change.workload}, {change.method}: {change.what}")
    shared = sum(len(results.timed(old, name) & results.timed(new, name)) for name in old["workloads"])
    worse = sum(change.worse for change in changes)
    print(f"{shared} times compared, {worse} worse, {len(changes) - worse} better")
    return 1 if worse else 0


if __name__ == "__main__":
    sys.exit(main())
