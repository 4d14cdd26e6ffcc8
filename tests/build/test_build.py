"""The build and its result: setup.py on a throwaway copy, the extension that is there, and what importing does."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from types import ModuleType

import pytest
import torch

from liif_fast.ops.backends import extension

ROOT = Path(__file__).resolve().parents[2]
LIBRARY = ROOT / "liif_fast" / "_C.abi3.so"
HAS_COMPILER = any(shutil.which(name) for name in ("c++", "g++", "clang++"))
needs_compiler = pytest.mark.skipif(not HAS_COMPILER, reason="there is no C++ compiler")
needs_library = pytest.mark.skipif(not LIBRARY.exists(), reason="the extension is not built in place")


def python(project: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run this Python in the project; the build's own variables come only from the test."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("LIIF_FAST_", "CXX"))}
    environment.pop("LD_PRELOAD", None)
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=project, env={**environment, **variables}, capture_output=True, text=True)


def build(project: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    return python(project, "setup.py", "-q", "build_ext", "--inplace", **variables)


def compiled(result: subprocess.CompletedProcess[str]) -> set[str]:
    """The objects that a build has made, without the linked library."""
    assert result.returncode == 0, result.stderr
    lines = [line.split(": ", 1) for line in result.stdout.splitlines() if ": build/" in line]
    return {Path(path).name for _, path in lines if not path.endswith(".so")}


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A copy of the project with a csrc of three tiny files; cpu/one.cpp alone includes one.h."""
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "LICENSE", "Makefile"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "README.md").write_text("# liif_fast\n")
    built = shutil.ignore_patterns("*.so", "_build.json", "__pycache__")
    shutil.copytree(ROOT / "liif_fast", tmp_path / "liif_fast", ignore=built)
    (tmp_path / "csrc" / "cpu").mkdir(parents=True)
    (tmp_path / "csrc" / "bindings").mkdir()
    (tmp_path / "csrc" / "one.h").write_text("inline int one() { return 1; }\n")
    (tmp_path / "csrc" / "bindings" / "library.cpp").write_text("int two();\nint three() { return two() + 1; }\n")
    (tmp_path / "csrc" / "cpu" / "one.cpp").write_text('#include "one.h"\nint two() { return one() + 1; }\n')
    return tmp_path


@pytest.fixture
def setup_module(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """setup.py as a module, with the call of setup() left out."""
    monkeypatch.setattr("setuptools.setup", lambda **_: None)
    monkeypatch.delenv("LIIF_FAST_BUILD", raising=False)
    spec = importlib.util.spec_from_file_location("liif_fast_setup", ROOT / "setup.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "liif_fast_setup", module)  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


# ---- LIIF_FAST_BUILD -------------------------------------------------------------------------------------------------


def test_none_imports_with_one_warning_and_runs_the_reference(project: Path) -> None:
    assert build(project, LIIF_FAST_BUILD="none").returncode == 0
    script = """
import warnings
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import liif_fast
    from liif_fast import ops
ours = [str(one.message) for one in caught if "liif_fast" in str(one.message)]
assert len(ours) == 1 and "LIIF_FAST_BUILD=none" in ours[0], ours
import torch
x, area_weight = ops.gather(torch.rand(1, 3, 4, 5), torch.zeros(1, 2, 2))
assert x.shape == (1, 2, 4, 29) and area_weight.shape == (1, 2, 4)
assert [name for name, runs, _ in ops.backends.report() if runs] == ["reference"]
"""
    result = python(project, "-c", script)
    assert result.returncode == 0, result.stderr


def test_unknown_mode_is_one_sentence(project: Path) -> None:
    result = build(project, LIIF_FAST_BUILD="gpu")
    assert result.returncode != 0
    assert result.stderr.strip() == "error: LIIF_FAST_BUILD is 'gpu': set it to one of auto, cuda, cpu, none"


def test_without_a_compiler_auto_goes_on_and_cpu_stops(project: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    empty = str(tmp_path_factory.mktemp("empty"))
    auto, cpu = build(project, PATH=empty), build(project, PATH=empty, LIIF_FAST_BUILD="cpu")
    assert auto.returncode == 0
    assert (
        "warning: liif_fast: the package is built without its C++ extension: no C++ compiler was found" in auto.stderr
    )
    assert cpu.returncode != 0
    assert cpu.stderr.strip().startswith("error: no C++ compiler was found")
    assert "Traceback" not in cpu.stderr


@needs_compiler
def test_broken_source_removes_the_old_library_in_auto_and_stops_in_cpu(project: Path) -> None:
    library = project / "liif_fast" / "_C.abi3.so"
    assert build(project, LIIF_FAST_BUILD="cpu").returncode == 0
    assert library.exists()
    (project / "csrc" / "cpu" / "one.cpp").write_text("int two() { return ; }\n")
    strict = build(project, LIIF_FAST_BUILD="cpu")
    assert strict.returncode != 0 and library.exists()
    assert "could not make cpu-one.cpp.o of csrc/cpu/one.cpp" in strict.stderr.splitlines()[-1]
    lenient = build(project)
    assert lenient.returncode == 0 and not library.exists()
    assert "warning: liif_fast: the package is built without its C++ extension" in lenient.stderr


def test_cuda_mode_needs_nvcc_and_auto_does_not(setup_module: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(setup_module.shutil, "which", lambda _: None)
    monkeypatch.setattr(setup_module, "cuda_sources", lambda: [Path("csrc/cuda/decode/decode.cu")])
    assert setup_module.find_toolkit() == (
        None,
        "no nvcc was found (looked in CUDA_HOME, on PATH and in /usr/local/cuda)",
    )
    monkeypatch.setattr(setup_module, "MODE", "cuda")
    with pytest.raises(setup_module.BuildError, match=r"^LIIF_FAST_BUILD=cuda: no nvcc was found"):
        setup_module.find_toolkit()
    monkeypatch.setattr(setup_module, "MODE", "cpu")
    assert setup_module.find_toolkit() == (None, "LIIF_FAST_BUILD=cpu")


def test_no_cuda_source_is_as_good_as_no_nvcc(setup_module: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(setup_module, "cuda_sources", list)
    assert setup_module.find_toolkit() == (None, "csrc/cuda holds no .cu file")


@pytest.mark.parametrize(
    ("version", "accepted"), [("2.10.1", False), ("2.11.0+cu130", True), ("3.0.0a0", True), ("1.13.1", False)]
)
def test_torch_must_have_the_stable_abi(
    version: str, accepted: bool, setup_module: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").touch()
    (tmp_path / "torch" / "version.py").write_text(f"__version__ = '{version}'\n")
    spec = importlib.util.spec_from_file_location("torch", tmp_path / "torch" / "__init__.py")
    monkeypatch.setattr(setup_module.importlib.util, "find_spec", lambda _: spec)
    if accepted:
        assert setup_module.find_torch() == (tmp_path / "torch", version)
    else:
        with pytest.raises(setup_module.BuildError, match=rf"^torch {version} is installed, but .* needs torch>=2.11"):
            setup_module.find_torch()


# ---- what is compiled, and when --------------------------------------------------------------------------------------


@needs_compiler
def test_only_what_changed_is_compiled_and_headers_count(project: Path) -> None:
    assert compiled(build(project, LIIF_FAST_BUILD="cpu")) == {"bindings-library.cpp.o", "cpu-one.cpp.o"}
    assert compiled(build(project, LIIF_FAST_BUILD="cpu")) == set()
    (project / "csrc" / "one.h").write_text("inline int one() { return 11; }\n")
    assert compiled(build(project, LIIF_FAST_BUILD="cpu")) == {"cpu-one.cpp.o"}
    (project / "csrc" / "one.h").unlink()
    (project / "csrc" / "cpu" / "one.cpp").write_text("int two() { return 2; }\n")
    assert compiled(build(project, LIIF_FAST_BUILD="cpu")) == {"cpu-one.cpp.o"}


@needs_compiler
def test_sanitised_build_leaves_the_package_alone(project: Path) -> None:
    library = project / "liif_fast" / "_C.abi3.so"
    assert build(project, LIIF_FAST_BUILD="cpu").returncode == 0
    before = library.read_bytes()
    result = build(project, LIIF_FAST_SANITIZE="1")
    if "libasan" in result.stderr:
        pytest.skip("this compiler has no address sanitiser")
    assert compiled(result) == {"bindings-library.cpp.o", "cpu-one.cpp.o"}
    assert b"__asan_init" in (project / "build" / "sanitize" / "_C.abi3.so").read_bytes()
    assert library.read_bytes() == before and b"__asan_init" not in before
    assert compiled(build(project, LIIF_FAST_BUILD="cpu")) == set()


@needs_compiler
def test_cuda_sources_go_through_nvcc_without_a_gpu(project: Path) -> None:
    if shutil.which("nvcc") is None:
        pytest.skip("there is no nvcc on PATH")
    (project / "csrc" / "cuda").mkdir()
    (project / "csrc" / "cuda" / "four.cu").write_text(
        "#ifndef __CUDACC__\n#error not nvcc\n#endif\n"
        "__global__ void four_kernel(int* x) { *x = 4; }\n"
        "void launch_four(int* x) { four_kernel<<<1, 1>>>(x); }\n"
    )
    (project / "csrc" / "bindings" / "library.cpp").write_text(
        "#ifndef LIIF_FAST_WITH_CUDA\n#error no CUDA\n#endif\n"
        "int two();\nvoid launch_four(int* x);\nint three(int* x) { launch_four(x); return two(); }\n"
    )
    result = build(project, LIIF_FAST_BUILD="cuda", LIIF_FAST_CUDA_ARCHS="90a")
    assert compiled(result) == {"bindings-library.cpp.o", "cpu-one.cpp.o", "cuda-four.cu.o"}
    assert '"90a"' in (project / "liif_fast" / "_build.json").read_text()
    report = project / "build" / "objects" / "cuda-four.cu.ptxas.txt"
    assert "four_kernel" in report.read_text() and "ptxas" not in result.stdout + result.stderr
    report.unlink()  # an object without its report is not current
    assert compiled(build(project, LIIF_FAST_BUILD="cuda", LIIF_FAST_CUDA_ARCHS="90a")) == {"cuda-four.cu.o"}
    assert report.exists()
    assert compiled(build(project, LIIF_FAST_BUILD="cuda", LIIF_FAST_CUDA_ARCHS="90a")) == set()
    unknown = build(project, LIIF_FAST_BUILD="cuda", LIIF_FAST_CUDA_ARCHS="7")
    assert unknown.returncode != 0 and "does not know sm_7 of LIIF_FAST_CUDA_ARCHS" in unknown.stderr


@needs_compiler
def test_wheel_serves_every_python_and_carries_the_data(project: Path) -> None:
    (project / "liif_fast" / "weights").mkdir(exist_ok=True)
    (project / "liif_fast" / "weights" / "probe.safetensors").write_bytes(b"")
    result = python(project, "setup.py", "-q", "bdist_wheel", LIIF_FAST_BUILD="cpu")
    assert result.returncode == 0, result.stderr
    (wheel,) = (project / "dist").glob("*.whl")
    assert wheel.name.startswith("liif_fast-0.1.0-cp310-abi3-linux_")
    names = zipfile.ZipFile(wheel).namelist()
    for name in ("_C.abi3.so", "_build.json", "py.typed", "weights/probe.safetensors", "ops/extension.py"):
        assert f"liif_fast/{name}" in names
    assert any(name.startswith("liif_fast/assets/") for name in names)
    assert not any(name.startswith(("tests/", "csrc/", "bench/")) for name in names)


def test_pure_wheel_where_nothing_is_compiled(project: Path) -> None:
    result = python(project, "setup.py", "-q", "bdist_wheel", LIIF_FAST_BUILD="none")
    assert result.returncode == 0, result.stderr
    (wheel,) = (project / "dist").glob("*.whl")
    assert wheel.name == "liif_fast-0.1.0-py3-none-any.whl"
    assert b"LIIF_FAST_BUILD=none" in zipfile.ZipFile(wheel).read("liif_fast/_build.json")


def test_source_distribution_can_be_built_from(project: Path) -> None:
    assert python(project, "setup.py", "-q", "sdist").returncode == 0
    (archive,) = (project / "dist").glob("*.tar.gz")
    with tarfile.open(archive) as opened:
        names = {name.split("/", 1)[-1] for name in opened.getnames()}
    assert {"setup.py", "pyproject.toml", "csrc/one.h", "csrc/bindings/library.cpp", "csrc/cpu/one.cpp"} <= names


# ---- the extension that is there -------------------------------------------------------------------------------------


@needs_compiler
@pytest.mark.skipif(os.environ.get("LIIF_FAST_BUILD") == "none", reason="LIIF_FAST_BUILD=none")
def test_extension_is_there_where_a_compiler_is() -> None:
    assert extension.is_available(), extension.reason()


@needs_library
@pytest.mark.skipif(shutil.which("nm") is None, reason="nm is not installed")
def test_extension_needs_no_unstable_symbol() -> None:
    listing = subprocess.run(["nm", "-D", "-C", LIBRARY], capture_output=True, text=True, check=True).stdout
    undefined = [line.split(" U ", 1)[1] for line in listing.splitlines() if " U " in line]
    assert any(name.startswith(("aoti_torch_", "torch_")) for name in undefined)  # the list is the right one
    assert [name for name in undefined if "c10::" in name or "at::" in name.replace("std::", "")] == []
    defined = [line.split()[-1] for line in listing.splitlines() if " T " in line]
    assert all(name.startswith("PyInit_") for name in defined)


@needs_library
def test_extension_is_small() -> None:
    assert LIBRARY.stat().st_size < 8e6


def test_import_touches_neither_triton_nor_cuda() -> None:
    script = "import sys, torch, liif_fast; print('triton' in sys.modules, torch.cuda.is_initialized())"
    result = python(ROOT, "-W", "ignore", "-c", script)
    assert result.stdout.split() == ["False", "False"], result.stderr


def test_unloadable_files_become_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "_C.abi3.so"
    file.write_text("not a library")
    assert "does not load into torch" in extension._load(file) and "\n" not in extension._load(file)
    assert extension._load(tmp_path / "absent.so").startswith(f"{tmp_path}/absent.so does not exist; build it with")
    monkeypatch.setenv("LIIF_FAST_EXTENSION", str(tmp_path))
    assert extension._load(extension.path()) == f"LIIF_FAST_EXTENSION names '{tmp_path}', which is not a file"
    monkeypatch.setattr(torch, "__version__", "2.10.0")
    assert extension._load(file) == "torch 2.10.0 is installed, but the extension needs torch>=2.11; upgrade torch"
