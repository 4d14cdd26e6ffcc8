"""Builds ``liif_fast/_C.abi3.so``: one extension for every torch >= 2.11 and every Python >= 3.10.

This file is the only home of compiler flags. It compiles against the LibTorch stable ABI, so a CPU torch is enough to
build for all of them, and no GPU is asked for. torch is not imported (that takes seconds), only its headers are found.

LIIF_FAST_BUILD        auto (default): C++ always, CUDA when nvcc is found; what is missing is left out with a warning
                       cuda: C++ and CUDA, or an error; cpu: C++ without CUDA, or an error; none: pure Python
LIIF_FAST_CUDA_ARCHS   narrows the CUDA architectures, for example "90a" or "80;90a" (PTX is for compute_80 in any case)
LIIF_FAST_SANITIZE=1   address and undefined-behaviour sanitisers, into build/sanitize; the package stays as it is
CXX, CUDA_HOME, MAX_JOBS   as in torch's own extension builder
"""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent.resolve()
MODES = ("auto", "cuda", "cpu", "none")
MIN_TORCH = (2, 11)
CUDA_ARCHS = ("80", "86", "89", "90a", "100", "120")
SANITIZE = os.environ.get("LIIF_FAST_SANITIZE", "0") not in ("", "0")
OBJECTS = ROOT / "build" / ("sanitize" if SANITIZE else "objects")
FREE_THREADED = bool(sysconfig.get_config_var("Py_GIL_DISABLED"))

# No -march: what needs more than the baseline chooses it at run time, function by function.
# No FMA contraction: rounding decides which latent is the nearest, so geometry must round the same everywhere.
# Kernels that want a fused multiply-add ask for it by name (fmaf, _mm512_fmadd_ps).
CXX_FLAGS = ["-std=c++17", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-ffp-contract=off"]
CXX_FLAGS += ["-O1", "-g", "-fno-omit-frame-pointer"] if SANITIZE else ["-O3", "-g0"]
SANITIZE_FLAGS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"] if SANITIZE else []
DEFINES = ["-DTORCH_TARGET_VERSION=0x020b000000000000"]
NVCC_FLAGS = ["-std=c++17", "-O3", "--fmad=false", "-Xcompiler", "-fPIC,-fvisibility=hidden,-ffp-contract=off,-Wall"]
LINK_FLAGS = ["-shared", "-Wl,-z,relro,-z,now"]
PTXAS_LINES = re.compile(r"ptxas info|\s+\d+ bytes stack frame")  # of a report; what is no such line is for people
CUDA_LIBRARIES = ["-lcudart_static", "-ldl", "-lrt", "-lpthread"]


class BuildError(Exception):
    """The extension cannot be built; the message is the one sentence why."""


class CudaBuildError(BuildError):
    """nvcc failed; the C++ half may still be fine."""


# ---- what this machine has -----------------------------------------------------------------------------------------


def build_mode() -> str:
    """LIIF_FAST_BUILD; exits with one sentence when it is none of the four words."""
    mode = os.environ.get("LIIF_FAST_BUILD") or "auto"
    if mode not in MODES:
        sys.exit(f"error: LIIF_FAST_BUILD is {mode!r}: set it to one of {', '.join(MODES)}")
    return mode


def find_compiler() -> list[str]:
    """The C++ compiler's command: CXX, else the first of c++, g++, clang++ on PATH."""
    if chosen := shlex.split(os.environ.get("CXX", "")):
        if shutil.which(chosen[0]) is None:
            raise BuildError(f"CXX is {os.environ['CXX']!r}, which is no command on PATH")
        return chosen
    for name in ("c++", "g++", "clang++"):
        if path := shutil.which(name):
            return [path]
    raise BuildError("no C++ compiler was found (looked for CXX, c++, g++, clang++)")


def find_torch() -> tuple[Path, str]:
    """The folder and the version of the installed torch, without importing it (that takes seconds)."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        raise BuildError(
            "torch could not be imported while building (install torch>=2.11, then use --no-build-isolation)"
        )
    folder = Path(spec.origin).parent
    found = re.search(r"__version__\s*=\s*['\"]([^'\"]+)", (folder / "version.py").read_text())
    version = found.group(1) if found else "0.0"
    if tuple(int(part) for part in re.findall(r"\d+", version)[:2]) < MIN_TORCH:
        raise BuildError(f"torch {version} is installed, but the stable ABI used here needs torch>=2.11")
    return folder, version


def find_nvcc() -> str:
    """nvcc of CUDA_HOME or CUDA_PATH, else of PATH, else of /usr/local/cuda."""
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")]
    candidates = [f"{home}/bin/nvcc" for home in homes if home] + ["nvcc", "/usr/local/cuda/bin/nvcc"]
    for candidate in candidates:
        if path := shutil.which(candidate):
            return path
    raise BuildError("no nvcc was found (looked in CUDA_HOME, on PATH and in /usr/local/cuda)")


def ask(*command: str) -> str:
    """What a tool prints, stdout and stderr together."""
    result = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    return result.stdout


@dataclass
class Toolkit:
    """nvcc, the root of its toolkit (nvcc may be a wrapper script, so it is asked), its release and its targets."""

    nvcc: str
    root: Path
    release: str
    archs: list[str]

    @classmethod
    def find(cls, source: Path) -> Toolkit:
        nvcc = find_nvcc()
        top = re.search(r"^#\$ TOP=(.+)$", ask(nvcc, "-dryrun", "-c", str(source), "-o", os.devnull), re.MULTILINE)
        release = re.search(r"release (\S+),", ask(nvcc, "--version"))
        known = set(re.findall(r"sm_(\d+)", ask(nvcc, "--list-gpu-code")))
        if not (top and release and known):
            raise BuildError(f"{nvcc} does not answer as nvcc does; repair the CUDA toolkit or set LIIF_FAST_BUILD=cpu")
        wanted = [
            word.removeprefix("sm_")
            for word in re.split(r"[;,\s]+", os.environ.get("LIIF_FAST_CUDA_ARCHS", ""))
            if word
        ]
        for word in wanted:
            if not re.fullmatch(r"\d+[af]?", word):
                sys.exit(f"error: LIIF_FAST_CUDA_ARCHS names {word!r}: write architectures like '80;90a'")
        archs = [arch for arch in wanted or CUDA_ARCHS if arch.rstrip("af") in known]
        if missing := [arch for arch in wanted if arch not in archs]:
            sys.exit(f"error: nvcc {release.group(1)} does not know sm_{missing[0]} of LIIF_FAST_CUDA_ARCHS")
        return cls(nvcc, Path(top.group(1).strip()).resolve(), release.group(1), archs)

    def gencode(self) -> list[str]:
        flags = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in self.archs]
        return [*flags, "-gencode=arch=compute_80,code=compute_80"]  # PTX: the catch-all for what comes later

    def compression(self) -> list[str]:
        """A quarter of the size. From CUDA 13 on: every driver that goes with it can unpack that."""
        return ["--compress-mode=size"] if int(self.release.split(".")[0]) >= 13 else []


# ---- compile what changed ------------------------------------------------------------------------------------------


@dataclass
class Step:
    """One compiler call; stale when its command changed, or when an input or a header is newer than its output."""

    output: Path
    command: list[str]
    inputs: list[Path]
    depfile: Path | None = None
    stamp: str = field(default="")  # versions of the tools, which the command does not show
    report: Path | None = None  # nvcc's: where ptxas's account of every kernel is kept, as valid as the output

    @property
    def record(self) -> Path:
        return self.output.with_name(self.output.name + ".cmd")

    def description(self) -> str:
        return shlex.join(self.command) + "\n" + self.stamp

    def read_files(self) -> list[Path]:
        """The inputs, and the headers that the compiler listed when it last ran."""
        if self.depfile is None:
            return self.inputs
        rule = self.depfile.read_text().replace("\\\n", " ").split(": ", 1)[-1]
        words = re.split(r"(?<!\\)\s+", rule.strip())
        return [*self.inputs, *(ROOT / word.replace("\\ ", " ") for word in words if word)]

    def is_stale(self) -> bool:
        try:
            built = self.output.stat().st_mtime_ns
            same = self.record.read_text() == self.description() and (self.report is None or self.report.exists())
            return not same or any(path.stat().st_mtime_ns > built for path in self.read_files())
        except OSError:  # something was never built, or a header is gone
            return True

    def run(self, threads: int = 1) -> None:
        """Compile; nvcc, which has several architectures to do, may use so many threads."""
        print(f"{Path(self.command[0]).name}: {self.output.relative_to(ROOT)}", flush=True)
        self.record.unlink(missing_ok=True)
        began = time.time_ns()
        failed = self.call_nvcc(threads) if self.report else subprocess.run(self.command, cwd=ROOT).returncode
        if failed:  # its messages went to the terminal
            kind = CudaBuildError if self.output.name.endswith(".cu.o") else BuildError
            raise kind(
                f"{Path(self.command[0]).name} could not make {self.output.name} of {self.inputs[0].relative_to(ROOT)}"
            )
        os.utime(self.output, ns=(began, began))  # a file saved while the compiler ran counts as newer
        self.record.write_text(self.description())

    def call_nvcc(self, threads: int) -> int:
        """Its exit code. What it says about kernels goes to the report, everything else to the terminal."""
        assert self.report is not None
        command = [*self.command, "--threads", str(threads)]
        result = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        others = [line for line in result.stdout.splitlines() if line and not PTXAS_LINES.match(line)]
        if others:
            print(*others, sep="\n", file=sys.stderr, flush=True)
        self.report.write_text(result.stdout)
        return result.returncode


def run_stale(steps: list[Step]) -> None:
    """Run the stale ones, MAX_JOBS at a time; every failure's messages are shown, the first one is raised.

    Where there are fewer of them than MAX_JOBS, nvcc gets the rest as threads.
    """
    jobs = os.environ.get("MAX_JOBS") or str(len(os.sched_getaffinity(0)))
    if not re.fullmatch("[1-9][0-9]*", jobs):
        raise BuildError(f"MAX_JOBS is {jobs!r}: set it to a whole number above 0")
    stale = [step for step in steps if step.is_stale()]
    threads = max(1, int(jobs) // max(1, len(stale)))
    with ThreadPoolExecutor(int(jobs)) as pool:
        running = [pool.submit(step.run, threads) for step in stale]
    for one in running:
        one.result()


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """One build at a time in a folder."""
    import fcntl  # not on every system, and this file has to say so itself

    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def build_extension(objects: Path, toolkit: Toolkit | None) -> tuple[Path, dict[str, object]]:
    """Compile csrc into objects/_C.abi3.so, with CUDA when a toolkit is given; returns the file and facts about it."""
    compiler = find_compiler()
    torch, torch_version = find_torch()
    python = Path(sysconfig.get_path("include"))
    version = ask(*compiler, "--version").splitlines()[0]
    flags = [*CXX_FLAGS, *SANITIZE_FLAGS, *DEFINES, "-I", "csrc", "-isystem", str(torch / "include")]
    binding_flags = ["-DLIIF_FAST_WITH_CUDA"] if toolkit else []
    if (python / "Python.h").exists() and not FREE_THREADED:
        # Lets `import liif_fast._C` work as well. torch.ops.load_library does not need it, so neither do we.
        binding_flags += ["-DLIIF_FAST_PYTHON_MODULE", "-DPy_LIMITED_API=0x030a0000", "-isystem", str(python)]

    steps = []
    cxx_sources = sorted(
        p.relative_to(ROOT) for pattern in ("bindings/*.cpp", "cpu/*.cpp") for p in ROOT.glob(f"csrc/{pattern}")
    )
    for source in cxx_sources:
        output = objects / ("-".join(source.parts[1:]) + ".o")
        depfile = output.with_suffix(".d")
        extra = binding_flags if source.parent.name == "bindings" else []
        command = [*compiler, *flags, *extra, "-MMD", "-MF", str(depfile), "-c", str(source), "-o", str(output)]
        steps.append(Step(output, command, [ROOT / source], depfile, f"{version}\ntorch {torch_version}"))
    link = [*compiler, *LINK_FLAGS, *SANITIZE_FLAGS, "-L", str(torch / "lib")]
    libraries = ["-ltorch_cpu"]
    if toolkit:
        steps = [*cuda_steps(objects, toolkit), *steps]  # first what takes longest
        link += [
            word
            for name in ("lib64", "lib")
            if (toolkit.root / name).is_dir()
            for word in ("-L", str(toolkit.root / name))
        ]
        libraries += CUDA_LIBRARIES
    run_stale(steps)
    library = objects / "_C.abi3.so"
    exports = objects / "exports.map"  # nothing but the module's entry: libstdc++'s templates and ifuncs would leak out
    if not exports.exists():
        exports.write_text("{ global: PyInit_*; local: *; };\n")
    inputs = [step.output for step in steps]
    link += [f"-Wl,--version-script={exports}", *map(str, inputs), *libraries]
    run_stale([Step(library, [*link, "-o", str(library)], inputs, None, version)])
    facts = {"compiler": version, "torch": torch_version, "cuda": toolkit.release if toolkit else None}
    facts["cuda_archs"] = toolkit.archs if toolkit else []
    return library, facts


def cuda_sources() -> list[Path]:
    return sorted(path.relative_to(ROOT) for path in ROOT.glob("csrc/cuda/**/*.cu"))


def cuda_steps(objects: Path, toolkit: Toolkit) -> list[Step]:
    """One call of nvcc for every .cu; beside each object, ptxas's report on its kernels."""
    steps = []
    for source in cuda_sources():
        output = objects / ("-".join(source.parts[1:]) + ".o")
        depfile = output.with_suffix(".d")
        command = [toolkit.nvcc, *NVCC_FLAGS, *toolkit.compression(), *toolkit.gencode(), "-Xptxas", "-v", "-I", "csrc"]
        command += ["-MMD", "-MF", str(depfile), "-c", str(source), "-o", str(output)]
        report = output.with_suffix(".ptxas.txt")
        steps.append(Step(output, command, [ROOT / source], depfile, toolkit.release, report))
    return steps


def warn(sentence: str) -> None:
    print(f"warning: liif_fast: {sentence}", file=sys.stderr, flush=True)


def find_toolkit() -> tuple[Toolkit | None, str]:
    """The CUDA toolkit to build with, or None and why not; raises only when CUDA was asked for by name."""
    if MODE == "cpu":
        return None, "LIIF_FAST_BUILD=cpu"
    if SANITIZE:
        return None, "LIIF_FAST_SANITIZE covers the C++ code only"
    try:
        if not cuda_sources():
            raise BuildError("csrc/cuda holds no .cu file")
        return Toolkit.find(cuda_sources()[0]), ""
    except BuildError as error:
        if MODE == "cuda":
            raise BuildError(f"LIIF_FAST_BUILD=cuda: {error}") from None
        return None, str(error)


def build() -> tuple[Path, dict[str, object]]:
    """Build what LIIF_FAST_BUILD asks for; in auto a CUDA build that fails gives way to one without CUDA."""
    toolkit, why_no_cuda = find_toolkit()
    try:
        library, facts = build_extension(OBJECTS, toolkit)
    except CudaBuildError as error:
        if MODE == "cuda":
            raise
        why_no_cuda = str(error)
        warn(f"trying once more without CUDA: {error}")
        library, facts = build_extension(OBJECTS, None)
    return library, {**facts, "why_no_cuda": why_no_cuda}


def why_not() -> str:
    """Why no extension can be built here, found out before anything is compiled; '' when nothing speaks against it."""
    if MODE == "none":
        return "LIIF_FAST_BUILD=none"
    try:
        if platform.system() != "Linux":
            raise BuildError(f"the extension is built on Linux only, and this is {platform.system()}")
        find_compiler()
        find_torch()
    except BuildError as error:
        return str(error)
    return ""


# ---- setuptools ----------------------------------------------------------------------------------------------------


def write_facts(folder: Path, facts: dict[str, object]) -> None:
    """_build.json beside the extension: how it was built, or why it is missing."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "_build.json").write_text(json.dumps(facts, indent=1) + "\n")


class BuildExtension(build_ext):
    """Replaces the compiling half of setuptools: headers count, unchanged files wait, .cu files go to nvcc."""

    def destination(self) -> Path:
        in_place = self.inplace or self.editable_mode
        return ROOT / "liif_fast" if in_place else Path(self.build_lib).resolve() / "liif_fast"

    def run(self) -> None:
        target = self.destination() / "_C.abi3.so"
        try:
            if WHY_NOT:
                raise BuildError(WHY_NOT)
            with locked(OBJECTS):
                library, facts = build()
                if not SANITIZE:
                    self.install(library, target)
                    write_facts(self.destination(), facts)
            print(f"built {library.relative_to(ROOT) if SANITIZE else target}")
        except BuildError as error:
            if SANITIZE or MODE in ("cpu", "cuda"):
                sys.exit(f"error: {error}")
            warn(f"the package is built without its C++ extension: {error}")
            target.unlink(missing_ok=True)  # one from older sources would pass for the current one
            write_facts(self.destination(), {"missing": str(error)})

    def install(self, library: Path, target: Path) -> None:
        """Put the library in its place in one step: a process that has the old one mapped keeps that."""
        target.parent.mkdir(parents=True, exist_ok=True)
        fresh = target.with_name(f"{target.name}.{os.getpid()}")
        shutil.copyfile(library, fresh)
        os.replace(fresh, target)

    def get_outputs(self) -> list[str]:
        if self.inplace or self.editable_mode:
            return []
        return [str(path) for name in ("_C.abi3.so", "_build.json") if (path := self.destination() / name).exists()]

    def get_output_mapping(self) -> dict[str, str]:
        return {}


class BuildPython(build_py):
    """Notes in the package why it has no extension, where that is known beforehand."""

    def run(self) -> None:
        super().run()
        if WHY_NOT and not self.editable_mode:
            write_facts(Path(self.build_lib) / "liif_fast", {"missing": WHY_NOT})


MODE = build_mode()
WHY_NOT = why_not()
BUILDS = not WHY_NOT or MODE in ("cpu", "cuda")  # these two fail aloud, in BuildExtension.run
setup(
    ext_modules=[Extension("liif_fast._C", [], py_limited_api=True)] if BUILDS else [],
    cmdclass={"build_ext": BuildExtension, "build_py": BuildPython},
    options={"bdist_wheel": {"py_limited_api": "cp310"}} if BUILDS and not FREE_THREADED else {},
)
