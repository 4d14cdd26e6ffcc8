"""Builds cycles.cu with nvcc and runs it: `python -m tests.gpu.cycles` prints the cycles of the decode's phases."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

SOURCE = Path(__file__).resolve().parent / "cycles.cu"
CSRC = SOURCE.parents[2] / "csrc"
FLAGS = ["-std=c++17", "-O3", "--fmad=false", f"-I{CSRC}"]  # as in setup.py


def main() -> None:
    nvcc = shutil.which(f"{os.environ.get('CUDA_HOME', '/usr/local/cuda')}/bin/nvcc") or shutil.which("nvcc")
    if nvcc is None:
        sys.exit("nvcc is not installed: set CUDA_HOME to a CUDA toolkit")
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder) / "cycles"
        for command in ([nvcc, *FLAGS, "-arch=native", "-o", program, SOURCE], [program]):
            if subprocess.run(command, timeout=120).returncode:
                sys.exit(f"{Path(command[0]).name} failed")


if __name__ == "__main__":
    main()
