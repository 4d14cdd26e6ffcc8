"""The first-use check: a decode of known result, before a process trusts a fused GPU kernel that it has not used yet.

For every new combination of device, dtype, widths and switches, a backend decodes random features once at coordinates
and once on a window of a grid, with gradients where the caller wants them. `reference` decodes the same inputs, rounded
to the kernel's dtype, in float32 on the same device. A backend that is further away than `limits.FIRST_USE` allows, or
fails, is refused for that combination until the process ends. LIIF_FAST_FIRST_USE_CHECK=0 turns the check off.

The check runs in a thread of its own: autocast, grad mode, modes, hooks and streams of PyTorch belong to a thread, so
the caller's stay as they are. A kernel that hangs or crashes takes the process with it; `liif-fast doctor --check` runs
every backend in another process.
"""

from __future__ import annotations

import math
import os
import threading
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from importlib import metadata
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import reference
from .backends import gpu
from .dtypes import allows_tf32
from .limits import FIRST_USE, TF32

ENABLED = os.environ.get("LIIF_FAST_FIRST_USE_CHECK", "1") != "0"
DEVICES = ("cuda", "xpu")  # the tests add cpu
TILES, BLOCKS, ROWS = 3, 2, 128  # tiles of a block, most blocks of a processor and rows of a tile: every loop wraps
_CHUNK = 4096  # queries that the reference decodes at a time
_CHANNELS = 4


class Combination(NamedTuple):
    """What chooses among a backend's kernels for a decode. One check covers one combination."""

    backend: str
    device: str  # type
    device_index: int | None
    dtype: torch.dtype  # of the features
    matmul_dtype: torch.dtype
    switches: tuple[bool, bool, bool]  # local_ensemble, feat_unfold, cell_decode
    layer_grads: bool  # whether autograd records the decode,
    point_grads: bool  # with gradients of coordinates and cells
    recompute: bool
    query_term: bool
    source: bool  # a grid of a part of the input
    widths: tuple[int, ...]  # of the imnet's layers

    @property
    def place(self) -> torch.device:
        return torch.device(self.device) if self.device_index is None else torch.device(self.device, self.device_index)

    @property
    def flags(self) -> dict[str, bool]:
        return dict(zip(("local_ensemble", "feat_unfold", "cell_decode"), self.switches, strict=True))


class Decoders(NamedTuple):
    """The public ops, which import this module."""

    query: Callable[..., Tensor]
    render: Callable[..., Tensor]
    decode: Callable[..., Tensor]


_verdicts: dict[tuple[Any, ...], str] = {}  # by combination and process-wide switches: why refused, '' if it is not
_locks: dict[tuple[Any, ...], threading.Lock] = {}
_locks_lock = threading.Lock()
_here = threading.local()  # .checks: whether this thread runs a check


def against(combination: Combination, decoders: Decoders) -> str:
    """Why a backend is refused for a combination; '' where it is not. Checks it at its first use.

    A trace gets the verdict that exists then, as a constant.
    """
    if not ENABLED or combination.device not in DEVICES or combination.backend in ("torch", "reference"):
        return ""
    if torch.compiler.is_compiling():
        found = _refused(*combination[:-1])
        return next((reason for widths, reason in found if widths == combination.widths), "")
    key = (*combination, *_process_switches(combination.matmul_dtype))
    reason = _verdicts.get(key)
    if reason is None and not _is_tracing() and not getattr(_here, "checks", False):
        with _locks_lock:
            lock = _locks.setdefault(key, threading.Lock())
        with lock:  # other threads wait for the verdict
            reason = _verdicts.get(key)
            if reason is None:
                reason = _in_own_thread(lambda: _check(combination, decoders))
                if reason is not None:
                    _verdicts[key] = reason = _sentence(combination, reason)
                    if reason:
                        warnings.warn(reason, RuntimeWarning, stacklevel=4)
    return reason or ""


def _process_switches(matmul_dtype: torch.dtype) -> tuple[bool, bool]:
    tf32 = matmul_dtype == torch.float32 and allows_tf32()
    return tf32, torch.are_deterministic_algorithms_enabled()


@gpu.traced_as_constant
def _refused(*combination: Any) -> tuple[tuple[tuple[int, ...], str], ...]:
    """(widths, reason) of every refusal for a combination without its widths, which may be symbolic in a trace."""
    switches = _process_switches(Combination._make((*combination, ())).matmul_dtype)
    length, end = len(combination), len(Combination._fields)
    return tuple(
        (key[length], reason)
        for key, reason in list(_verdicts.items())
        if reason and (key[:length], key[end:]) == (combination, switches)
    )


def _is_tracing() -> bool:
    """Whether this thread traces: torch.jit, make_fx, fake tensors, transforms of torch.func."""
    return (
        torch.jit.is_tracing()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._functorch.peek_interpreter_stack() is not None
    )


def _must_wait(device: torch.device) -> bool:
    """Whether one of PyTorch's streams of a GPU captures a graph, or a synchronization is an error.

    PyTorch's pools hand out 32 streams of each priority, in turns.
    """
    if device.type != "cuda":
        return False
    if torch.cuda.get_sync_debug_mode():
        return True
    with torch.cuda.device(device):
        for priority in (0, -1):
            for _ in range(32):
                with torch.cuda.stream(torch.cuda.Stream(priority=priority)):
                    if torch.cuda.is_current_stream_capturing():
                        return True
    return False


def _in_own_thread(function: Callable[[], str | None]) -> str | None:
    results = []

    def run() -> None:
        _here.checks = True
        results.append(function())

    thread = threading.Thread(target=run, name="liif_fast first-use check")
    thread.start()
    thread.join()
    return results[0] if results else None


def _processors(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).multi_processor_count
    if device.type == "xpu":
        return torch.xpu.get_device_properties(device).gpu_subslice_count
    return 3


class Problem(NamedTuple):
    """A decode at coordinates, and one of a window of a grid; tensors in the kernel's dtypes."""

    feat: Tensor  # [1, C, H, W]
    coord: Tensor  # [1, Q, 2]
    cell: Tensor  # [1, Q, 2]
    query_term: Tensor | None  # [1, pixels of the window, K]; the decode at coordinates takes the first Q
    weights: list[Tensor]
    biases: list[Tensor]
    size: tuple[int, int]
    window: tuple[int, int, int, int]
    source: tuple[int, int, int, int] | None


def make_problem(c: Combination, device: torch.device) -> Problem:
    """Random numbers of a generator of its own, the same every time.

    No query is near a border between two latents, where a rounding decides which one it takes: coordinates keep 5 % of
    half a latent's distance, and the grid has an even size on a map, or a part of it, of an odd one.
    """
    generator = torch.Generator().manual_seed(0)
    corners = 4 if c.switches[0] else 1
    queries = TILES * BLOCKS * ROWS * _processors(device) // corners + 5
    side = math.isqrt(queries // 6) | 1
    size = torch.tensor([side, side + 2])

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator) * 2 - 1

    steps = (torch.rand(1, queries, 2, generator=generator) * 2 * size).floor()
    coord = -1 + (steps + 0.5 + 0.45 * uniform(1, queries, 2)) / size
    cell = (1 + 0.5 * uniform(1, queries, 2)) / size
    channels = c.widths[0] if c.query_term else _CHANNELS  # with a term, feat is the latent map
    inputs = 0 if c.query_term else channels * (9 if c.switches[1] else 1)
    inputs += 4 if c.switches[2] else 2
    widths = [inputs, *c.widths]
    layers = [uniform(o, i) * math.sqrt(6 / i) for i, o in zip(widths[:-1], c.widths, strict=True)]
    biases = [uniform(o) * 0.3 for o in c.widths]
    rows = math.isqrt(queries) + 1
    cols = -(-queries // rows)
    image = (rows + 4) // 2 * 2, (cols + 6) // 2 * 2

    def rounded(tensor: Tensor) -> Tensor:
        return tensor.to(device).to(c.matmul_dtype).to(c.dtype)

    geometry = torch.float64 if c.dtype == torch.float64 else torch.float32
    return Problem(
        rounded(uniform(1, channels, side, side + 2)),
        coord.to(device, geometry),
        cell.to(device, geometry),
        rounded(uniform(1, rows * cols, c.widths[0])) if c.query_term else None,
        [rounded(layer) for layer in layers],
        [rounded(bias) for bias in biases],
        image,
        (1, 2, rows, cols),
        (1, 1, side - 2, side) if c.source else None,
    )


def _copy(c: Combination, problem: Problem, dtype: torch.dtype | None = None) -> tuple[Problem, dict[str, Tensor]]:
    """A copy of the problem, in `dtype` if one is named, and by name the tensors whose gradients are compared."""
    half = len(problem.weights)
    feat, *layers = (
        tensor.detach().to(dtype or tensor.dtype).requires_grad_(c.layer_grads)
        for tensor in (problem.feat, *problem.weights, *problem.biases)
    )
    coord, cell = (tensor.detach().requires_grad_(c.point_grads) for tensor in (problem.coord, problem.cell))
    named = {"coord": coord, "cell": cell, "feat": feat}
    named.update((f"{'weights' if i < half else 'biases'}[{i % half}]", layer) for i, layer in enumerate(layers))
    if not c.flags["cell_decode"]:
        del named["cell"]
    term = problem.query_term
    if term is not None:
        term = named["query_term"] = term.detach().to(dtype or term.dtype).requires_grad_(c.layer_grads)
    copy = problem._replace(feat=feat, coord=coord, cell=cell, query_term=term)
    copy = copy._replace(weights=layers[:half], biases=layers[half:])
    return copy, {name: tensor for name, tensor in named.items() if tensor.requires_grad}


def _with_grads(out: Tensor, leaves: dict[str, Tensor], probe: Tensor) -> dict[str, Tensor]:
    """The result and the gradients of sum(out * probe), by name."""
    grads = torch.autograd.grad(out, list(leaves.values()), probe.to(out.dtype)) if leaves else ()
    return {"result": out.detach(), **dict(zip(leaves, grads, strict=True))}


def _expected(c: Combination, problem: Problem, probe: Tensor) -> dict[str, Tensor]:
    """The reference's result and gradients, computed some queries at a time."""
    copy, leaves = _copy(c, problem, torch.promote_types(c.dtype, torch.float32))
    outs, sums = [], {name: torch.zeros_like(leaf) for name, leaf in leaves.items()}
    for begin in range(0, problem.coord.shape[1], _CHUNK):
        chunk = slice(begin, begin + _CHUNK)
        coord, cell = copy.coord[:, chunk], copy.cell[:, chunk]
        if copy.query_term is None:
            out = reference.query(copy.feat, coord, cell, copy.weights, copy.biases, **c.flags)
        else:
            latent_map, term = copy.feat.permute(0, 2, 3, 1), copy.query_term[:, chunk]
            layers = copy.weights[0], copy.weights[1:], copy.biases
            out = reference.decode(latent_map, coord, cell, *layers, term, local_ensemble=c.switches[0])
        found = _with_grads(out, leaves, probe[:, chunk])
        outs.append(found.pop("result"))
        sums = {name: sums[name] + grad for name, grad in found.items()}
    return {"result": torch.cat(outs, 1), **sums}


def _found(c: Combination, problem: Problem, probe: Tensor, decoders: Decoders, on_grid: bool) -> dict[str, Tensor]:
    """The kernels' result and gradients."""
    copy, leaves = _copy(c, problem)
    narrow = c.matmul_dtype if c.matmul_dtype != c.dtype else None
    grid = {"size": copy.size, "window": copy.window, "source": copy.source}
    points = {"coord": copy.coord, "cell": copy.cell}
    options: dict[str, Any] = {"recompute": c.recompute, "backend": c.backend, **(grid if on_grid else points)}
    if copy.query_term is None:
        run = partial(decoders.render if on_grid else decoders.query, copy.feat, weights=copy.weights, **c.flags)
    else:
        if not c.flags["cell_decode"]:
            options.pop("cell", None)
        term = copy.query_term.transpose(1, 2).unflatten(2, copy.window[2:]) if on_grid else copy.query_term
        options |= {"query_term": term, "local_ensemble": c.switches[0]}
        run = partial(decoders.decode, copy.feat.permute(0, 2, 3, 1), copy.weights[0], copy.weights[1:])
    with torch.autocast(copy.feat.device.type, narrow, enabled=narrow is not None):
        out = run(biases=copy.biases, **options)
        return _with_grads(out.flatten(2).transpose(1, 2) if on_grid else out, leaves, probe)


def error_of(name: str, found: Tensor, expected: Tensor) -> Tensor:
    """The largest error as a fraction of the largest expected value; of gradients of points the error in the 2-norm.

    A ReLU whose sign a rounding flips may change the gradient of a single point or latent by any amount. So errors of
    the gradients of feat and of the query term are root mean squares over 4x4 latents and over 64 queries, as fractions
    of that of all expected values: a tile of wrong gradients is above every limit.
    """
    error = found - expected
    if name in ("coord", "cell"):
        return (error.norm() / expected.norm()).double()
    if name == "feat":
        squares = F.avg_pool2d(error.square().mean(1), 4, ceil_mode=True)
    elif name == "query_term":
        squares = F.avg_pool1d(error.square().mean(2), 64, ceil_mode=True)
    else:
        return (error.abs().amax() / expected.abs().amax()).double()
    return (squares.amax() / expected.square().mean()).sqrt().double()


def compare(c: Combination, decoders: Decoders) -> list[tuple[str, float, float]]:
    """(name, error, limit) of every result and gradient of a combination; the error of a NaN is NaN.

    Waits for the device once. Raises what the kernels raise, and NoReference where the reference cannot run.
    """
    device = c.place
    whole = make_problem(c, device)
    term = whole.query_term
    problem = whole._replace(query_term=None if term is None else term[:, : whole.coord.shape[1]])
    limits = FIRST_USE[TF32 if _process_switches(c.matmul_dtype)[0] else c.matmul_dtype]
    names, errors = [], []
    for op in ("query", "render"):
        if op == "render":  # has no gradients of coordinates
            shape = tuple(whole.feat.shape[2:])
            source = whole.source or (0, 0, *shape)
            coord = reference.window_coord(
                whole.size, whole.window, dtype=whole.coord.dtype, device=device, source=(source, shape)
            )
            cell = coord.new_tensor([2 * source[2 + axis] / (shape[axis] * whole.size[axis]) for axis in (0, 1)])
            problem = whole._replace(coord=coord[None], cell=cell.expand(coord.shape)[None])
            c = c._replace(point_grads=False)
        generator = torch.Generator().manual_seed(1)
        probe = torch.rand(1, problem.coord.shape[1], c.widths[-1], generator=generator).to(device) - 0.5
        try:
            expected = _expected(c, problem, probe)
        except Exception as error:
            raise NoReference(str(error)) from error
        found = _found(c, problem, probe, decoders, op == "render")
        names += [(op, name) for name in expected]
        errors += [error_of(name, found[name], expected[name]) for name in expected]
    depth = max(1.0, len(c.widths) / 5)
    return [
        (f"the {'result' if name == 'result' else f'gradient of {name}'} of {op}", error, limit * depth)
        for (op, name), error in zip(names, torch.stack(errors).tolist(), strict=True)
        for limit in [limits[name != "result"]]
    ]


class NoReference(Exception):
    """The reference cannot run: too little memory, or an operation that deterministic mode forbids."""


def _on(device: torch.device) -> AbstractContextManager[object]:
    """Makes a GPU the thread's current device, so that the first one gets no memory for a process that uses another."""
    return nullcontext() if device.type == "cpu" else torch.accelerator.device_index(device.index)


def _check(c: Combination, decoders: Decoders) -> str | None:
    """What is wrong with a combination, '' for nothing that is known; None where the check has to wait."""
    if _must_wait(c.place):
        return None
    try:
        with _on(c.place):
            errors = compare(c, decoders)
    except (NoReference, torch.OutOfMemoryError):
        return ""
    except Exception as failure:
        return f"failed ({type(failure).__name__}: {' '.join(str(failure).split())[:300]})"
    wrong = [each for each in errors if not each[1] <= each[2]]  # also where it is NaN
    if not wrong:
        return ""
    name, error, limit = wrong[0]
    more = f", and {len(wrong) - 1} more" if len(wrong) > 1 else ""
    return f"gave a wrong result ({name} is off by {error:.1e}, {limit:.0e} allowed{more})"


def _sentence(c: Combination, reason: str) -> str:
    """The text of the warning and of the error."""
    if not reason:
        return ""
    rank = ""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        rank = f" on rank {torch.distributed.get_rank()} of {torch.distributed.get_world_size()}"
    dtypes = " and ".join(dict.fromkeys(str(dtype).removeprefix("torch.") for dtype in (c.dtype, c.matmul_dtype)))
    switches = [name for name, on in c.flags.items() if on]
    switches += [
        name for name in ("layer_grads", "point_grads", "recompute", "query_term", "source") if getattr(c, name)
    ]
    try:
        version = metadata.version("liif_fast")
    except metadata.PackageNotFoundError:
        version = "of unknown version"
    return (
        f"backend '{c.backend}' {reason}{rank} in a check before its first decode of {dtypes} with widths "
        f"{'x'.join(map(str, c.widths))}, {', '.join(switches) or 'no switches'}. This process does not use it for "
        f"such decodes. Please report this, with the file that `liif-fast doctor --check` writes, as an issue of "
        f"liif_fast: liif_fast {version}, {gpu.describe(c.place)}"
    )
