"""compute-sanitizer over the small cases: `python -m bench.gpu.sanitizer memcheck --report FILE --seconds N`.

Its report separates our kernels from PyTorch's: what initcheck says about a library's padding is not ours to mend.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from bench.gpu.check import CRASHED, FAILED, PASSED, SKIPPED
from bench.gpu.steps import root

TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
FINISHED = "all small cases ran"
_OURS = re.compile(r"liif_fast|_kernel\b.*liif", re.IGNORECASE)
_SHOWN = 5


def find() -> str | None:
    """compute-sanitizer on PATH or beside the usual toolkit."""
    return shutil.which("compute-sanitizer") or shutil.which("/usr/local/cuda/bin/compute-sanitizer")


def command(tool: str, sanitizer: str) -> list[str]:
    # Without PyTorch's cache every tensor is an allocation of its own, so that its bounds are known.
    return [
        sanitizer,
        "--tool",
        tool,
        "--print-limit",
        "1000",
        "--error-exitcode",
        "86",
        sys.executable,
        "-m",
        "bench.gpu.small_cases",
    ]


def parse(output: str) -> dict[str, Any]:
    """Counts and sentences of a sanitizer's output: {'summary', 'ours', 'others', 'examples', 'finished'}.

    summary: the tool's closing lines. ours, others: reports that name a kernel of ours, or not. examples: the first
    lines of ours, else of the others. finished: whether every small case ran.
    """
    said = [line[len("=========") :].rstrip() for line in output.splitlines() if line.startswith("=========")]
    summary = [line.strip() for line in said if re.search(r"\bSUMMARY\b", line)]
    reports: list[list[str]] = []
    for line in said:
        text = line.strip()
        if not text or "SUMMARY" in text or text.startswith(("COMPUTE-SANITIZER", "LEAK")):
            continue
        # A report begins at one space; what explains it is indented deeper.
        if re.match(r" \S", line):
            reports.append([text])
        elif reports:
            reports[-1].append(text)
    reports = [report for report in reports if _is_finding(report)]
    ours = [report for report in reports if any(_OURS.search(line) for line in report)]
    others = [report for report in reports if report not in ours]
    examples = [" / ".join(report[:3]) for report in (ours or others)[:_SHOWN]]
    counted = sum(int(n) for line in summary for n in re.findall(r"(\d+) (?:errors?|hazards? displayed)", line)[:1])
    return {
        "summary": summary,
        "ours": len(ours),
        "others": len(others),
        "unseen": max(0, counted - len(reports)),
        "examples": examples,
        "finished": FINISHED in output,
    }


def _is_finding(report: list[str]) -> bool:
    return bool(
        re.match(
            r"(Invalid|Out-of-range|Misaligned|Uninitialized|Error|Warning|Race|Barrier|Divergent|Program hit|"
            r"Missing|Potential|Malloc|Fatal|Stack|Unused)",
            report[0],
        )
    )


def judge(found: dict[str, Any], status: int | None) -> tuple[str, str]:
    """(status, note) of a step. status: the sanitizer's exit status, None where it was stopped."""
    note = "; ".join(found["summary"]) or "no summary"
    if found["others"]:
        note += f"; {found['others']} reports on kernels that are not ours"
    if found["ours"]:
        return FAILED, f"{found['ours']} reports on our kernels: {found['examples'][0]}; {note}"
    if found["unseen"]:
        return FAILED, f"{found['unseen']} reports that could not be told apart: {note}"
    if status is None:
        return CRASHED, f"stopped by its time limit; {note}"
    if not found["finished"] or not found["summary"]:
        return CRASHED, f"the small cases did not finish (status {status}); {note}"
    return PASSED, note


def run(tool: str, seconds: float) -> dict[str, Any]:
    sanitizer = find()
    if sanitizer is None:
        return {"status": SKIPPED, "note": "compute-sanitizer is not installed here"}
    argv = command(tool, sanitizer)
    status: int | None
    try:
        process = subprocess.run(
            argv,
            cwd=root(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            timeout=seconds,
            check=False,
            env=_environment(),
        )
        output, status = process.stdout, process.returncode
    except subprocess.TimeoutExpired as late:
        raw = late.stdout or b""
        output, status = raw.decode(errors="replace") if isinstance(raw, bytes) else raw, None
    sys.stdout.write(output)
    found = parse(output)
    verdict, note = judge(found, status)
    return {"status": verdict, "note": note, "tool": tool, "command": " ".join(argv[:-3]), **found}


def _environment() -> dict[str, str]:
    return {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "CUDA_MODULE_LOADING": "LAZY"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tool", choices=TOOLS)
    parser.add_argument("--report", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=120.0)
    args = parser.parse_args()
    args.report.write_text(json.dumps(run(args.tool, args.seconds)))


if __name__ == "__main__":
    main()
