"""Result files: bench/results/<device>/<date>-<name>.json, written once and never edited."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from bench import machine

FOLDER = Path(__file__).resolve().parent / "results"
SCHEMA = 1


def save(result: dict[str, Any], folder: Path = FOLDER) -> Path:
    """Write a result and return where; a second run of the same name on the same day replaces the first."""
    path = folder / machine.slug(result["machine"]) / f"{result['date'][:10]}-{result['name']}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(result, indent=1) + "\n")
    temporary.rename(path)
    return path


def load_all(folder: Path = FOLDER) -> list[dict[str, Any]]:
    """Every saved result, oldest first; `path` is added, relative to the folder."""
    found = []
    for path in sorted(folder.glob("*/*.json")):
        result = json.loads(path.read_text())
        if result.get("schema") != SCHEMA:
            raise ValueError(f"{path} has schema {result.get('schema')}, this code reads {SCHEMA}: measure anew")
        found.append({**result, "path": path.relative_to(folder).as_posix()})
    return sorted(found, key=lambda result: result["date"])


def newest_with(results: list[dict[str, Any]], workload: str) -> dict[str, Any] | None:
    """The newest result that measured a workload."""
    return next((result for result in reversed(results) if workload in result["workloads"]), None)
