"""Compiles the CUDA kernels for the CPU, into files of build/ named after what went in, and loads the result.

`cuda_on_cpu_kernels` is a pybind11 module of csrc/cuda/*.cu and module.cpp, compiled with this folder's headers
in the place of CUDA's: nothing of CUDA is needed. It is tied to the running Python, and never shipped.
LIIF_FAST_SANITIZE=1, as `make sanitize` sets it, adds the address and undefined-behavior sanitizers.
"""

from __future__ import annotations

import fcntl
import filecmp
import hashlib
import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from types import ModuleType

import torch

ROOT = Path(__file__).resolve().parents[3]
HERE = Path(__file__).resolve().parent
CACHE = ROOT / "build" / "cuda_on_cpu"
NAME = "cuda_on_cpu_kernels"
LEFT_OUT = re.compile("tf32|(?<!b)float16")  # names of sources and of tests
leaves_out = False  # the kernels for float16 and TF32: set before load() is called, see tests/conftest.py
SANITIZE = os.environ.get("LIIF_FAST_SANITIZE", "0") not in ("", "0")
# As in setup.py: no FMA contraction, since rounding decides which latent is the nearest. torch ships pybind11.
FLAGS = ["-std=c++17", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Wno-unknown-pragmas", "-ffp-contract=off"]
FLAGS += ["-O1"]
SANITIZERS = ["-g1", "-fno-omit-frame-pointer", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]
SANITIZERS += ["-fno-sanitize=null,object-size,pointer-overflow,vptr"]  # as in setup.py
SANITIZERS += ["-Og"]  # with them -O1 takes three times as long
SANITIZERS += ["-Wno-maybe-uninitialized"]  # GCC documents false positives with sanitizers


@cache
def compiler() -> list[str] | None:
    """CXX, else the first of c++, g++, clang++ on PATH; None where there is none."""
    if chosen := shlex.split(os.environ.get("CXX", "")):
        return chosen
    return next(([path] for name in ("c++", "g++", "clang++") if (path := shutil.which(name))), None)


def why_not() -> str:
    """Why the kernels cannot be compiled for the CPU here; '' where they can."""
    if compiler() is None:
        return "no C++ compiler was found (looked for CXX, c++, g++, clang++)"
    if not Path(sysconfig.get_path("include"), "Python.h").exists():
        return "Python.h is not installed (on Debian: apt install python3-dev)"
    return ""


def _include_flags(csrc: Path = ROOT / "csrc") -> list[str]:
    system = [Path(torch.__file__).parent / "include", Path(sysconfig.get_path("include"))]
    return ["-I", str(HERE), "-I", str(csrc), *(word for path in system for word in ("-isystem", str(path)))]


def _run(command: Sequence[str]) -> None:
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode or "warning:" in result.stderr:
        raise RuntimeError(f"{shlex.join(command)}\n{result.stderr}")


@cache
def _tools() -> str:
    """What the sources do not show of a result: the versions of Python, torch and the compiler."""
    command = compiler()
    assert command is not None
    version = subprocess.run([*command, "--version"], capture_output=True, text=True, check=True).stdout
    return "\0".join([sys.version, torch.__version__, version])


def _read_files(source: Path) -> set[Path]:
    """The source and those of our own files that it includes, directly or not."""
    found, waiting = set(), [source]
    while waiting:
        path = waiting.pop()
        found.add(path)
        for name in re.findall(r'^\s*#\s*include\s*["<]([^">]+)', path.read_text(), re.MULTILINE):
            candidates = [(folder / name).resolve() for folder in (path.parent, HERE, ROOT / "csrc")]
            waiting += [candidate for candidate in candidates if candidate.is_file() and candidate not in found]
    return found


def _object(source: Path, flags: Sequence[str]) -> Path:
    """Where the object of this source as it is belongs."""
    digest = hashlib.sha256("\0".join([_tools(), *flags]).encode())
    for path in sorted(_read_files(source)):
        digest.update(f"\0{path.relative_to(ROOT)}\0".encode() + path.read_bytes())
    return CACHE / f"{source.name}-{digest.hexdigest()[:16]}.o"


def _compile_one(source: Path, made: Path, flags: Sequence[str], *, kind: str = "c++") -> None:
    command = compiler()
    assert command is not None
    fresh = made.with_suffix(".fresh")
    _run([*command, *flags, *_include_flags(), "-c", "-x", kind, str(source), "-o", str(fresh)])
    os.replace(fresh, made)


def _precompiled(flags: Sequence[str]) -> list[str]:
    """Flags that include the headers of every kernel, which take longer than most kernels: compiled once."""
    header = _object(HERE / "ptx_on_cpu.h", flags).with_suffix("")
    made = header.with_name(f"{header.name}.gch")
    if not made.exists():
        header.write_text('#include "ptx_on_cpu.h"\n')
        _compile_one(header, made, flags, kind="c++-header")
    return ["-include", str(header)]


def _flags_of(source: Path, flags: Sequence[str]) -> list[str]:
    """A kernel's flags, or those of what binds it to Python, of which nothing takes long."""
    return [*flags, *_precompiled(flags)] if source.suffix == ".cu" else [*flags, "-O0"]


def _compile(output: str, sources: Sequence[Path], flags: Sequence[str], link: Sequence[str]) -> Path:
    """Compile what is new, two at a time, and link once; a second process waits and then uses the result."""
    command = compiler()
    assert command is not None
    CACHE.mkdir(parents=True, exist_ok=True)
    with open(CACHE / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        objects = [_object(source, flags) for source in sources]
        digest = hashlib.sha256("\0".join([*link, *(made.name for made in objects)]).encode())
        target = CACHE / digest.hexdigest()[:16] / output
        if not target.exists():
            with ThreadPoolExecutor(2) as pool:
                jobs = [
                    pool.submit(_compile_one, source, made, _flags_of(source, flags))
                    for source, made in zip(sources, objects, strict=True)
                    if not made.exists()
                ]
            for job in jobs:
                job.result()
            target.parent.mkdir(exist_ok=True)
            fresh = target.with_name(f"{output}.fresh")
            _run([*command, *flags, *link, *map(str, objects), "-o", str(fresh)])
            os.replace(fresh, target)
    return target


@cache
def load() -> ModuleType:
    """The module, compiled if the sources have changed since it last was."""
    sources = [HERE / "module.cpp", *sorted((ROOT / "csrc" / "cuda").rglob("*.cu"))]
    if leaves_out:
        sources = [path for path in sources if not LEFT_OUT.search(path.stem)]
        sources.append(HERE / "left_out.cpp")
    flags = [*FLAGS, *(SANITIZERS if SANITIZE else [])]
    path = _compile(NAME + sysconfig.get_config_var("EXT_SUFFIX"), sources, flags, ["-shared"])
    spec = importlib.util.spec_from_file_location(NAME, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def probes() -> Path:
    """The program of probes.cpp, always with sanitizers; raises RuntimeError if the compiler has none."""
    return _compile("probes", [HERE / "probes.cpp"], [*FLAGS, *SANITIZERS], [])


def clocked(name: str) -> Path:
    """A program of tests/gpu that reads the clock: cycles or hopper_probes."""
    return _compile(name, [ROOT / "tests" / "gpu" / f"{name}.cu"], FLAGS, [])


def ring(csrc: Path, target: Path, hopper: int = 0, trains: bool = False, program: str = "") -> Path:
    """The program of ring.cpp, with the kernels of a copy of csrc. Packing is compiled once if it is the same.

    hopper: the channels of the Hopper kernel, 0 for the kernels of every GPU. trains: its training, not inference.
    program: product or convolution, a program of its own.
    """
    command = compiler()
    assert command is not None
    if program:
        _run([*command, *FLAGS, "-O1", "-w", *_include_flags(csrc), str(HERE / f"{program}.cpp"), "-o", str(target)])
        return target
    decode = csrc / "cuda" / "decode" / "decode.cu"
    if filecmp.cmp(decode.with_name("launch.h"), ROOT / "csrc" / "cuda" / "decode" / "launch.h", shallow=False):
        decode = _object(ROOT / "csrc" / "cuda" / "decode" / "decode.cu", FLAGS)
        if not decode.exists():
            CACHE.mkdir(parents=True, exist_ok=True)
            _compile_one(ROOT / "csrc" / "cuda" / "decode" / "decode.cu", decode, FLAGS)
    # A mistake may leave a parameter unused.
    flags = [*FLAGS, "-w", *([f"-DHOPPER={hopper}"] if hopper else []), *(["-DTRAINS"] if trains else [])]
    sources = ["-x", "c++", str(HERE / "ring.cpp"), *(["-x", "none"] if decode.suffix == ".o" else []), str(decode)]
    _run([*command, *flags, *_include_flags(csrc), *sources, "-o", str(target)])
    return target
