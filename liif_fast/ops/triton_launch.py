"""What every Triton launcher shares: compile options, device, tile sizes, dtypes, a fixed order for sums."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler.compiler import make_backend

from .library import allows_tf32

# No multiply and add may contract to an FMA unasked: a rounding decides which latent is the nearest one.
OPTIONS = {"enable_fp_fusion": False}

DTYPES = {
    torch.float64: tl.float64,
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
}
# As what a fused decode's activations travel from layer to layer; triton_chain.py says why.
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


def padded_width(width: int) -> int:
    """Columns in which `width` activations are kept: a power of two up to 128, then a multiple of 64."""
    return power_of_two(width, 16, 128) if width <= 128 else triton.cdiv(width, 64) * 64


def launch_settings(kernel: str, width: int, operands: torch.dtype, precision: str, arch: int | str | None) -> Settings:
    """The table of tile sizes for the fused decode.

    Args:
        kernel: forward | save (the forward that keeps activations) | backward.
        width: padded_width of the widest hidden layer.
        operands: of products.
        precision: of products of float32, from `product_precision`.
        arch: what Triton calls the device: 80, 90, ... on NVIDIA, a name elsewhere, None for the interpreter.
    """
    whole = min(width, 128) if width % 128 == 0 or width < 128 else 64
    if arch is None:
        return Settings(64, whole, 4, 2)
    if not isinstance(arch, int):  # AMD and Intel: 64 KB of shared memory at least
        return Settings(64, min(width, 64), 4, 2) if operands.itemsize == 2 else Settings(32, min(width, 32), 4, 1)
    roomy = arch // 10 in (9, 10) or arch == 80  # 227 or 163 KB of shared memory instead of 99
    if operands.itemsize > 2:
        return _float32_settings(kernel, width, precision, arch, roomy)
    narrow = min(width, 64)
    if kernel == "save":  # needs registers for places too
        return Settings(128, narrow, 8, 3 if roomy else 2)
    if kernel == "backward":
        return Settings(64, whole, 8, 2) if arch // 10 == 10 else Settings(128, whole, 8, 3 if roomy else 2)
    return Settings(128, whole if roomy else narrow, 8, 3)


def _float32_settings(kernel: str, width: int, precision: str, arch: int, roomy: bool) -> Settings:
    """Activations take twice the room: half of them are in shared memory, where one product finds them whole."""
    narrow = min(width, 32)
    if precision == "ieee":
        rows = {"forward": 128 if roomy else 64, "save": 64, "backward": 32}
        return Settings(rows[kernel], narrow, 8, 2)
    if arch // 10 == 9:
        return Settings(128, narrow, 8, 2)
    if arch // 10 == 10:
        return Settings(128, narrow, 8, 1) if kernel == "forward" else Settings(64, min(width, 64), 8, 1)
    if width < 64:
        return Settings(64, width, 4, 2)
    # Fewer rows than columns: then Triton gives each warp columns of its own, and all find the rows in shared memory.
    return Settings(32, 64, 8, 2 if roomy or kernel == "forward" else 1)


def current_arch() -> int | str | None:
    """The current device as `launch_settings` wants it."""
    if triton.knobs.runtime.interpret:
        return None
    return triton.runtime.driver.active.get_current_target().arch


@cache
def _precisions(target: GPUTarget) -> tuple[str, ...]:
    return make_backend(target).parse_options({}).allowed_dot_input_precisions


def product_precision(operands: torch.dtype) -> str:
    """How kernels multiply float32: "tf32" where PyTorch's switch allows it and the device can, otherwise "ieee".

    Read at every launch, as by PyTorch's own products: what a forward keeps looks the same either way.
    """
    if operands != torch.float32 or not allows_tf32():
        return "ieee"
    if triton.knobs.runtime.interpret:
        return "tf32"
    return "tf32" if "tf32" in _precisions(triton.runtime.driver.active.get_current_target()) else "ieee"
