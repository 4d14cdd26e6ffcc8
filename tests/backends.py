"""The backends that the tests of the ops run on, by the names that `--backend` takes, and their kinds of operands.

One row of TABLE gives a backend every test of tests/ops.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from importlib import import_module
from importlib.metadata import version
from typing import NamedTuple

import pytest
import torch

from liif_fast.ops import backends
from liif_fast.ops.backends import cuda, extension
from liif_fast.ops.inputs import DecodeInputs
from tests.cuda.emulator import build
from tests.cuda.emulator.ops import Ops
from tests.helpers import Case, reason_against

_MODULES = "liif_fast.ops.backends"
# The instruction sets of the CPU kernels.
ISAS = ("neon", "portable") if platform.machine() in ("aarch64", "arm64") else ("avx512", "avx2", "portable")


def _require(name: str, device: str) -> None:
    if reason := reason_against(name, "gather", torch.float32, device):
        pytest.skip(reason)


@contextmanager
def _reference() -> Iterator[None]:
    yield


def _cpu(isa: str) -> Callable:
    """The CPU kernels of one instruction set."""

    @contextmanager
    def run() -> Iterator[None]:
        _require("cpu", "cpu")
        if not extension.OPS.cpu_select_isa(isa):
            pytest.skip(f"this processor has no {isa}, or LIIF_FAST_CPU_ISA excludes it")
        try:
            yield
        finally:
            extension.OPS.cpu_select_isa("auto")

    return run


@cache
def lacks_isa(name: str) -> bool:
    """Whether a row's kernels are of an instruction set that this processor lacks."""
    isa = name.removeprefix("cpu-")
    if isa not in ISAS or not extension.is_available():
        return False
    found = extension.OPS.cpu_select_isa(isa)
    extension.OPS.cpu_select_isa("auto")
    return not found


@contextmanager
def emulated() -> Iterator[None]:
    """The CUDA sources compiled for the CPU, in the place of the extension's CUDA part, and open to CPU tensors."""
    if reason := build.why_not():
        pytest.skip(reason)
    module = build.load()
    module.set_schedule(0, False)
    set_device("sm_90")

    def can_run(request: backends.OpRequest, raise_error: bool = False) -> bool:
        reason = backends._against_fused_cuda(request) if request.op == "decode" else ""
        return backends._result(reason, raise_error)

    with pytest.MonkeyPatch.context() as patch:
        for part in ("convolution", "gather", "decode"):  # by name: functions hide the modules of the same name
            patch.setattr(import_module(f"{_MODULES}.cuda.{part}"), "_C", Ops(module))
        patch.setitem(backends.BACKENDS, "cuda", can_run)
        yield


@contextmanager
def hopper_emulated() -> Iterator[None]:
    """emulated() with the Hopper kernel, in clusters of two. Imnets narrow for it are padded to 128 channels."""
    module, hopper = (import_module(f"{_MODULES}.cuda.{name}") for name in ("decode", "hopper"))
    padded_width = module._padded_width

    def pad(inputs: DecodeInputs) -> int:
        least = 0 if module._hopper_policy(inputs, trains=True) is None else 128
        return max(padded_width(inputs), least)

    with emulated(), pytest.MonkeyPatch.context() as patch:
        set_device("sm_90-pair")
        patch.setattr(hopper, "against_device", lambda *_: "")
        patch.setattr(hopper, "_LEAST_WIDTH", 1)
        patch.setattr(module, "_padded_width", pad)
        yield


# Processors, shared memory of a block and of a processor in KB, compute capability. With one processor a problem of two
# tiles is not a small one, and a block has several tiles.
DEVICES = {
    "sm_90": (1, 227, 228, 9, 0),
    "sm_90-pair": (2, 227, 228, 9, 0),
    "sm_80": (4, 163, 164, 8, 0),
    "sm_86": (2, 99, 100, 8, 6),
}


def set_device(name: str) -> None:
    """The GPU that the emulated launches see."""
    processors, block, processor, *capability = DEVICES[name]
    build.load().set_device(processors, block << 10, processor << 10, *capability)


@contextmanager
def interpreted() -> Iterator[None]:
    """Triton's kernels under its interpreter, which TRITON_INTERPRET=1 chooses before the first import."""
    _require("triton", "cpu")
    if _versions("triton") < (3, 7) and _versions("numpy") >= (2, 4):
        pytest.skip("the interpreter of Triton 3.6 does not run with NumPy 2.4 or later")
    import_module("tests.triton.interpreter").correct()
    yield


def _versions(distribution: str) -> tuple[int, ...]:
    return tuple(map(int, version(distribution).split(".")[:2]))


def _on_device(name: str) -> Callable:
    @contextmanager
    def run() -> Iterator[None]:
        _require(name, "cuda")
        yield

    return run


class Kind(NamedTuple):
    """In which dtypes a decode gets its tensors and multiplies them."""

    name: str
    dtype: torch.dtype  # of features and layers
    narrow: torch.dtype | None = None  # of products: 16 bits; None leaves them in `dtype`
    autocast: bool = False  # whether autocast makes them narrow
    tf32: bool = False  # whether float32 products may round to TF32


KINDS = [
    Kind("float64", torch.float64),
    Kind("float32", torch.float32),
    Kind("tf32", torch.float32, tf32=True),
    Kind("bfloat16", torch.bfloat16, torch.bfloat16),
    Kind("float16", torch.float16, torch.float16),
    Kind("autocast-bfloat16", torch.float32, torch.bfloat16, autocast=True),
    Kind("autocast-float16", torch.float32, torch.float16, autocast=True),
]


class Backend(NamedTuple):
    name: str  # as --backend takes it
    op_backend: str  # the ops' argument `backend`
    activate: Callable  # a context manager; skips with the reason where the backend cannot run here
    device: str = "cpu"
    every: int = 1  # a slow backend runs one of so many cases of each test,
    every_proof: int = 1  # one of so many with `-m prove`, and the others with `-m exhaustive`
    most_queries: int = 1 << 20  # of a random case
    emulates: bool = False  # the CUDA sources on the CPU
    hopper: bool = False  # the Hopper kernel: only tests with the mark `hopper` run on it, in 16 bits
    has_tf32: bool = False  # follows torch's switch for TF32
    widest: int = 256  # layer of an imnet that runs in one kernel,
    most_outs: int = 1 << 20  # and its outputs; others run through PyTorch's own layers, or are refused
    rounds_biases: bool = False  # of hidden layers, as PyTorch does
    rounds_edges: bool = False  # whether the first and the last layer round their operands too: see rounded_model
    chunks: tuple = ()  # (module, variable) of its size of a backward's step, and a size that makes several steps

    def reason_against(self, op: str, dtype: torch.dtype, case: Case | None = None) -> str:
        """Why the backend refuses an op, or a decode with this case's imnet; '' where it runs it."""
        widths = () if case is None else (*case.hidden, case.outs)
        if self.hopper and widths and (reason := cuda.hopper.against_imnet(widths, torch.float16, trains=False)):
            return reason
        return reason_against(self.op_backend, op, dtype, self.device, widths)

    def rounds_to_tf32(self, case: Case) -> bool:
        """Whether the switch for TF32 changes this decode: layers that PyTorch multiplies ignore it on a CPU."""
        in_kernel = bool(case.hidden) and max(case.hidden) <= self.widest and case.outs <= self.most_outs
        return in_kernel or self.device != "cpu"


_CUDA = {"op_backend": "cuda", "has_tf32": True, "chunks": ((f"{_MODULES}.cuda.decode", "_CHUNK_ROWS", 128),)}
_EMULATED = {**_CUDA, "emulates": True, "every_proof": 2, "most_queries": 40}
_TRITON = {"op_backend": "triton", "has_tf32": True, "most_outs": 1 << 20}
_TRITON["rounds_edges"] = True
_TRITON["chunks"] = tuple(
    (f"{_MODULES}.triton.{name}", f"{name.upper()}_CHUNK_BYTES", 20_000) for name in ("fused", "layerwise")
)
_ROWS = [
    Backend("reference", "reference", _reference, every=3),
    Backend("torch", "torch", _reference, every=3, rounds_biases=True, most_queries=4000),
    *(Backend(f"cpu-{isa}", "cpu", _cpu(isa), every=3 if isa == "portable" else 1, most_queries=60) for isa in ISAS),
    Backend("cuda-emulated", activate=emulated, every=6, **_EMULATED),
    Backend("hopper-emulated", activate=hopper_emulated, hopper=True, every=12, **{**_EMULATED, "most_queries": 70}),
    Backend("triton-interpreted", activate=interpreted, every=60, every_proof=24, most_queries=9, **_TRITON),
    Backend("cuda", activate=_on_device("cuda"), device="cuda", **_CUDA),
    Backend("triton", activate=_on_device("triton"), device="cuda", **_TRITON),
]
TABLE = {row.name: row for row in _ROWS}
DEFAULT = ["reference", "torch", "cpu", "cuda-emulated", "hopper-emulated"]


def selected(option: str | None) -> list[Backend]:
    """The rows that --backend names, comma separated; `cpu` is every instruction set."""
    names = option.split(",") if option else DEFAULT
    for name in names:
        if name != "cpu" and name not in TABLE:
            raise pytest.UsageError(f"--backend {name} is no backend: choose cpu or one of {', '.join(TABLE)}")
    return [row for row in TABLE.values() if row.name in names or (row.op_backend == "cpu" and "cpu" in names)]
