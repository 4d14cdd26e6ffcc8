"""Which backend runs an op: the table, the refusals with their reasons, the choice.

A backend is one `can_run_<name>(request, raise_error=False)` and one row of `BACKENDS`. The rows are tried in order,
except where `preferences.TABLE` puts another one first. An explicit backend (argument or `LIIF_FAST_BACKEND`) either
runs or raises its reason: it never falls back silently.
"""

from __future__ import annotations

import importlib.util
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from ..transforms import is_transformed
from . import calls as calls  # for the modules of the ops
from . import cpu, cuda, extension, gpu, preferences


class OpRequest(NamedTuple):
    """The facts that decide which backend runs an op. It holds no tensor, so torch.compile can trace it."""

    op: str  # gather | ensemble | decode | metasr_query
    device: str  # torch device type
    dtype: torch.dtype  # of the features
    widths: tuple[int, ...] = ()  # decode: the imnet's layers, (K, *hidden, O)
    device_index: int | None = None  # None: the current device
    matmul_dtype: torch.dtype | None = None  # decode: of matrix products; None: the features'
    trains: bool = False  # decode: whether autograd records it
    queries: int | None = None  # decode: of the whole batch
    transformed: bool = False  # see transforms.is_transformed
    has_query_term: bool = False  # decode

    @classmethod
    def on(
        cls, tensor: Tensor, op: str, widths: tuple[int, ...] = (), others: Sequence[Tensor | None] = ()
    ) -> OpRequest:
        """The request for an op on this tensor's device and in its dtype; others: its other tensors."""
        transformed = is_transformed(tensor, *others)
        device = tensor.device
        return cls(op, device.type, tensor.dtype, widths, device.index, transformed=transformed)


_Against = Callable[[str, OpRequest], str]  # (backend, request) -> why the backend must not run it; '' if it may


_FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_FUSED_WIDTH, _FUSED_WIDTH_STEP = 256, 16  # csrc/cuda/decode/launch.h; a test compares
_FUSED_LAYERS = 64  # kMaxLayers of csrc/decode.h
_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # Triton's kernels run on the CPU, slowly
_OLDEST_TRITON = (3, 6)
_MOVE = "move them or choose another backend"
_BUILT_WITH_CUDA = extension.is_available() and hasattr(extension.OPS, "cuda_gather_backward")


def _find_triton() -> str:
    """Why the installed Triton cannot be used, '' if it can; found without importing it."""
    needed = ".".join(map(str, _OLDEST_TRITON))
    spec = importlib.util.find_spec("triton")
    if spec is None or spec.origin is None:
        return f"backend 'triton' needs Triton >= {needed}, which is not installed: install the one made for this torch"
    found = re.search(r"__version__ *= *['\"]((\d+)\.(\d+)[^'\"]*)", Path(spec.origin).read_text())
    if found is not None and (int(found[2]), int(found[3])) < _OLDEST_TRITON:
        return f"backend 'triton' needs Triton >= {needed}, this is {found[1]}: upgrade torch and Triton together"
    return ""


_TRITON_PROBLEM = _find_triton()


def _result(reason: str, raise_error: bool) -> bool:
    if reason and raise_error:
        raise RuntimeError(reason)
    return not reason


def can_run_reference(request: OpRequest, raise_error: bool = False) -> bool:
    """The reference runs everything PyTorch runs."""
    return _result("", raise_error)


def can_run_torch(request: OpRequest, raise_error: bool = False) -> bool:
    """PyTorch's own calls run everywhere."""
    return _result("", raise_error)


def can_run_cpu(request: OpRequest, raise_error: bool = False) -> bool:
    """The C++ kernels: CPU tensors of a float dtype, and the compiled extension."""
    reason = ""
    if request.device != "cpu":
        reason = f"backend 'cpu' takes CPU tensors, these are on '{request.device}': {_MOVE}"
    elif not extension.is_available():
        reason = f"backend 'cpu' needs the compiled extension: {extension.reason()}"
    elif request.dtype not in _FLOATS:
        reason = f"backend 'cpu' takes float64, float32, bfloat16 or float16 features, not {request.dtype}"
    return _result(reason, raise_error)


def _against_fused_cuda(request: OpRequest) -> str:
    """Why the fused CUDA kernels cannot decode with this imnet; '' where they can."""
    if request.dtype == torch.float64:
        return "backend 'cuda' decodes in float32, bfloat16 or float16, not float64: use 'reference' or gather"
    hidden = request.widths[:-1]
    if request.widths and not 1 <= len(hidden) <= _FUSED_LAYERS:
        return f"backend 'cuda' decodes with 2 to {_FUSED_LAYERS + 1} layers, this imnet has {len(request.widths)}"
    if odd := [width for width in hidden if width % _FUSED_WIDTH_STEP or not 0 < width <= _FUSED_WIDTH]:
        return (
            f"backend 'cuda' decodes with hidden layers whose width is a multiple of {_FUSED_WIDTH_STEP} up to "
            f"{_FUSED_WIDTH}, not {odd[0]}"
        )
    return ""


def can_run_cuda(request: OpRequest, raise_error: bool = False) -> bool:
    """The CUDA kernels: CUDA tensors of a float dtype, an extension compiled with CUDA, an imnet that they can fuse."""
    reason = ""
    if request.device != "cuda":
        reason = f"backend 'cuda' takes CUDA tensors, these are on '{request.device}': {_MOVE}"
    elif not extension.is_available():
        reason = f"backend 'cuda' needs the compiled extension: {extension.reason()}"
    elif not _BUILT_WITH_CUDA:
        why = extension.build_facts().get("why_no_cuda") or "CUDA was not part of the build"
        reason = f"backend 'cuda' needs an extension compiled with CUDA, this one has none: {why}"
    elif torch.version.cuda is None:
        reason = "backend 'cuda' needs a torch built with CUDA, this one has none"
    elif not torch.cuda.is_available():
        reason = "backend 'cuda' needs an NVIDIA GPU, and torch finds none that it can use"
    elif request.dtype not in _FLOATS:
        reason = f"backend 'cuda' takes float64, float32, bfloat16 or float16 features, not {request.dtype}"
    else:
        reason = gpu.against_age("cuda", request.device_index) or gpu.against_build(request.device_index)
        reason = reason or (_against_fused_cuda(request) if request.op == "decode" else "")
    return _result(reason, raise_error)


def can_run_triton(request: OpRequest, raise_error: bool = False) -> bool:
    """Triton's kernels: every op on tensors of a device that Triton drives, under its interpreter on CPU tensors."""
    reason = ""
    on_gpu = request.device in ("cuda", "xpu")  # torch calls AMD's GPUs cuda too
    if not on_gpu and not (request.device == "cpu" and _INTERPRETED):
        reason = f"backend 'triton' takes tensors on a GPU, these are on '{request.device}': {_MOVE}"
    elif _TRITON_PROBLEM:
        reason = _TRITON_PROBLEM
    elif request.device == "cuda" and not torch.cuda.is_available():
        reason = "backend 'triton' needs a GPU, and torch finds none that it can use"
    elif request.device == "xpu" and not torch.xpu.is_available():
        reason = "backend 'triton' needs a GPU, and torch finds none of Intel's that it can use"
    elif request.dtype not in _FLOATS:
        reason = f"backend 'triton' takes float64, float32, bfloat16 or float16 features, not {request.dtype}"
    elif request.device == "cuda":
        reason = gpu.against_age("triton", request.device_index)
    return _result(reason, raise_error)


BACKENDS: dict[str, Callable[..., bool]] = {
    "cuda": can_run_cuda,
    "triton": can_run_triton,
    "cpu": can_run_cpu,
    "torch": can_run_torch,
    "reference": can_run_reference,
}


def _checked(name: str, source: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"{source} is '{name}', which is not a backend: choose one of {', '.join(BACKENDS)}")
    return name


_forced = os.environ.get("LIIF_FAST_BACKEND") or None
if _forced is not None:
    _checked(_forced, "LIIF_FAST_BACKEND")


def against_hopper(request: OpRequest) -> str:
    """Why the `cuda` backend would not decode with its Hopper kernel; '' where it would."""
    reason = cuda.hopper.against_device(request.device, request.device_index)
    dtype = request.matmul_dtype or request.dtype
    return reason or cuda.hopper.against_imnet(
        request.widths, dtype, request.trains, has_query_term=request.has_query_term
    )


def preference(request: OpRequest) -> preferences.Preference | None:
    """The row of `preferences.TABLE` for the request; None where there is none."""
    if request.device != "cuda":
        return None
    dtype, uses_hopper = request.matmul_dtype or request.dtype, request.op == "decode" and not against_hopper(request)
    found = gpu.capability(request.device_index)
    return preferences.find(found, request.op, dtype, request.trains, request.queries, uses_hopper)


def in_order(request: OpRequest) -> list[str]:
    """The names of BACKENDS, beginning with the one that `preferences.TABLE` puts first for the request."""
    names, row = list(BACKENDS), preference(request)
    return names if row is None else [row.first, *(name for name in names if name != row.first)]


def choose(request: OpRequest, backend: str | None = None, against: _Against = lambda *_: "") -> str:
    """The backend for `request`: `backend`, else LIIF_FAST_BACKEND as it was at import, else the first that can run it.

    against: more reasons against a backend that can run the request.
    Raises ValueError for an unknown name, RuntimeError with the reason where the named backend cannot run the request.
    """
    name = backend or _forced
    if name is not None:
        _can_run(_checked(name, "backend"), request, raise_error=True)
        _result(against(name, request), raise_error=True)
        return name
    # `torch` runs everything.
    return next(each for each in in_order(request) if _can_run(each, request) and not against(each, request))


def _can_run(name: str, request: OpRequest, raise_error: bool = False) -> bool:
    if request.transformed and name not in ("torch", "reference"):
        reason = f"backend '{name}' has no rules for forward-mode AD, torch.func and torch.jit.trace: use 'torch'"
        return _result(reason, raise_error)
    return BACKENDS[name](request, raise_error)


def implementation(name: str) -> ModuleType:
    """The module with one function for every registered op on backend `name`."""
    if name == "triton":
        from . import triton  # imported late: it is optional and takes a second to import

        return triton
    return {"cpu": cpu, "cuda": cuda}[name]


def report() -> list[tuple[str, bool, str]]:
    """(name, runs here, reason why not) for every backend, judged by a float32 gather on its natural device."""
    rows = []
    devices = {"cuda": "cuda", "triton": "xpu" if torch.xpu.is_available() else "cpu" if _INTERPRETED else "cuda"}
    for name, can_run in BACKENDS.items():
        request = OpRequest("gather", devices.get(name, "cpu"), torch.float32)
        try:
            can_run(request, raise_error=True)
            rows.append((name, True, ""))
        except RuntimeError as error:
            rows.append((name, False, str(error)))
    return rows
