"""What every Triton launcher shares: compile options, device, tile sizes, dtypes, a fixed order for sums."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Literal, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler.compiler import make_backend

from ...dtypes import allows_tf32

# No multiply and add may contract to an FMA unasked: a rounding decides which latent is the nearest one.
OPTIONS = {"enable_fp_fusion": False}

DTYPES = {
    torch.float64: tl.float64,
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
}
# As what a fused decode's activations travel from layer to layer; fused.py says why.
CARRIED = {torch.float32: tl.float32, torch.bfloat16: tl.int16, torch.float16: tl.int16}


@contextmanager
def on_device_of(tensor: Tensor) -> Iterator[None]:
    """Makes the tensor's device current, and PyTorch's own products keep the dtypes they are given.

    Triton launches on the current device and its current stream. An op runs under its caller's autocast, which would
    round float32 products; the operands' dtype has been decided before.
    """
    with torch.autocast(tensor.device.type, enabled=False):
        if tensor.device.type == "cpu":  # the interpreter
            yield
            return
        with torch.accelerator.device_index(tensor.device.index):
            yield


def power_of_two(size: int, least: int, most: int) -> int:
    """The smallest power of two that holds `size`, between `least` and `most`."""
    return min(max(triton.next_power_of_2(size), least), most)


def segments(keys: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """A fixed order for sums: items sorted by key, and where each key's items begin.

    Args:
        keys: [n], int64, in [0, count).
        count: number of keys.

    Returns:
        order [n] and begins [count + 1]: key k's items are order[begins[k]:begins[k + 1]], in their own order.
    """
    ordered, order = torch.sort(keys, stable=True)
    return order, torch.searchsorted(ordered, torch.arange(count + 1, device=keys.device))


class Settings(NamedTuple):
    """How a fused kernel is cut; found ahead of time (registers, shared memory), not yet tuned on a GPU."""

    rows: int  # of a tile
    block: int  # columns of a block of activations
    warps: int
    stages: int  # of the pipeline that fetches weights


Kernel = Literal["forward", "save", "backward"]  # save: the forward that keeps activations


class Problem(NamedTuple):
    """What a fused kernel's settings depend on, besides the device."""

    kernel: Kernel
    width: int  # of a tile, from `tile_width` of the widest hidden layer
    operands: torch.dtype  # of products
    precision: str  # of products of float32, from `product_precision`


def tile_width(width: int) -> int:
    """Columns that `width` activations take in a tile, which Triton wants in powers of two: one up to 128, then blocks
    of 64."""
    return power_of_two(width, 16, 128) if width <= 128 else triton.cdiv(width, 64) * 64


def padded_width(width: int) -> int:
    """Columns that they take in memory: a multiple of 16, so that rows are aligned; above 128 those of a tile.

    To leave columns out takes registers that wide tiles do not have: on sm_90 they would spill 112 bytes or have half
    the rows, and read the weights twice as often.
    """
    return triton.cdiv(width, 16) * 16 if width <= 128 else tile_width(width)


def launch_settings(problem: Problem, device: GPUTarget | None) -> Settings:
    """The table of tile sizes for the fused decode.

    Args:
        problem: the kernel and what it computes.
        device: what Triton calls the device, from `current_device`; None for the interpreter.
    """
    kernel, width, operands, _ = problem
    whole = min(width, 128) if width % 128 == 0 or width < 128 else 64
    if device is None:
        return Settings(64, whole, 4, 2)
    if device.backend != "cuda":  # AMD and Intel: 64 KB of shared memory at least
        return Settings(64, min(width, 64), 4, 2) if operands.itemsize == 2 else Settings(32, min(width, 32), 4, 1)
    family = device.arch // 10
    roomy = family in (9, 10) or device.arch == 80  # 227 or 163 KB of shared memory instead of 99
    if operands.itemsize > 2:
        return _float32_settings(problem, family, roomy)
    narrow = min(width, 64)
    if kernel == "save":  # needs registers for places too
        return Settings(128, narrow, 8, 3 if roomy else 2)
    if kernel == "backward":
        return Settings(64, whole, 8, 2) if family == 10 else Settings(128, whole, 8, 3 if roomy else 2)
    return Settings(128, whole if roomy else narrow, 8, 3)


def _float32_settings(problem: Problem, family: int, roomy: bool) -> Settings:
    """Activations take twice the room: half of them are in shared memory, where one product finds them whole."""
    kernel, width, _, precision = problem
    narrow = min(width, 32)
    if precision == "ieee":
        rows = {"forward": 128 if roomy else 64, "save": 64, "backward": 32}
        block = min(width, 64) if kernel == "backward" and family == 10 else narrow  # 32 columns spill there
        return Settings(rows[kernel], block, 8, 2)
    if family == 9:
        return Settings(128, narrow, 8, 2)
    if family == 10:
        return Settings(128, narrow, 8, 1) if kernel == "forward" else Settings(64, min(width, 64), 8, 1)
    if width < 64:
        return Settings(64, width, 4, 2)
    # Fewer rows than columns: then Triton gives each warp columns of its own, and all find the rows in shared memory.
    return Settings(32, 64, 8, 2 if roomy or kernel == "forward" else 1)


def current_device() -> GPUTarget | None:
    """The current device as `launch_settings` wants it."""
    return None if triton.knobs.runtime.interpret else triton.runtime.driver.active.get_current_target()


@cache
def _precisions(target: GPUTarget) -> tuple[str, ...]:
    return make_backend(target).parse_options({}).allowed_dot_input_precisions


def product_precision(operands: torch.dtype) -> str:
    """How kernels multiply float32: "tf32" where PyTorch's switch allows it and the device can, otherwise "ieee".

    Read at every launch, as by PyTorch's own products: what a forward keeps looks the same either way.
    """
    if operands != torch.float32 or not allows_tf32():
        return "ieee"
    device = current_device()
    return "tf32" if device is None or "tf32" in _precisions(device) else "ieee"
