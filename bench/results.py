"""Result files: bench/results/<device>/<date>-<name>.json, written by a run and never edited by hand."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

from bench import machine
from liif_fast.utils.files import write_atomically

FOLDER = Path(__file__).resolve().parent / "results"
SCHEMA = 2
USED_UP = "the run's time was used up"  # why a method has no time; documents show no workload with such a method

Results = list[dict[str, Any]]


def begin(name: str, device: str, module: str) -> dict[str, Any]:
    """The part of a result that is known before anything is measured. module: the program's, for the command."""
    described = machine.describe(device)
    if (load := described["load_before"]) > machine.BUSY_LOAD:
        print(f"The load average is {load}: other programs are running, so times will be too long.", file=sys.stderr)
    return {
        "schema": SCHEMA,
        "name": name,
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "command": " ".join([f"python -m {module}", *sys.argv[1:]]),
        "commit": machine.commit(),
        "machine": described,
        "versions": machine.versions(),
    }


def path_of(result: dict[str, Any], folder: Path = FOLDER) -> Path:
    """The path of a saved result; a second run of the same name on the same day replaces the first."""
    return folder / machine.slug(result["machine"]) / f"{result['date'][:10]}-{result['name']}.json"


def save(result: dict[str, Any], folder: Path = FOLDER) -> Path:
    """Write a result and return its path; the file is complete at any moment."""
    path = path_of(result, folder)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, (json.dumps(result, indent=1) + "\n").encode())
    return path


def load(path: Path) -> dict[str, Any]:
    """One result. Raises ValueError for a file without workloads or entries, OSError for an unreadable one."""
    try:
        result = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(result, dict) or not result.keys() & {"workloads", "entries"}:
        raise ValueError(f"{path} is not a result: it has neither workloads nor entries")
    if result.get("schema") != SCHEMA:
        raise ValueError(f"{path} has schema {result.get('schema')}, but this code reads {SCHEMA}: measure again")
    return result


def load_all(folder: Path = FOLDER, name: str = "*") -> Results:
    """Every saved result, or those of a name, oldest first; `path` is added, relative to the folder.

    Other JSON files may lie in the same folders: a file without a schema is skipped.
    """
    found = []
    for path in sorted(folder.glob(f"*/*-{name}.json")):
        if '"schema"' in path.read_text():
            found.append({**load(path), "path": path.relative_to(folder).as_posix()})
    return sorted(found, key=lambda result: result["date"])


def newest_of_each(results: Results, workloads: list[str], device: str = "cpu") -> Results:
    """Of a device type: the newest result that timed all workloads, for each instruction set, the widest first."""
    found: dict[str, dict[str, Any]] = {}
    for result in results:
        records = [result.get("workloads", {}).get(name, {}).get("methods", {}) for name in workloads]
        timed = all(
            any("seconds" in entry for entry in methods.values())
            and not any(entry.get("reason") == USED_UP for entry in methods.values())
            for methods in records
        )
        if timed and result["machine"]["device"] == device:
            found[result["machine"].get("instructions", "")] = result
    return [found[name] for name in sorted(found, key=_width, reverse=True)]


def _width(instructions: str) -> tuple[bool, bool]:
    return "bf16" in instructions, "avx512" in instructions


def newest_with(results: Results, workloads: list[str], device: str = "cpu") -> dict[str, Any] | None:
    """The first of `newest_of_each`."""
    return next(iter(newest_of_each(results, workloads, device)), None)
