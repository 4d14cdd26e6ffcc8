"""What came of a run, as JSON for machines and as Markdown for people; filing it under bench/results/."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bench import machine, results
from bench.gpu import facts
from bench.gpu.check import CRASHED, FAILED, SKIPPED
from bench.gpu.steps import root
from liif_fast.utils.files import write_atomically

JSON, MARKDOWN = "report.json", "report.md"
SCHEMA = 1
_LONGEST = 160  # characters of a note in a table


def write(records: dict[str, dict[str, Any]], out: Path, *, command: str, seconds: float) -> dict[str, Any]:
    """Write both files into `out` and return the report."""
    date = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    found = {"schema": SCHEMA, "date": date, "command": command, "seconds": round(seconds, 1), "steps": records}
    write_atomically(out / JSON, (json.dumps(found, indent=1) + "\n").encode())
    write_atomically(out / MARKDOWN, markdown(found).encode())
    return found


def failed(records: dict[str, dict[str, Any]]) -> list[str]:
    """Names of the steps that failed or crashed."""
    return [name for name, record in records.items() if record["status"] in (FAILED, CRASHED)]


# ----------------------------------------------------------------------------------------------------------- Markdown


def markdown(report: dict[str, Any]) -> str:
    """The report on a few pages: what `summary` says, then the worst values and what was skipped."""
    steps = report["steps"]
    parts = [summary(report)]
    parts += _section("Worst values", ("step", "what", "value", "limit", "check"), list(_worst(steps)))
    parts += _section("Skipped", ("step", "checks", "reason"), list(_skipped(steps)))
    return "\n".join(parts)


def summary(report: dict[str, Any]) -> str:
    """Facts, steps, what failed, promised figures, probes."""
    steps = report["steps"]
    parts = [f"# Checks on {_device(steps)}", "", *_facts(steps), ""]
    parts += _section("Steps", ("step", "result", "seconds", ""), _steps(steps))
    parts += _section("Failed", ("step", "check", "value", "limit"), list(_failures(steps)))
    parts += _section("Promised figures", ("figure", "result", "measured", "wanted"), list(_targets(steps)))
    heads = ("probe", "TFLOP/s", "of cuBLAS", "of the clock", "TB/s arriving", "error")
    parts += _section("Hopper probes", heads, _probes(steps))
    return "\n".join(parts)


def _section(title: str, heads: tuple[str, ...], rows: list[tuple[Any, ...]]) -> list[str]:
    return [f"## {title}", "", *_table(heads, rows), ""] if rows else []


def _table(heads: tuple[str, ...], rows: list[tuple[Any, ...]]) -> Iterator[str]:
    yield "| " + " | ".join(heads) + " |"
    yield "|" + " --- |" * len(heads)
    for row in rows:
        yield "| " + " | ".join(_cell(value) for value in row) + " |"


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3g}"
    text = str(value).replace("|", "/").replace("\n", " ")
    return text if len(text) <= _LONGEST else text[: _LONGEST - 3] + "..."


def _device(steps: dict[str, Any]) -> str:
    described = steps.get("facts", {}).get("machine", {})
    return described.get("gpu") or described.get("cpu") or "an unknown device"


def _facts(steps: dict[str, Any]) -> Iterator[str]:
    found = steps.get("facts", {})
    versions, state = found.get("versions", {}), found.get("state", {})
    yield f"- {found.get('date')}, commit {found.get('commit')}, sources {found.get('sources')}"
    yield "- " + ", ".join(f"{name} {version}" for name, version in versions.items())
    driver = found.get("machine", {}).get("driver")
    if driver:
        yield f"- driver {driver}; " + ", ".join(f"{name} {value}" for name, value in state.items())
    built = found.get("extension", {})
    archs = ", ".join(f"sm_{arch}" for arch in built.get("cuda_archs", ())) or "no architecture"
    yield f"- extension {built.get('sha256')}, CUDA {built.get('cuda')}, {archs}"


def _steps(steps: dict[str, Any]) -> list[tuple[Any, ...]]:
    return [
        (name, record["status"], record.get("seconds", ""), record.get("note", "")) for name, record in steps.items()
    ]


def _checks(steps: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    for name, record in steps.items():
        for check in record.get("checks", ()):
            yield name, check


def _failures(steps: dict[str, Any]) -> Iterator[tuple[Any, ...]]:
    for step, check in _checks(steps):
        if check["status"] == CRASHED:
            yield step, check["name"], check["note"], "no crash"
        elif check["status"] == FAILED:
            missed = [entry for entry in check["measured"] if not entry["met"]]
            for entry in missed:
                yield step, check["name"], _value(entry), f"{entry['what']} {entry['sense']} {_cell(entry['limit'])}"
            if not missed:
                yield step, check["name"], check["note"], ""


def _value(entry: dict[str, Any]) -> str:
    return _cell(entry["value"])


def _worst(steps: dict[str, Any]) -> Iterator[tuple[Any, ...]]:
    """Of every number that was judged, the one nearest to its limit or furthest beyond it, a step and kind."""
    found: dict[tuple[str, str], tuple[float, dict[str, Any], str]] = {}
    for step, check in _checks(steps):
        dtype = check["name"].rsplit(" ", 1)[-1]
        for entry in check["measured"]:
            numbers = [entry["value"], entry["limit"]]
            if entry["sense"] == "is" or any(isinstance(number, (bool, str)) for number in numbers):
                continue
            low, high = numbers if entry["sense"] == "<=" else numbers[::-1]
            share = low / high if high else float(low > 0)
            what = entry["what"] + (f", {dtype}" if dtype in ("fp64", "fp32", "fp16", "bf16") else "")
            if share > found.get((step, what), (0.0,))[0]:  # an error of 0 says nothing
                found[step, what] = (share, entry, check["name"])
    for (step, what), (_, entry, name) in found.items():
        yield step, what, float(entry["value"]), f"{entry['sense']} {_cell(float(entry['limit']))}", name


def _targets(steps: dict[str, Any]) -> Iterator[tuple[Any, ...]]:
    for line in steps.get("bench", {}).get("targets", ()):
        yield line["what"], "reached" if line["met"] else "MISSED", line["measured"], line["wanted"]


def _probes(steps: dict[str, Any]) -> list[tuple[Any, ...]]:
    rows = []
    for name, probe in steps.get("hopper", {}).get("probes", {}).items():
        if isinstance(probe, dict):
            keys = ("tflop_per_second", "of_cublas", "of_clock", "arriving_tb_per_second", "error")
            rows.append((name, *(probe.get(key, "") for key in keys)))
    return rows


def _skipped(steps: dict[str, Any]) -> Iterator[tuple[Any, ...]]:
    reasons: dict[tuple[str, str], list[str]] = {}
    for step, check in _checks(steps):
        if check["status"] == SKIPPED:
            reasons.setdefault((step, check["note"]), []).append(check["name"])
    for (step, reason), names in reasons.items():
        yield step, f"{len(names)}: {', '.join(names[:4])}{' ...' if len(names) > 4 else ''}", reason


# ------------------------------------------------------------------------------------------------------------- filing


def collect(folder: Path, target: Path = results.FOLDER) -> list[Path]:
    """Copy a run's files into bench/results/<device>/; returns where they are.

    Where the run knew no commit (its machine had no git) but was made from exactly these sources, it gets this one.
    Raises ValueError for a folder without a report.
    """
    try:
        report = json.loads((folder / JSON).read_text())
        found, date = report["steps"].get("facts", {}), report["date"][:10]
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"{folder} holds no report of bench.gpu ({error}): run that first") from error
    if found.get("commit") == "unknown" and found.get("sources") == facts.digest(root()):
        found["commit"] = machine.commit()
    place = target / found.get("folder", "unknown-device")
    place.mkdir(parents=True, exist_ok=True)
    filed = [place / f"{date}-checks.json", place / f"{date}-checks.md"]
    write_atomically(filed[0], (json.dumps(report, indent=1) + "\n").encode())
    write_atomically(filed[1], markdown(report).encode())
    for path in sorted(folder.glob("*/*.json")):
        kept = json.loads(path.read_text())
        if kept.get("commit") == "unknown":
            kept["commit"] = found.get("commit", "unknown")
        filed.append(target / path.parent.name / path.name)
        filed[-1].parent.mkdir(parents=True, exist_ok=True)
        write_atomically(filed[-1], (json.dumps(kept, indent=1) + "\n").encode())
    return filed
