"""`liif-fast doctor`: the installed versions, the devices, and the backends that can run or the reason why not.

`--check` runs them, and writes a file to attach to a report.
"""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import liif_fast
from liif_fast.ops import backends
from liif_fast.ops.backends import extension
from liif_fast.utils.files import write_atomically
from liif_fast.utils.hardware import cpu_model

VARIABLES = tuple(
    f"LIIF_FAST_{name}" for name in ("BACKEND", "CPU_ISA", "EXTENSION", "CACHE", "FIRST_USE_CHECK", "HOPPER")
)
_PAPER = (256, 256, 256, 256, 3)  # the layers of the paper's imnet


def _installed(name: str) -> str:
    """A distribution's version, found without importing it."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "not installed"


def _versions() -> Iterator[tuple[str, str]]:
    yield "liif_fast", liif_fast.__version__
    yield "python", f"{platform.python_version()} on {platform.system()} {platform.machine()}"
    yield "torch", f"{torch.__version__}, {f'for CUDA {torch.version.cuda}' if torch.version.cuda else 'without CUDA'}"
    yield "triton", _installed("triton")
    yield "numpy", _installed("numpy")


def _extension() -> Iterator[tuple[str, str]]:
    if not extension.is_available():
        yield "missing", extension.reason()
        return
    facts = extension.build_facts()
    yield "file", str(extension.path())
    if "compiler" not in facts:
        yield "built with", "unknown: there is no _build.json next to the file"
        return
    yield "built with", f"{facts['compiler']}, torch {facts['torch']}"
    if facts["cuda"]:
        archs, ptx = (", ".join(facts.get(name, ())) for name in ("cuda_archs", "cuda_ptx"))
        yield "CUDA toolkit", f"{facts['cuda']}, for architectures {archs}, with PTX for {ptx or 'none'}"
    else:
        yield "CUDA toolkit", f"none ({facts['why_no_cuda']})"


def _devices() -> Iterator[tuple[str, str]]:
    yield "cpu", cpu_model()
    if extension.is_available() and hasattr(extension.OPS, "cpu_isa"):
        yield "instructions", extension.OPS.cpu_isa()
    yield "threads", f"{torch.get_num_threads()} of {os.cpu_count()}"
    if not torch.cuda.is_available():
        yield "cuda", "this torch is built without CUDA" if torch.version.cuda is None else "no GPU that torch can use"
        return
    for index in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(index)
        yield f"cuda:{index}", f"{gpu.name}, sm_{gpu.major}{gpu.minor}, {gpu.total_memory / 2**30:.0f} GiB"


def _backends() -> Iterator[tuple[str, str]]:
    for name, runs, reason in backends.report():
        yield name, "runs" if runs else f"cannot run: {reason}"
        if name == "cuda" and runs:
            request = backends.OpRequest("decode", "cuda", torch.bfloat16, _PAPER)
            against = backends.against_hopper(request)
            yield (
                "cuda, Hopper kernel",
                f"left out: {against}" if against else "runs; not yet run on a GPU by its authors",
            )


def _environment() -> Iterator[tuple[str, str]]:
    for name in VARIABLES:
        yield name, os.environ.get(name) or "not set"


def report() -> str:
    """The report as text, one `name  value` per line under five headings."""
    sections = {
        "Versions": _versions(),
        "Extension": _extension(),
        "Devices": _devices(),
        "Backends": _backends(),
        "Environment": _environment(),
    }
    lines = []
    for title, rows in sections.items():
        lines.append(title)
        lines += [f"  {name:<25} {value}" for name, value in rows]
    return "\n".join(lines)


def add(commands: Any) -> None:
    """Add the subcommand to argparse's."""
    parser = commands.add_parser("doctor", help="show what is installed and which backends can run here, or why not")
    parser.add_argument("--check", action="store_true", help="also run every backend on every device, for a minute")
    target = "file for the report of --check (default: %(default)s)"
    parser.add_argument("--output", type=Path, default=Path("liif-fast-check.txt"), metavar="FILE", help=target)
    parser.set_defaults(run=lambda options: check(options.output) if options.check else main())


def main() -> int:
    """Print the report; returns 0, because a missing backend is not an error."""
    sys.stdout.write(report() + "\n")
    return 0


def check(file: Path) -> int:
    """Run every backend on every device, print the table, and write it after the report to `file`.

    Returns 1 where a backend is wrong, crashes or hangs. Raises OSError for a file that cannot be written.
    """
    from liif_fast.benchmark import check as checks  # imports torch.utils.benchmark, which other commands do not need

    text = report().replace(str(Path.home()), "~")
    write_atomically(file, f"{text}\n".encode())  # a file that cannot be written is no surprise after a minute
    rows = checks.check_all(checks.devices())
    table = checks.render(rows)
    write_atomically(file, f"{text}\nCheck\n{table}".encode())
    sys.stdout.write(f"{table}\nThe report is in {file}. Attach it to an issue if a backend is not right.\n")
    return 0 if all(row.result in ("right", "refused") for row in rows) else 1
