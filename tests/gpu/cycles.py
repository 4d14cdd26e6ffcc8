"""Builds a program that reads the GPU's clock with nvcc and runs it: `python -m tests.gpu.cycles cycles` prints JSON.

cycles: the phases of the decode for every GPU. hopper_probes: what limits the Hopper decode's products.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
FLAGS = ["-std=c++17", "-O3", "--fmad=false", f"-I{HERE.parents[1] / 'csrc'}"]  # as in setup.py
ARCHS = {"cycles": "native", "hopper_probes": "sm_90a"}


def main() -> None:
    name = sys.argv[1] if sys.argv[1:] else ""
    if name not in ARCHS:
        sys.exit(f"give one of {', '.join(ARCHS)}, not '{name}'")
    nvcc = shutil.which(f"{os.environ.get('CUDA_HOME', '/usr/local/cuda')}/bin/nvcc") or shutil.which("nvcc")
    if nvcc is None:
        sys.exit("nvcc is not installed: set CUDA_HOME to a CUDA toolkit")
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder) / name
        for command in ([nvcc, *FLAGS, f"-arch={ARCHS[name]}", "-o", program, HERE / f"{name}.cu"], [program]):
            if subprocess.run(command, timeout=120).returncode:
                sys.exit(f"{Path(command[0]).name} failed")


if __name__ == "__main__":
    main()
