"""What every Triton launcher shares: compile options, device, tile sizes, dtypes, a fixed order for sums."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

# No multiply and add may contract to an FMA unasked: a rounding decides which latent is the nearest one.
OPTIONS = {"enable_fp_fusion": False}

DTYPES = {
    torch.float64: tl.float64,
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
}


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


def launch_settings(kernel: str, width: int, arch: int | str | None) -> Settings:
    """The table of tile sizes for the fused decode.

    Args:
        kernel: forward | save (the forward that keeps activations) | backward.
        width: padded_width of the widest hidden layer.
        arch: what Triton calls the device: 80, 90, ... on NVIDIA, a name elsewhere, None for the interpreter.
    """
    whole = min(width, 128) if width % 128 == 0 or width < 128 else 64
    if arch is None:
        return Settings(64, whole, 4, 2)
    if not isinstance(arch, int):  # AMD and Intel: 64 KB of shared memory at least
        return Settings(64, min(width, 64), 4, 2)
    if arch // 10 in (9, 10) or arch == 80:  # 227 or 163 KB of shared memory
        return Settings(128, whole, 8, 3)
    if kernel == "forward":  # 99 KB
        return Settings(128, min(width, 64), 8, 3)
    return Settings(128, whole, 8, 2)


def current_arch() -> int | str | None:
    """The current device as `launch_settings` wants it."""
    if triton.knobs.runtime.interpret:
        return None
    return triton.runtime.driver.active.get_current_target().arch
