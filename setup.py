"""Builds ``liif_fast/_C.abi3.so``: one extension for every torch >= 2.11 and every Python >= 3.10.

This file is the only home of compiler flags. It writes build/objects/build.ninja, and ninja compiles what has changed.
The extension uses the LibTorch stable ABI, so a build against a CPU torch runs with every torch, and needs no GPU.
torch's headers are found without importing torch, which would take seconds.

LIIF_FAST_BUILD        auto (default): C++ or an error, and CUDA; where CUDA cannot be compiled, a warning
                       cuda: C++ and CUDA, or an error; cpu: C++ without CUDA, or an error; none: pure Python
LIIF_FAST_CUDA_ARCHS   narrows the CUDA architectures, for example "90a" or "80;90a" (PTX is for compute_80 in any case)
TORCH_CUDA_ARCH_LIST   the same for every CUDA extension, for example "8.0;9.0+PTX" (PTX as it says; 9.0 is 90a)
LIIF_FAST_SANITIZE=1   address and undefined-behavior sanitizers, into build/sanitize; the package does not change
CXX, CUDA_HOME, MAX_JOBS   as in torch's own extension builder
"""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

import setuptools
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

MODE = os.environ.get("LIIF_FAST_BUILD") or "auto"
ROOT = Path(__file__).parent.resolve()
CUDA_ARCHS = ("80", "86", "90a", "100", "120")  # GPUs of 8.9 run the code for 8.6, from which theirs would not differ
SANITIZE = os.environ.get("LIIF_FAST_SANITIZE", "0") not in ("", "0")
OBJECTS = Path("build", "sanitize" if SANITIZE else "objects")  # relative to ROOT, where ninja runs

# No -march: code that needs more than the baseline is chosen at run time, function by function.
# No FMA contraction: rounding decides which latent is the nearest, so geometry must round the same everywhere.
# Where a fused multiply-add is safe, kernels call it explicitly (fmaf, _mm512_fmadd_ps).
CXX_FLAGS = ["-std=c++17", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-ffp-contract=off"]
CXX_FLAGS += ["-DTORCH_TARGET_VERSION=0x020b000000000000"]  # the stable ABI of torch 2.11
CXX_FLAGS += ["-Og", "-g1", "-fno-omit-frame-pointer"] if SANITIZE else ["-O3", "-g0"]
# Without four checks that double the compile time. Accesses through such pointers reach the address sanitizer.
SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize=null,object-size,pointer-overflow,vptr"]
SANITIZE_FLAGS = [*SANITIZERS, "-fno-sanitize-recover=undefined"] if SANITIZE else []
NVCC_FLAGS = ["-std=c++17", "-O3", "--fmad=false", "-Xcompiler", "-fPIC,-fvisibility=hidden,-ffp-contract=off,-Wall"]
LINK_FLAGS = ["-shared", "-Wl,-z,relro,-z,now", "-Wl,--version-script=csrc/exports.map"]
# torch is loaded first, and its threads are used, not OpenMP. Not tried: there was no Mac.
MAC_LINK_FLAGS = ["-bundle", "-undefined", "dynamic_lookup", "-Wl,-exported_symbol,_liif_fast_register"]
CUDA_LIBRARIES = ["-lcudart_static", "-ldl", "-lrt", "-lpthread"]


# The names that TORCH_CUDA_ARCH_LIST takes, as torch reads them. Architectures before 8.0 are skipped.
NAMED_ARCHS = {"Maxwell": "5.0", "Pascal": "6.0", "Volta": "7.0", "Turing": "7.5", "Ampere": "8.0;8.6+PTX"}
NAMED_ARCHS |= {"Ada": "8.9+PTX", "Hopper": "9.0+PTX", "Blackwell": "10.0;12.0+PTX"}


class BuildError(Exception):
    """The extension cannot be built; the message is one sentence with the reason."""


# ---- what this machine has -----------------------------------------------------------------------------------------


def on_path(*candidates: str) -> str | None:
    """The first of these programs that exists, as a path."""
    return next((path for candidate in candidates if (path := shutil.which(candidate))), None)


def output_of(*command: str) -> str:
    """The output of a tool, stdout and stderr together."""
    return subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False).stdout


def find_compiler() -> list[str]:
    """The C++ compiler's command: CXX, else the first of c++, g++, clang++ on PATH."""
    chosen = shlex.split(os.environ.get("CXX", ""))
    if path := on_path(*(chosen[:1] or ["c++", "g++", "clang++"])):
        return [path, *chosen[1:]]
    missing = "no C++ compiler was found (looked for CXX, c++, g++, clang++)"
    raise BuildError(f"CXX is {os.environ['CXX']!r}, which is not a command on PATH" if chosen else missing)


def find_ninja() -> str:
    """ninja on PATH, else that of the Python package ninja, whose folder of programs may not be on PATH."""
    installed = [str(file.locate()) for found in metadata.distributions(name="ninja") for file in found.files or ()]
    if path := on_path("ninja", *(path for path in installed if path.endswith("/bin/ninja"))):
        return path
    raise BuildError("ninja, which runs the compilers, was not found (install it: `python -m pip install ninja`)")


def find_torch() -> tuple[Path, str]:
    """The folder and the version of the installed torch, without importing it."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        remedy = "install torch>=2.11, then run `python -m pip install --no-build-isolation --no-cache-dir .`"
        raise BuildError(f"torch was not found while building: {remedy}")
    folder = Path(spec.origin).parent
    version = runpy.run_path(str(folder / "version.py"))["__version__"]
    if tuple(int(part) for part in re.findall(r"\d+", version)[:2]) < (2, 11):
        raise BuildError(f"torch {version} is installed, but the stable ABI used here needs torch>=2.11")
    return folder, version


def sources(pattern: str) -> list[Path]:
    """Files of csrc, relative to ROOT."""
    return sorted(path.relative_to(ROOT) for path in ROOT.glob(f"csrc/{pattern}"))


class Archs(NamedTuple):
    """CUDA architectures as nvcc writes them."""

    compiled: list[str]
    ptx: list[str]
    variable: str  # that names them; "" for the default

    @classmethod
    def wanted(cls) -> Archs:
        """Those of LIIF_FAST_CUDA_ARCHS, else of TORCH_CUDA_ARCH_LIST, else CUDA_ARCHS."""
        words = [word for word in re.split(r"[;,\s]+", os.environ.get("LIIF_FAST_CUDA_ARCHS", "")) if word]
        if words:
            for word in words:
                if not re.fullmatch(r"(sm_)?\d+[af]?", word):
                    sys.exit(f"error: LIIF_FAST_CUDA_ARCHS names {word!r}: write architectures like '80;90a'")
            return cls([word.removeprefix("sm_") for word in words], ["80"], "LIIF_FAST_CUDA_ARCHS")
        words = re.split(r"[;,\s]+", os.environ.get("TORCH_CUDA_ARCH_LIST", "").strip())
        if words[0] in ("", "All", "Common"):
            return cls(list(CUDA_ARCHS), ["80"], "")
        compiled, ptx, skipped = [], [], []
        for word in ";".join(NAMED_ARCHS.get(word, word) for word in words if word).split(";"):
            found = re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", word)
            if found is None:
                sys.exit(f"error: TORCH_CUDA_ARCH_LIST names {word!r}: write capabilities like '8.0;9.0+PTX'")
            arch = "".join(found.groups("")[:3])
            if int(found[1]) < 8:
                skipped.append(word)
                continue
            compiled.append("90a" if arch == "90" else arch)
            ptx += [arch] if found[4] else []
        if skipped:
            warn(f"{', '.join(skipped)} of TORCH_CUDA_ARCH_LIST is skipped: the CUDA kernels need 8.0 or newer")
        if not compiled:
            raise BuildError("TORCH_CUDA_ARCH_LIST names no architecture of 8.0 or newer")
        return cls(list(dict.fromkeys(compiled)), list(dict.fromkeys(ptx)), "TORCH_CUDA_ARCH_LIST")


class Toolkit(NamedTuple):
    """A CUDA toolkit."""

    command: list[str]  # nvcc and its flags, without the architectures
    root: Path
    release: str
    archs: list[str]
    ptx: list[str]

    @classmethod
    def find(cls) -> Toolkit:
        """The toolkit of nvcc, for the architectures of Archs.wanted. The default ones that nvcc lacks are left out."""
        homes = [home for name in ("CUDA_HOME", "CUDA_PATH") if (home := os.environ.get(name))]
        nvcc = on_path(*(f"{home}/bin/nvcc" for home in homes), "nvcc", "/usr/local/cuda/bin/nvcc")
        if nvcc is None:
            raise BuildError("no nvcc was found (looked in CUDA_HOME, on PATH and in /usr/local/cuda)")
        # nvcc may be a wrapper script outside its toolkit, so the toolkit's root comes from nvcc's dry run.
        dry_run = output_of(nvcc, "-dryrun", "-c", "any.cu", "-o", os.devnull)
        top = re.search(r"^#\$ TOP=(.+)$", dry_run, re.MULTILINE)
        release = re.search(r"release (\S+),", output_of(nvcc, "--version"))
        known = set(re.findall(r"sm_(\d+)", output_of(nvcc, "--list-gpu-code")))
        if not (top and release and known):
            raise BuildError(f"{nvcc} does not work as nvcc; repair the CUDA toolkit or set LIIF_FAST_BUILD=cpu")
        wanted = Archs.wanted()
        archs = [arch for arch in wanted.compiled if arch.rstrip("af") in known]
        if wanted.variable and archs != wanted.compiled:
            (first, *_) = set(wanted.compiled) - set(archs)
            sys.exit(f"error: nvcc {release.group(1)} does not support sm_{first} of {wanted.variable}")
        # A quarter of the size; every driver for CUDA 13 unpacks it.
        flags = ["--compress-mode=size"] if int(release.group(1).split(".")[0]) >= 13 else []
        command = [nvcc, *NVCC_FLAGS, *flags, "-Xptxas", "-v"]
        return cls(command, Path(top.group(1).strip()).resolve(), release.group(1), archs, wanted.ptx)

    def gencode(self, source: Path) -> list[str]:
        """nvcc's flags that name the architectures. The Hopper kernels are empty on all but 9.0a."""
        if source.stem.startswith("hopper_") and "90a" in self.archs:
            return ["-gencode=arch=compute_90a,code=sm_90a"]
        flags = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in self.archs]
        # PTX is for GPUs that are newer than these.
        return flags + [f"-gencode=arch=compute_{arch},code=compute_{arch}" for arch in self.ptx]


def why_not() -> str:
    """The reason why the package is pure Python here; '' where it needs its extension."""
    if MODE == "none":
        return "LIIF_FAST_BUILD=none"
    if platform.system() not in ("Linux", "Darwin"):
        return f"the extension is built on Linux and macOS only, and this is {platform.system()}"
    return ""


# ---- compile what has changed --------------------------------------------------------------------------------------


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """One build at a time in a folder."""
    import fcntl  # does not exist on Windows, where the package can be built without the extension

    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def quoted(*words: str) -> str:
    """Words quoted for the shell and for ninja."""
    return shlex.join(words).replace("$", "$$")


def write_ninja(folder: Path, toolkit: Toolkit | None) -> dict[str, object]:
    """Write folder/build.ninja, with the targets _C.abi3.so and `cuda` (nvcc's objects); returns facts for _build.json.

    ninja repeats a command if its text has changed, so every command ends in a comment with the versions of its tools.
    """
    compiler, (torch, torch_version) = find_compiler(), find_torch()
    version = output_of(*compiler, "--version").splitlines()[0]
    tools = f"# {version}, torch {torch_version}"
    cxx = quoted(*compiler, *CXX_FLAGS, *SANITIZE_FLAGS, "-isystem", f"{torch}/include")
    mac = platform.system() == "Darwin"
    link = quoted(*compiler, *(MAC_LINK_FLAGS if mac else LINK_FLAGS), *SANITIZE_FLAGS)
    libraries = [] if mac else [f"-L{torch}/lib", "-ltorch_cpu"]
    compile_one = "-I csrc -MMD -MF $out.d -c $in -o $out"
    headers = "\n  depfile = $out.d\n  deps = gcc"
    cuda, objects = [], []
    lines = [f"builddir = {folder}"]
    if toolkit:
        # ptxas's report on the kernels goes to a file next to the object; other messages go to the terminal as well.
        nvcc = f"{quoted(*toolkit.command)} $archs --threads $$NVCC_THREADS {compile_one} > $out.ptxas.txt 2>&1"
        others = f"code=$$?; grep -vE {quoted('^$|ptxas info|bytes stack frame')} $out.ptxas.txt; exit $$code"
        lines += [f"rule nvcc\n  description = nvcc: $out\n  command = {nvcc}; {others} # {toolkit.release}{headers}"]
        for source in sources("cuda/**/*.cu"):
            cuda.append(f"{folder / source.relative_to('csrc')}.o")
            lines.append(f"build {cuda[-1]} | {cuda[-1]}.ptxas.txt: nvcc {source}")
            lines.append(f"  archs = {quoted(*toolkit.gencode(source))}")
        lines.append(f"build cuda: phony {' '.join(cuda)}")
        libraries += [f"-L{toolkit.root}/{name}" for name in ("lib64", "lib")] + CUDA_LIBRARIES
    lines += [f"rule cxx\n  description = c++: $out\n  command = {cxx} $flags {compile_one} {tools}{headers}"]
    for source in [*sources("bindings/*.cpp"), *sources("cpu/*.cpp")]:
        with_cuda = toolkit and (source.name.startswith("cuda_") or source.name == "library.cpp")
        flags = " -DLIIF_FAST_WITH_CUDA" if with_cuda else ""
        # Two names: builds with and without CUDA, in turns, compile nothing twice.
        objects.append(f"{folder / source.relative_to('csrc')}{'.cuda' if with_cuda else ''}.o")
        lines.append(f"build {objects[-1]}: cxx {source}\n  flags ={flags}")
    lines += [f"rule link\n  description = link: $out\n  command = {link} $in {quoted(*libraries)} -o $out {tools}"]
    lines += [f"build {folder}/_C.abi3.so: link {' '.join(cuda + objects)} | csrc/exports.map", ""]
    (ROOT / folder / "build.ninja").write_text("\n".join(lines))
    release, archs, ptx = (toolkit.release, toolkit.archs, toolkit.ptx) if toolkit else (None, [], [])
    return {"compiler": version, "torch": torch_version, "cuda": release, "cuda_archs": archs, "cuda_ptx": ptx}


def run_ninja(folder: Path, target: str) -> None:
    """Make a target of folder/build.ninja, MAX_JOBS commands at a time; prints their output, raises if one fails.

    If there are more jobs than .cu files, nvcc compiles for several architectures at a time.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    jobs = os.environ.get("MAX_JOBS") or str(cores)
    if not re.fullmatch("[1-9][0-9]*", jobs):
        raise BuildError(f"MAX_JOBS is {jobs!r}: set it to a whole number above 0")
    threads = max(1, int(jobs) // max(1, len(sources("cuda/**/*.cu"))))
    environment = {**os.environ, "NVCC_THREADS": str(threads)}  # outside the command, whose text must not change
    failed = []
    command = [find_ninja(), "-f", f"{folder}/build.ninja", "-j", jobs, target]
    with subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True) as ninja:
        for line in ninja.stdout or ():
            print(line, end="", flush=True)
            failed += re.findall(r"^FAILED: (?:\[code=\d+\] )?(\S+)", line)
    if ninja.returncode:
        raise BuildError(f"ninja could not make {failed[0] if failed else target}")


def build() -> dict[str, object]:
    """Build the extension in OBJECTS; returns facts for _build.json. Mode auto leaves CUDA out if it does not build."""
    find_compiler(), find_torch(), find_ninja()  # a missing tool is no reason against CUDA alone
    why_no_cuda = "LIIF_FAST_BUILD=cpu" if MODE == "cpu" else "LIIF_FAST_SANITIZE covers the C++ code only"
    if MODE != "cpu" and not SANITIZE:
        try:
            facts = write_ninja(OBJECTS, Toolkit.find())
            run_ninja(OBJECTS, f"{OBJECTS}/_C.abi3.so")
            return {**facts, "why_no_cuda": ""}
        except BuildError as error:
            if MODE == "cuda":
                raise BuildError(f"LIIF_FAST_BUILD=cuda: {error}") from None
            why_no_cuda = str(error)
            warn(f"the extension is built without CUDA: {error}")
    facts = write_ninja(OBJECTS, None)
    run_ninja(OBJECTS, f"{OBJECTS}/_C.abi3.so")
    return {**facts, "why_no_cuda": why_no_cuda}


# ---- setuptools ----------------------------------------------------------------------------------------------------


def warn(sentence: str) -> None:
    print(f"warning: liif_fast: {sentence}", file=sys.stderr, flush=True)


def write_facts(folder: Path, facts: dict[str, object]) -> None:
    """_build.json next to the extension: how it was built, or why it is missing."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "_build.json").write_text(json.dumps(facts, indent=1) + "\n")


class BuildExtension(build_ext):
    """Compiles with ninja instead of setuptools."""

    def destination(self) -> Path:
        in_place = self.inplace or self.editable_mode
        return ROOT / "liif_fast" if in_place else Path(self.build_lib).resolve() / "liif_fast"

    def run(self) -> None:
        """Install the extension, or the reason for pure Python. A failure stops: pip would keep a wheel without it."""
        target = self.destination() / "_C.abi3.so"
        if not BUILDS:
            warn(f"the package is built without its C++ extension: {WHY_NOT}")
            target.unlink(missing_ok=True)
            write_facts(target.parent, {"missing": WHY_NOT})
            return
        try:
            if WHY_NOT:
                raise BuildError(WHY_NOT)
            with locked(ROOT / OBJECTS):
                facts = build()
                if SANITIZE:
                    return
                write_facts(target.parent, facts)
                fresh = target.with_name(f"{target.name}.{os.getpid()}")
                shutil.copyfile(ROOT / OBJECTS / target.name, fresh)
                os.replace(fresh, target)  # in one step: a process that has mapped the old file keeps it
        except BuildError as error:
            instead = " (LIIF_FAST_BUILD=none builds a slow package of pure Python)" if MODE == "auto" else ""
            sys.exit(f"error: {error}{instead}")


class BuildPython(build_py):
    """Writes the reason for a missing extension into the package."""

    def run(self) -> None:
        super().run()
        if WHY_NOT and not self.editable_mode:
            write_facts(Path(self.build_lib) / "liif_fast", {"missing": WHY_NOT})


if int(setuptools.__version__.split(".")[0]) < 77:
    wanted = "`python -m pip install --upgrade setuptools ninja`"
    sys.exit(f"error: setuptools {setuptools.__version__} is too old, liif_fast is built by 77 or newer: {wanted}")
if MODE not in ("auto", "cuda", "cpu", "none"):
    sys.exit(f"error: LIIF_FAST_BUILD is {MODE!r}: set it to one of auto, cuda, cpu, none")
WHY_NOT = why_not()
BUILDS = not WHY_NOT or MODE in ("cpu", "cuda")  # these two report the reason as an error
ABI3 = BUILDS and not sysconfig.get_config_var("Py_GIL_DISABLED")  # free-threaded Pythons have no stable ABI
setup(
    ext_modules=[Extension("liif_fast._C", [], py_limited_api=True)] if BUILDS else [],
    cmdclass={"build_ext": BuildExtension, "build_py": BuildPython},
    options={"bdist_wheel": {"py_limited_api": "cp310"}} if ABI3 else {},
)
