"""Result files: bench/results/<device>/<date>-<name>.json, written by a run and never edited."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from bench import machine
from liif_fast.utils.files import write_atomically

FOLDER = Path(__file__).resolve().parent / "results"
SCHEMA = 1


def path_of(result: dict[str, Any], folder: Path = FOLDER) -> Path:
    """Where a result is saved; a second run of the same name on the same day replaces the first."""
    return folder / machine.slug(result["machine"]) / f"{result['date'][:10]}-{result['name']}.json"


def save(result: dict[str, Any], folder: Path = FOLDER) -> Path:
    """Write a result and return where."""
    path = path_of(result, folder)
    path.parent.mkdir(parents=True, exist_ok=True)
    write(result, path)
    return path


def write(result: dict[str, Any], path: Path) -> None:
    """Write a result to a file that is whole at any moment."""
    write_atomically(path, (json.dumps(result, indent=1) + "\n").encode())


def load(path: Path) -> dict[str, Any]:
    """One result. Raises ValueError for a file that is none, OSError for one that cannot be read."""
    try:
        result = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is no JSON: {error}") from error
    if not isinstance(result, dict) or "workloads" not in result:
        raise ValueError(f"{path} is no result of bench.run: it has no workloads")
    if result.get("schema") != SCHEMA:
        raise ValueError(f"{path} has schema {result.get('schema')}, this code reads {SCHEMA}: measure anew")
    return result


def load_all(folder: Path = FOLDER) -> list[dict[str, Any]]:
    """Every saved result of bench.run, oldest first; `path` is added, relative to the folder.

    Other JSON files may lie beside them: what has no workloads is passed over.
    """
    found = []
    for path in sorted(folder.glob("*/*.json")):
        if '"workloads"' in path.read_text():
            found.append({**load(path), "path": path.relative_to(folder).as_posix()})
    return sorted(found, key=lambda result: result["date"])


def timed(result: dict[str, Any], workload: str) -> set[str]:
    """Names of the methods whose time a result holds."""
    methods = result["workloads"].get(workload, {}).get("methods", {})
    return {name for name, entry in methods.items() if "seconds" in entry}


def newest_with(results: list[dict[str, Any]], workload: str, device: str = "cpu") -> dict[str, Any] | None:
    """The newest result of a device type that timed a workload."""
    return newest_with_all(results, [workload], device)


def newest_with_all(results: list[dict[str, Any]], workloads: list[str], device: str) -> dict[str, Any] | None:
    """The newest result of a device type that timed every one of some workloads."""
    for result in reversed(results):
        if result["machine"]["device"] == device and all(timed(result, name) for name in workloads):
            return result
    return None
