"""The build and its result: setup.py on a copy of the project, the extension that is installed, and the import."""

import importlib.util
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch

from liif_fast.ops.backends import extension

ROOT = Path(__file__).resolve().parents[2]
LIBRARY = ROOT / "liif_fast" / "_C.abi3.so"
needs_compiler = pytest.mark.skipif(not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="no C++ compiler")
needs_library = pytest.mark.skipif(not LIBRARY.exists(), reason="the extension is not built in place")
BUILD = ("setup.py", "-q", "build_ext", "--inplace")
SOURCES = {
    "one.h": "inline int one() { return 1; }\n",
    "cpu/one.cpp": '#include "one.h"\nint two() { return one() + 1; }\n',
    "bindings/library.cpp": "int two();\nint three() { return two() + 1; }\n",
}
# A stand-in for nvcc with the calls of setup.py. It fails on a source that contains "broken"; others go to c++.
NVCC = """#!/bin/sh
case "$*" in
*-dryrun*) echo "#$ TOP=$(dirname "$0")/.."; exit;;
*--version*) echo "Cuda compilation tools, release 12.9, V12.9.1"; exit;;
*--list-gpu-code*) echo sm_80 sm_90; exit;;
esac
while [ $# -gt 0 ]; do case "$1" in -c) source=$2;; -o) output=$2;; esac; shift; done
echo "ptxas info    : Compiling entry function 'four_kernel' for 'sm_90a'"
grep broken "$source" && exit 1
exec c++ -fPIC -x c++ -c "$source" -o "$output"
"""


def python(project, *arguments, **variables):
    """Run this Python in the project, without the caller's variables for the build."""
    dropped = ("LIIF_FAST_", "CXX", "CUDA_", "TORCH_CUDA_ARCH_LIST", "MAX_JOBS", "LD_PRELOAD")
    environment = {key: value for key, value in os.environ.items() if not key.startswith(dropped)} | variables
    return subprocess.run([sys.executable, *arguments], cwd=project, env=environment, capture_output=True, text=True)


def build(project, mode="cpu", **variables):
    return python(project, *BUILD, LIIF_FAST_BUILD=mode, **variables)


def compiled(result):
    """The objects that a build has made, without the linked library."""
    assert result.returncode == 0, result.stdout + result.stderr
    return {line.rsplit("/", 1)[1] for line in result.stdout.splitlines() if line.startswith("[") and ".o" in line}


def save(file, text):
    """Write a file that is newer than everything built so far, whatever the resolution of the file system's clock."""
    file.write_text(text)
    os.utime(file, ns=(file.stat().st_atime_ns, file.stat().st_mtime_ns + 10**10))


@pytest.fixture
def project(tmp_path):
    """A copy of the project with a csrc of three tiny files; cpu/one.cpp alone includes one.h."""
    shutil.copytree(ROOT / "liif_fast", tmp_path / "liif_fast", ignore=shutil.ignore_patterns("*.so", "_build.json"))
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "LICENSE", "Makefile", "README.md"):
        shutil.copy(ROOT / name, tmp_path)
    for name, text in {**SOURCES, "exports.map": (ROOT / "csrc" / "exports.map").read_text()}.items():
        (tmp_path / "csrc" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "csrc" / name).write_text(text)
    return tmp_path


@pytest.fixture
def toolkit(tmp_path_factory):
    """A CUDA toolkit with the stand-in for nvcc and an empty library."""
    folder = tmp_path_factory.mktemp("toolkit")
    for name, text in {"bin/nvcc": NVCC, "lib64/libcudart_static.a": "!<arch>\n"}.items():
        (folder / name).parent.mkdir()
        (folder / name).write_text(text)
    (folder / "bin" / "nvcc").chmod(0o755)
    return str(folder)


@pytest.fixture
def setup_py(monkeypatch):
    """setup.py as a module, without the call of setup()."""
    monkeypatch.setattr("setuptools.setup", lambda **_: None)
    monkeypatch.setenv("LIIF_FAST_BUILD", "cuda")
    monkeypatch.delenv("LIIF_FAST_SANITIZE", raising=False)
    spec = importlib.util.spec_from_file_location("liif_fast_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# ---- wrong requests and missing tools --------------------------------------------------------------------------------


INSTEAD = " (LIIF_FAST_BUILD=none builds a slow package of pure Python)"


@needs_compiler
@pytest.mark.parametrize(
    ("mode", "variable", "value", "sentence"),
    [
        ("gpu", "", "", "LIIF_FAST_BUILD is 'gpu': set it to one of auto, cuda, cpu, none"),
        ("cpu", "MAX_JOBS", "0", "MAX_JOBS is '0': set it to a whole number above 0"),
        ("cpu", "CXX", "missing -O2", "CXX is 'missing -O2', which is not a command on PATH"),
        ("cpu", "PATH", "/nowhere", "no C++ compiler was found (looked for CXX, c++, g++, clang++)"),
        ("cuda", "LIIF_FAST_CUDA_ARCHS", "x", "LIIF_FAST_CUDA_ARCHS names 'x': write architectures like '80;90a'"),
        ("cuda", "LIIF_FAST_CUDA_ARCHS", "7", "nvcc 12.9 does not support sm_7 of LIIF_FAST_CUDA_ARCHS"),
        ("cuda", "TORCH_CUDA_ARCH_LIST", "x", "TORCH_CUDA_ARCH_LIST names 'x': write capabilities like '8.0;9.0+PTX'"),
        ("cuda", "TORCH_CUDA_ARCH_LIST", "10.0", "nvcc 12.9 does not support sm_100 of TORCH_CUDA_ARCH_LIST"),
        ("auto", "PATH", "/nowhere", f"no C++ compiler was found (looked for CXX, c++, g++, clang++){INSTEAD}"),
    ],
)
def test_errors_are_one_sentence(mode, variable, value, sentence, project, toolkit):
    result = build(project, mode, CUDA_HOME=toolkit, **{variable or "CXX": value})
    assert (result.returncode, result.stderr) == (1, f"error: {sentence}\n")


def test_missing_tools_are_named_with_the_remedy(setup_py, monkeypatch, tmp_path):
    def reason(function):
        with pytest.raises(setup_py.BuildError) as caught:
            function()
        return str(caught.value)

    monkeypatch.setattr(setup_py, "on_path", lambda *_: None)
    assert reason(setup_py.find_ninja).endswith("was not found (install it: `python -m pip install ninja`)")
    assert reason(setup_py.Toolkit.find).startswith("no nvcc was found (looked in CUDA_HOME, on PATH")
    torch_spec = None
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: torch_spec)
    assert reason(setup_py.find_torch) == (
        "torch was not found while building: install torch>=2.11, "
        "then run `python -m pip install --no-build-isolation --no-cache-dir .`"
    )
    torch_spec = importlib.util.spec_from_file_location("torch", tmp_path / "__init__.py")
    (tmp_path / "version.py").write_text("__version__ = '2.10.1'\n")
    assert reason(setup_py.find_torch) == "torch 2.10.1 is installed, but the stable ABI used here needs torch>=2.11"
    (tmp_path / "version.py").write_text("__version__ = '3.0.0a0+cu130'\n")
    assert setup_py.find_torch() == (tmp_path, "3.0.0a0+cu130")


def test_ninja_is_found_when_the_programs_of_this_python_are_not_on_path(setup_py, monkeypatch):
    pytest.importorskip("ninja")
    monkeypatch.setenv("PATH", "/nowhere")
    assert subprocess.run([setup_py.find_ninja(), "--version"]).returncode == 0


@needs_compiler
@pytest.mark.parametrize(("system", "kind"), [("Darwin", "-bundle"), ("Linux", "-shared")])
def test_a_mac_has_a_linker_of_its_own(setup_py, monkeypatch, tmp_path, system, kind):
    monkeypatch.setattr(setup_py.platform, "system", lambda: system)
    monkeypatch.setattr(setup_py, "MODE", "auto")
    setup_py.write_ninja(tmp_path, None)
    link = (tmp_path / "build.ninja").read_text().split("rule link\n")[1].split("\nbuild")[0]
    assert setup_py.why_not() == "" and kind in link and ("relro" in link) == (system == "Linux")


# ---- compiling -------------------------------------------------------------------------------------------------------


@needs_compiler
def test_only_what_changed_is_compiled_and_installed_in_one_step(project):
    library, every = project / "liif_fast" / "_C.abi3.so", {"library.cpp.o", "one.cpp.o"}
    assert compiled(build(project)) == every
    before, mapped = library.read_bytes(), library.open("rb")
    assert compiled(build(project)) == set()
    save(project / "csrc" / "one.h", "inline int one() { return 11; }\n")
    assert compiled(build(project)) == {"one.cpp.o"}
    assert library.read_bytes() != before == mapped.read()  # a process that maps the old file still reads it
    (project / "csrc" / "one.h").unlink()
    save(project / "csrc" / "cpu" / "one.cpp", "int two() { return 2; }\n")
    assert compiled(build(project)) == {"one.cpp.o"}
    (project / "setup.py").write_text((project / "setup.py").read_text().replace("# {version}", "# another {version}"))
    assert compiled(build(project)) == every


@needs_compiler
def test_two_builds_at_once_take_turns(project):
    both = [subprocess.Popen([sys.executable, *BUILD], cwd=project, stdout=subprocess.DEVNULL) for _ in range(2)]
    assert [one.wait() for one in both] == [0, 0]


@pytest.mark.prove
@needs_compiler
def test_broken_source_stops_the_build_and_leaves_the_old_library(project):
    """In every mode but none: pip would keep a wheel without the extension for good."""
    library = project / "liif_fast" / "_C.abi3.so"
    assert build(project).returncode == 0
    save(project / "csrc" / "cpu" / "one.cpp", "int two() { return ; }\n")
    sentence = "error: ninja could not make build/objects/cpu/one.cpp.o"
    for mode, instead in (("cpu", ""), ("auto", INSTEAD)):
        result = build(project, mode, CUDA_HOME="/nowhere", PATH=os.environ["PATH"])
        assert (result.returncode, result.stderr.splitlines()[-1]) == (1, sentence + instead) and library.exists()
    assert "csrc/cpu/one.cpp:1" in result.stdout
    without = build(project, "none")
    assert without.returncode == 0 and not library.exists()
    assert "the package is built without its C++ extension: LIIF_FAST_BUILD=none" in without.stderr


@pytest.mark.prove
@needs_compiler
def test_cuda_sources_go_to_nvcc_and_auto_does_without_them(project, toolkit):
    source, facts = project / "csrc" / "cuda" / "four.cu", project / "liif_fast" / "_build.json"
    source.parent.mkdir()
    source.write_text("int four() { return 4; }\n")
    (project / "csrc/bindings/library.cpp").write_text("#ifndef LIIF_FAST_WITH_CUDA\n#error no CUDA\n#endif\n")
    report = project / "build" / "objects" / "cuda" / "four.cu.o.ptxas.txt"
    result = build(project, "cuda", CUDA_HOME=toolkit, LIIF_FAST_CUDA_ARCHS="90a")
    assert compiled(result) == {"library.cpp.cuda.o", "one.cpp.o", "four.cu.o"} and '"90a"' in facts.read_text()
    assert "ptxas info" in report.read_text() and "ptxas info" not in result.stdout
    report.unlink()  # an object without its report is not current
    assert compiled(build(project, "auto", CUDA_HOME=toolkit, LIIF_FAST_CUDA_ARCHS="90a")) == {"four.cu.o"}
    save(source, "broken\n")
    save(project / "csrc" / "bindings" / "library.cpp", "")
    reason = "ninja could not make build/objects/cuda/four.cu.o"
    failed, result = build(project, "cuda", CUDA_HOME=toolkit), build(project, "auto", CUDA_HOME=toolkit)
    assert failed.stderr == f"error: LIIF_FAST_BUILD=cuda: {reason}\n" and "\nbroken\n" in failed.stdout
    assert result.stderr == f"warning: liif_fast: the extension is built without CUDA: {reason}\n"
    assert f'"why_no_cuda": "{reason}"' in facts.read_text()


@pytest.mark.parametrize(
    ("ours", "torchs", "compiled", "ptx"),
    [
        ("", "", ["80", "86", "90a", "100", "120"], ["80"]),
        ("90a", "8.0", ["90a"], ["80"]),
        ("", "7.0 7.5 8.0 8.6 9.0+PTX", ["80", "86", "90a"], ["90"]),
        ("", "8.6;10.0a;9.0;9.0a+PTX", ["86", "100a", "90a"], ["90a"]),
        ("", "Volta;Ampere;Hopper", ["80", "86", "90a"], ["86", "90"]),
        ("", "All", ["80", "86", "90a", "100", "120"], ["80"]),
    ],
)
def test_architectures_are_those_of_our_variable_then_of_torchs(
    ours, torchs, compiled, ptx, setup_py, monkeypatch, capsys
):
    monkeypatch.setenv("LIIF_FAST_CUDA_ARCHS", ours)
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", torchs)
    assert setup_py.Archs.wanted()[:2] == (compiled, ptx)
    skipped = {"7": "7.0, 7.5", "V": "7.0"}.get(torchs[:1])
    line = f"warning: liif_fast: {skipped} of TORCH_CUDA_ARCH_LIST is skipped: the CUDA kernels need 8.0 or newer\n"
    assert capsys.readouterr().err == (line if skipped else "")


def test_the_hopper_kernels_are_compiled_for_their_architecture_alone(setup_py):
    toolkit = setup_py.Toolkit([], ROOT, "13.0", ["80", "90a"], ["80"])
    hopper, other = Path("cuda/decode/hopper_float16.cu"), Path("cuda/decode/float16.cu")
    codes = [[flag.split("=")[-1] for flag in toolkit.gencode(source)] for source in (hopper, other)]
    assert codes == [["sm_90a"], ["sm_80", "sm_90a", "compute_80"]]
    older = toolkit._replace(archs=["80"])
    assert older.gencode(hopper) == older.gencode(other) != []


def test_only_old_architectures_are_a_reason_against_cuda(setup_py, monkeypatch):
    monkeypatch.delenv("LIIF_FAST_CUDA_ARCHS", raising=False)
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "6.1;7.5+PTX")
    with pytest.raises(setup_py.BuildError, match=r"names no architecture of 8\.0 or newer"):
        setup_py.Archs.wanted()


@needs_compiler
def test_sanitized_build_leaves_the_package_alone(project):
    result = build(project, LIIF_FAST_SANITIZE="1")
    if "libasan" in result.stdout:
        pytest.skip("this compiler has no address sanitizer")
    assert compiled(result) == {"library.cpp.o", "one.cpp.o"}
    assert b"__asan_init" in (project / "build" / "sanitize" / "_C.abi3.so").read_bytes()
    assert not (project / "liif_fast" / "_C.abi3.so").exists() and not (project / "build" / "objects").exists()


# ---- wheels and source distributions ---------------------------------------------------------------------------------


@pytest.mark.prove
@needs_compiler
@pytest.mark.parametrize(
    ("variables", "tag", "missing"),
    [
        ({"LIIF_FAST_BUILD": "cpu"}, "cp310-abi3-linux_", ""),
        ({"LIIF_FAST_BUILD": "none"}, "py3-none-any", "LIIF_FAST_BUILD=none"),
    ],
)
def test_wheel_carries_the_data_and_the_extension_or_the_reason(variables, tag, missing, project):
    result = python(project, "setup.py", "-q", "bdist_wheel", **variables)
    assert result.returncode == 0, result.stderr
    (wheel,) = (project / "dist").glob(f"liif_fast-*-{tag}*.whl")
    with zipfile.ZipFile(wheel) as opened:
        names, facts = set(opened.namelist()), opened.read("liif_fast/_build.json").decode()
    assert f'"missing": "{missing}' in facts if missing else "liif_fast/_C.abi3.so" in names
    assert {f"liif_fast/{name}" for name in ("py.typed", "weights/tiny.safetensors", "assets/demo.png")} <= names
    assert not any(name.startswith(("tests/", "csrc/", "bench/")) for name in names)


@pytest.mark.prove
@pytest.mark.parametrize("tools", ["setuptools", "torch", "compiler"])
def test_no_wheel_without_the_extension_where_a_tool_is_missing(tools, project):
    """pip's isolated builds have no torch: a wheel of pure Python would stay in pip's cache."""
    hide = {
        "torch": "import importlib.util; importlib.util.find_spec = lambda name: None",
        "setuptools": "import setuptools; setuptools.__version__ = '65.5.0'",
        "compiler": "import os; os.environ['PATH'] = '/nowhere'",
    }[tools]
    script = f"{hide}; import sys, runpy; sys.argv[1:] = ['-q', 'bdist_wheel']; runpy.run_path('setup.py')"
    result = python(project, "-c", script)
    assert result.returncode == 1 and not list(project.glob("dist/*.whl"))
    sentence = {
        "torch": "error: torch was not found while building: install torch>=2.11, then run `python -m pip install",
        "setuptools": "error: setuptools 65.5.0 is too old, liif_fast is built by 77 or newer: `python -m pip install",
        "compiler": "error: no C++ compiler was found",
    }[tools]
    assert result.stderr.splitlines()[-1].startswith(sentence)


def test_source_distribution_can_be_built_from(project):
    assert python(project, "setup.py", "-q", "sdist").returncode == 0
    with tarfile.open(*(project / "dist").glob("*.tar.gz")) as opened:
        names = {name.split("/", 1)[-1] for name in opened.getnames()}
    assert {"setup.py", "pyproject.toml", "csrc/exports.map", *(f"csrc/{name}" for name in SOURCES)} <= names


# ---- the installed extension -----------------------------------------------------------------------------------------


@needs_compiler
@pytest.mark.skipif(os.environ.get("LIIF_FAST_BUILD") == "none", reason="LIIF_FAST_BUILD=none")
def test_extension_is_there_where_a_compiler_is():
    assert extension.is_available(), extension.reason()


@needs_library
@pytest.mark.skipif(shutil.which("nm") is None, reason="nm is not installed")
def test_extension_is_small_exports_one_function_and_needs_no_unstable_symbol():
    listing = subprocess.run(["nm", "-D", "-C", LIBRARY], capture_output=True, text=True, check=True).stdout
    undefined = [line.split(" U ", 1)[1] for line in listing.splitlines() if " U " in line]
    assert any(name.startswith(("aoti_torch_", "torch_")) for name in undefined)  # nm lists torch's symbols
    assert [name for name in undefined if "c10::" in name or "at::" in name.replace("std::", "")] == []
    assert [line.split()[-1] for line in listing.splitlines() if " U " not in line and " w " not in line] == [
        "liif_fast_register"
    ]
    assert LIBRARY.stat().st_size < 12e6


@pytest.mark.prove
def test_none_imports_with_one_warning_and_without_triton_and_runs_the_reference(project):
    script = """
import sys, warnings
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import liif_fast, torch
ours = [str(one.message) for one in caught if "liif_fast" in str(one.message)]
assert len(ours) == 1 and "without its C++ extension" in ours[0] and "LIIF_FAST_BUILD=none" in ours[0], ours
assert "triton" not in sys.modules and not torch.cuda.is_initialized()
x, area_weight = liif_fast.ops.gather(torch.rand(1, 3, 4, 5), torch.zeros(1, 2, 2))
assert x.shape == (1, 2, 4, 29) and area_weight.shape == (1, 2, 4)
assert [name for name, runs, _ in liif_fast.ops.backends.report() if runs] == ["torch", "reference"]
"""
    assert build(project, "none").returncode == 0
    result = python(project, "-c", script)
    assert result.returncode == 0, result.stderr


@pytest.mark.prove
@needs_library
def test_a_variable_caps_the_instruction_set():
    """LIIF_FAST_CPU_ISA is read when the extension is loaded, so every value has a process of its own."""
    script = """
import os, torch
for cap in ("auto", "portable", "avx2", "avx512", "sse9"):
    if os.fork():
        os.wait()
        continue
    os.environ["LIIF_FAST_CPU_ISA"] = cap
    try:
        from liif_fast.cli import doctor
        ops, (isa,) = doctor.extension.OPS, [x for x in doctor.report().splitlines() if " LIIF_FAST_CPU_ISA" in x]
        print(ops.cpu_isa(), ops.cpu_has_bf16(), ops.cpu_select_isa("avx512"), *isa.split(), flush=True)
    except RuntimeError as error:
        print(error, flush=True)
    os._exit(0)
"""
    auto, portable, avx2, avx512, unknown = python(ROOT, "-W", "ignore", "-c", script).stdout.splitlines()
    best = auto.split()[0]
    lacks = "LIIF_FAST_CPU_ISA is '{}', which this processor lacks: set it to one of auto, portable"
    assert portable == "portable False False LIIF_FAST_CPU_ISA portable"
    assert avx2 == (lacks.format("avx2") if best == "portable" else "avx2 False False LIIF_FAST_CPU_ISA avx2")
    assert avx512.startswith(f"{best} " if best.startswith("avx512") else lacks.format("avx512"))
    assert unknown == "LIIF_FAST_CPU_ISA is 'sse9': set it to one of auto, avx512, avx2, neon, portable"


def test_unloadable_files_become_one_sentence(tmp_path, monkeypatch):
    file = tmp_path / "_C.abi3.so"
    file.write_text("not a library")
    assert "does not load into torch" in extension._load(file) and "\n" not in extension._load(file)
    assert extension._load(tmp_path / "absent.so").startswith(f"{tmp_path}/absent.so does not exist; build it by")
    monkeypatch.setenv("LIIF_FAST_EXTENSION", str(tmp_path))
    assert extension._load(extension.path()) == f"LIIF_FAST_EXTENSION names '{tmp_path}', which is not a file"
    monkeypatch.setattr(torch, "__version__", "2.10.0")
    assert extension._load(file) == "torch 2.10.0 is installed, but the extension needs torch>=2.11; upgrade torch"
