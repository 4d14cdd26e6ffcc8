"""compute-sanitizer over the small cases: no invalid access, race, uninitialized read or wrong barrier in our kernels.

The sanitizer watches PyTorch's kernels too. Their reports are counted and fail nothing.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.gpu import small_cases
from tests.helpers import reason_against

ROOT = Path(__file__).resolve().parents[2]
LIMIT_S = 200
# Without PyTorch's cache every tensor is an allocation with bounds of its own.
ENVIRONMENT = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "CUDA_MODULE_LOADING": "LAZY", "LIIF_FAST_FIRST_USE_CHECK": "0"}
FINDING = re.compile(
    r"(Invalid|Out-of-range|Misaligned|Uninitialized|Error|Warning|Race|Barrier|Divergent|Program hit|Missing|"
    r"Potential|Malloc|Fatal|Stack|Unused)"
)


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
    if small_cases.FINISHED not in output or not summary:
        reasons.append(f"the small cases did not finish within {LIMIT_S} s or crashed: {output[-2000:]}")
    return reasons, f"{'; '.join(summary)}; {len(reports) - len(ours)} reports on kernels of other libraries"


@pytest.mark.timeout(LIMIT_S + 30)
@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "initcheck", "synccheck"])
def test_the_sanitizer_has_no_report_on_our_kernels(device, tool, tmp_path, record_property):
    if reason := reason_against("cuda", "query", torch.float32, device.type):
        pytest.skip(reason)
    sanitizer = shutil.which("compute-sanitizer") or shutil.which("/usr/local/cuda/bin/compute-sanitizer")
    if sanitizer is None:
        pytest.skip("compute-sanitizer is not installed here: it comes with the CUDA toolkit")
    options = ["--tool", tool, "--print-limit", "1000", "--error-exitcode", "86"]
    log = tmp_path / "output"
    with log.open("w") as file, contextlib.suppress(subprocess.TimeoutExpired):
        subprocess.run(
            [sanitizer, *options, sys.executable, "-m", "tests.gpu.small_cases"],
            env={**os.environ, **ENVIRONMENT},
            cwd=ROOT,
            stdout=file,
            stderr=subprocess.STDOUT,
            timeout=LIMIT_S,
            check=False,
        )
    reasons, summary = read_output(log.read_text(errors="replace"))
    record_property(tool, summary)
    assert not reasons
