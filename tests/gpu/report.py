"""One report of a run on a GPU, from the log of its tests: JSON for programs, Markdown for people, filed by device."""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from liif_fast.utils import tables
from liif_fast.utils.files import write_atomically

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "bench" / "results"
JSON, MARKDOWN, TESTS = "report.json", "report.md", "tests.jsonl"
STATUSES = ("crashed", "timed out", "failed", "skipped", "passed")  # the worst of a test's phases is its own
_SOURCES = ("csrc/**/*", "liif_fast/**/*.py", "bench/**/*.py", "tests/**/*.py", "setup.py")
_LONGEST = 200  # characters of a cell in the Markdown


def digest() -> str:
    """Of the names and contents of the sources: shows whether a machine without git ran exactly these."""
    found = hashlib.sha256()
    for path in sorted({path for pattern in _SOURCES for path in ROOT.glob(pattern) if path.is_file()}):
        if "__pycache__" not in path.parts:
            found.update(path.relative_to(ROOT).as_posix().encode() + b"\0" + path.read_bytes())
    return found.hexdigest()[:16]


def commit() -> str:
    """The commit, with a '+' if files differ from it; 'unknown' without git."""
    return _output("git", "describe", "--always", "--dirty=+", "--abbrev=12", "--exclude=*") or "unknown"


def environment() -> dict[str, Any]:
    """Date, commit, digest of the sources, GPU and driver, and the lines of `liif-fast doctor`."""
    gpu, capability = "no GPU", "none"
    if torch.cuda.is_available():
        gpu, capability = torch.cuda.get_device_name(0), "sm_{}{}".format(*torch.cuda.get_device_capability(0))
    return {
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "commit": commit(),
        "sources": digest(),
        "gpu": gpu,
        "capability": capability,
        "folder": re.sub(r"[^a-z0-9]+", "-", gpu.lower()).strip("-"),  # in bench/results
        "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0") or "unknown",
        "doctor": _output(sys.executable, "-m", "liif_fast", "doctor").replace(f"{ROOT}/", "").splitlines(),
    }


def _output(*command: str) -> str:
    """A program's output; '' if it fails."""
    try:
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=60).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def read_tests(log: Path) -> dict[str, dict[str, Any]]:
    """{name: {status, seconds, note, measured}} of the tests in a log of pytest-reportlog; {} without one.

    A test whose worker died counts as crashed or timed out. A line that was cut off is left out.
    """
    tests: dict[str, dict[str, Any]] = {}
    for line in log.read_text().splitlines() if log.exists() else ():
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        kind, status, note = entry.get("$report_type"), entry.get("outcome"), entry.get("longrepr") or ""
        if kind != "TestReport" and (kind, status) != ("CollectReport", "failed"):
            continue
        if isinstance(note, list):  # a skipped test: file, line, reason
            note = note[2].removeprefix("Skipped: ")
        elif isinstance(note, dict) and note.get("reprcrash"):
            note = "{message} ({path}:{lineno})".format(**note["reprcrash"]).replace(f"{ROOT}/", "")
        if entry.get("when") == "???":  # from pytest-xdist, for a worker that died
            status = "timed out" if note.startswith("timed out") else "crashed"
        test = tests.setdefault(entry["nodeid"], {"status": "passed", "seconds": 0.0, "note": "", "measured": {}})
        test["seconds"] = round(test["seconds"] + entry.get("duration", 0.0), 2)
        test["measured"].update(dict(entry.get("user_properties", ())))
        if STATUSES.index(status) < STATUSES.index(test["status"]):
            test.update(status=status, note="; ".join(filter(None, (str(note), test["note"]))))
    return tests


def write(out: Path, found: dict[str, Any]) -> dict[str, Any]:
    """Write the report into `out`, with the tests that the log there holds so far.

    found: {"command", "environment", "steps": {name: {"status", "seconds", "note", "output"}}}.
    """
    tests, number = read_tests(out / TESTS), (out / TESTS).with_suffix(".count")  # plugin.py wrote the number of tests
    report = {**found, "collected": int(number.read_text()) if number.exists() else len(tests), "tests": tests}
    _save(report, out / JSON, out / MARKDOWN)
    return report


def _save(report: dict[str, Any], json_file: Path, markdown_file: Path) -> None:
    write_atomically(json_file, (json.dumps(report, indent=1) + "\n").encode())
    write_atomically(markdown_file, markdown(report).encode())


def is_good(report: dict[str, Any]) -> bool:
    """Whether every step passed and no test failed, crashed, timed out or did not run."""
    steps = [step["status"] == "passed" for step in report["steps"].values()]
    tests = [test["status"] in ("passed", "skipped") for test in report["tests"].values()]
    return bool(steps) and all(steps + tests) and len(tests) >= report["collected"]


def markdown(report: dict[str, Any]) -> str:
    """The environment, the steps and their last output, failed tests, measured values, reasons for skipping."""
    tests, facts = report["tests"], report["environment"]
    counts = Counter(test["status"] for test in tests.values())
    counts["not run"] = max(report["collected"] - len(tests), 0)
    known = ", ".join(f"{counts[status]} {status}" for status in (*STATUSES, "not run") if counts[status])
    lines = [f"# {'Passed' if is_good(report) else 'FAILED'} on {facts['gpu']}\n", f"- tests: {known}"]
    lines += [f"- {name}: {value}" for name, value in facts.items() if name != "doctor"]
    lines += ["\n```", *facts["doctor"], "```\n"]

    def section(title: str, columns: tuple[str, ...], rows: list[tuple[Any, ...]]) -> None:
        short = [[text if len(text := str(cell)) <= _LONGEST else text[:_LONGEST] + "..." for cell in r] for r in rows]
        lines.extend([f"## {title}\n", tables.markdown(columns, short, "l" * len(columns))] if rows else [])

    bad = {name: test for name, test in tests.items() if test["status"] in STATUSES[:3]}
    for title, found in (("Steps", report["steps"]), ("Failed", bad)):
        rows = [(name, each["status"], each["seconds"], each["note"]) for name, each in found.items()]
        section(title, ("name", "result", "seconds", "note"), rows)
    measured = [(name, *pair) for name, test in tests.items() for pair in test["measured"].items()]
    section("Measured", ("test", "quantity", "value"), measured)
    skipped = Counter(test["note"] for test in tests.values() if test["status"] == "skipped")
    section("Skipped", ("tests", "reason"), [(count, reason) for reason, count in skipped.items()])
    for name, step in report["steps"].items():
        lines += [f"## The last output of {name}\n\n```", step["output"].strip(), "```\n"]
    return "\n".join(lines)


def collect(folder: Path, target: Path = RESULTS) -> list[Path]:
    """Copy a run's files into `target`/<device>; returns the copies.

    A run on a machine without git has no commit. It gets this one if it was made from exactly these sources.
    Raises ValueError for a folder without a report.
    """
    try:
        report = json.loads((folder / JSON).read_text())
        facts = report["environment"]
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"{folder} holds no report of tests.gpu ({error}): run `python -m tests.gpu` first") from error
    report["tests"] = read_tests(folder / TESTS) or report["tests"]  # the log goes on where a run was cut off
    if facts["commit"] == "unknown" and facts["sources"] == digest():
        facts["commit"] = commit()
    place = target / facts["folder"]
    place.mkdir(parents=True, exist_ok=True)
    filed = [place / f"{facts['date'][:10]}-checks.{suffix}" for suffix in ("json", "md")]
    _save(report, *filed)
    for path in sorted(folder.glob("*/*.json")):  # the timings
        result = json.loads(path.read_text())
        if result.get("commit") == "unknown":
            result["commit"] = facts["commit"]
        filed.append(place / path.name)
        write_atomically(filed[-1], (json.dumps(result, indent=1) + "\n").encode())
    return filed
