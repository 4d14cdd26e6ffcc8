"""What a report says about where it was made: device, driver, clocks, versions, tools, and exactly which sources."""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import time
from pathlib import Path
from typing import Any

from bench import machine
from bench.gpu import hopper, sanitizer
from bench.gpu.check import FAILED, PASSED
from bench.gpu.steps import root
from liif_fast.ops import backends
from liif_fast.ops.backends import extension

# What decides a result; documents and results do not.
_SOURCES = ("csrc/**/*", "liif_fast/**/*.py", "bench/**/*.py", "tests/helpers.py", "setup.py")


def digest(folder: Path) -> str:
    """Of the sources' names and contents: tells whether a report was made from them, where there is no git."""
    found = hashlib.sha256()
    files = {path for pattern in _SOURCES for path in folder.glob(pattern) if path.is_file()}
    for path in sorted(files):
        if "__pycache__" not in path.parts:
            found.update(path.relative_to(folder).as_posix().encode() + b"\0" + path.read_bytes())
    return found.hexdigest()[:16]


def extension_digest() -> str:
    path = extension.path()
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16] if path.is_file() else "missing"


def gather(device: str) -> dict[str, Any]:
    """Everything, and one sentence on what is missing; imports torch and asks the device."""
    import torch

    kind = "cuda" if device.startswith("cuda") else "cpu"
    record: dict[str, Any] = {
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "commit": machine.commit(),
        "sources": digest(root()),
        "extension": {"sha256": extension_digest(), **extension.build_facts()},
        "versions": machine.versions(),
        "tools": {
            "nvcc": hopper.find_nvcc() or "missing",
            "compute-sanitizer": sanitizer.find() or "missing",
            "git": shutil.which("git") or "missing",
        },
        "backends": {name: why or "runs" for name, _, why in backends.report()},
    }
    if kind == "cuda" and not torch.cuda.is_available():
        return {"status": FAILED, "note": "torch finds no GPU that it can use", **record}
    name = torch.cuda.get_device_name(0) if kind == "cuda" else "cpu"
    record["folder"], record["devices"] = machine.slug({"device": "cuda", "gpu": name}), 1
    try:
        record["machine"], record["state"] = machine.describe(kind), machine.state(kind)
        record["folder"] = machine.slug(record["machine"])
        record["devices"] = torch.cuda.device_count() if kind == "cuda" else 1
    except Exception as error:  # a tool that answers otherwise here must not cost the run
        record["machine"], record["state"] = {"device": kind, "gpu": name, "unknown": str(error)}, {}
    return {"status": PASSED, "note": f"{name}, torch {record['versions']['torch']}", **record}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--report", type=Path, required=True)
    args = parser.parse_args()
    args.report.write_text(json.dumps(gather(args.device)))


if __name__ == "__main__":
    main()
