"""compute-sanitizer over a Python program, and what it reports on our kernels."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FINISHED = "all cases ran"  # the last line of a program that did not crash
# Without PyTorch's cache every tensor is an allocation with bounds of its own.
ENVIRONMENT = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "CUDA_MODULE_LOADING": "LAZY", "LIIF_FAST_FIRST_USE_CHECK": "0"}
FINDING = re.compile(
    r"(Invalid|Out-of-range|Misaligned|Uninitialized|Error|Warning|Race|Barrier|Divergent|Program hit|Missing|"
    r"Potential|Malloc|Fatal|Stack|Unused)"
)


def find() -> str | None:
    return shutil.which("compute-sanitizer") or shutil.which("/usr/local/cuda/bin/compute-sanitizer")


def run(tool: str, program: Sequence[str], limit_s: float) -> tuple[list[str], str]:
    """read_output() of a tool over `python -m program`, which prints FINISHED at its end. find() must succeed."""
    options = ["--tool", tool, "--print-limit", "1000", "--error-exitcode", "86"]
    with tempfile.TemporaryFile("w+", errors="replace") as log, contextlib.suppress(subprocess.TimeoutExpired):
        try:
            subprocess.run(
                [str(find()), *options, sys.executable, "-m", *program],
                env={**os.environ, **ENVIRONMENT},
                cwd=ROOT,
                stdout=log,
                stderr=subprocess.STDOUT,
                timeout=limit_s,
                check=False,
            )
        finally:
            log.seek(0)
            output = log.read()
    return read_output(output)


def read_output(output: str) -> tuple[list[str], str]:
    """(reasons to fail, the tool's summary and the reports on kernels of others) of a sanitizer's output."""
    lines = [line.removeprefix("=========").rstrip() for line in output.splitlines() if line.startswith("=========")]
    summary = [line.strip() for line in lines if "SUMMARY" in line]
    reports: list[list[str]] = []
    for line in lines:
        if "SUMMARY" not in line and re.match(r" \S", line):  # a report begins at one space, its details deeper
            reports.append([line.strip()])
        elif reports:
            reports[-1].append(line.strip())
    reports = [report for report in reports if FINDING.match(report[0])]
    ours = [report for report in reports if "liif_fast" in " ".join(report)]
    reasons = [" / ".join(report[:3]) for report in ours]
    counts = [re.search(r"(\d+) (?:errors?|hazards? displayed)", line) for line in summary]
    unseen = sum(int(count[1]) for count in counts if count) - len(reports)
    if unseen > 0:
        reasons.append(f"{unseen} reports that cannot be told apart")
    if FINISHED not in output or not summary:
        reasons.append(f"the cases did not finish in time or crashed: {output[-2000:]}")
    return reasons, f"{'; '.join(summary)}; {len(reports) - len(ours)} reports on kernels of other libraries"
