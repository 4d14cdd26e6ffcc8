"""Makes the development environment: `python3 .ci/environment.py .venv`. A second run only adds what is missing.

A torch >= 2.11 that this Python can import is reused, since torch is gigabytes; otherwise torch 2.13.0 is installed.
Then the build requirements, liif_fast itself (editable) and the packages of its tests are installed.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import venv
from pathlib import Path

TORCH = "torch==2.13.0"
# The release of Triton for that torch, since some builds of torch come without; the kernels' budgets are for it.
TRITON = ["triton>=3.7,<3.8"] if sys.platform == "linux" else []
SPANDREL = ["spandrel==0.4.2", "einops"]
FIND_TORCH = "import pathlib, torch; print(torch.__version__, pathlib.Path(torch.__file__).parent.parent, sep='\\n')"


def importable_torch(python: Path | str) -> Path | None:
    """The folder that holds this Python's torch, or None if it has no torch of version 2.11 or later."""
    found = subprocess.run([python, "-c", FIND_TORCH], capture_output=True, text=True, check=False)
    if found.returncode:
        return None
    version, folder = found.stdout.strip().splitlines()[-2:]
    major, minor = version.split(".")[:2]
    return Path(folder) if (int(major), int(minor)) >= (2, 11) else None


def main() -> None:
    if sys.version_info < (3, 10):  # noqa: UP036 - the Python that runs this may be older
        sys.exit(
            f"error: Python {sys.version.split()[0]} is too old, liif_fast needs 3.10; say `make PYTHON=python3.12`"
        )
    folder = Path(sys.argv[1])
    python = folder / "bin" / "python"
    if not python.exists():
        print(f"creating {folder}", flush=True)
        shared = importable_torch(sys.executable)
        try:
            venv.create(folder, with_pip=True, symlinks=True, system_site_packages=shared is not None)
        except subprocess.CalledProcessError:
            shutil.rmtree(folder, ignore_errors=True)  # a second run would take it for a finished one
            sys.exit(
                f"error: {sys.executable} cannot make an environment with pip (on Debian: apt install python3-venv)"
            )
        if shared and not importable_torch(python):
            # This Python is a virtual environment itself, and `system_site_packages` shows none of its packages.
            packages = Path(next(folder.glob("lib/python*/site-packages")))
            (packages / "reused_torch.pth").write_text(f"{shared}\n")
    pip = [str(python), "-m", "pip", "install", "--quiet"]
    reused = importable_torch(python)
    print(f"reusing the torch in {reused}" if reused else f"installing {TORCH}", flush=True)
    subprocess.run([*pip, "setuptools>=77", "ninja", *([] if reused else [TORCH, *TRITON])], check=True)
    print("installing liif_fast and the packages of its tests", flush=True)
    # Without isolation, since pip would download a second torch for an isolated build.
    subprocess.run([*pip, "--no-build-isolation", "--editable", ".[test]"], check=True)
    # Without its dependencies: it requires torchvision, which requires a torch of its own choice.
    subprocess.run([*pip, "--no-deps", *SPANDREL], check=True)


if __name__ == "__main__":
    try:
        main()
    except subprocess.CalledProcessError as error:
        sys.exit(f"error: `{' '.join(map(str, error.cmd))}` failed; its messages are above")
