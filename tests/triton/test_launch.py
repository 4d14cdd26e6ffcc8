"""The table of tile configurations, which imnets are fused, and the precision of products. No kernel runs."""

from __future__ import annotations

import importlib.util
import itertools

import pytest
import torch

if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton is not installed", allow_module_level=True)

from liif_fast.ops.backends.triton import fused, launch
from liif_fast.ops.backends.triton.fused import MAX_WIDTH, can_fuse


def test_imnets_that_can_fuse(monkeypatch):
    monkeypatch.setattr(fused, "current_device", lambda: launch.GPUTarget("cuda", 90, 32))
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert can_fuse((256, 13, 8), dtype) and can_fuse((1, 1), dtype) and can_fuse((16, 576), dtype)
        assert can_fuse((257, 512, 3), dtype, infers=True) == (dtype != torch.float32)
        assert not any(can_fuse(widths, dtype) for widths in ((257, 3), (3,)))
        assert not can_fuse((513, 3), dtype, infers=True)
    assert not can_fuse((16, 3), torch.float64)
    monkeypatch.setattr(fused, "current_device", lambda: launch.GPUTarget("cuda", 80, 32))
    assert not can_fuse((257, 3), torch.float16, infers=True)


def test_tile_configurations_fit_together():
    target = launch.GPUTarget
    devices = [target("cuda", arch, 32) for arch in (80, 86, 87, 89, 90, 100, 103, 120)]
    devices += [target("hip", "gfx942", 64), target("xpu", {}, 32), None]
    widths = [*range(1, MAX_WIDTH + 1), 257, 320, 400, 512]
    for device, width, dtype in itertools.product(devices, widths, (torch.bfloat16, torch.float32)):
        wide = width > MAX_WIDTH
        if wide and (dtype == torch.float32 or not launch.holds_wide(device)):
            continue
        columns = launch.tile_width(width)
        assert width <= launch.padded_width(width) <= columns and launch.padded_width(width) % 16 == 0
        kernels = ("forward",) if wide else ("forward", "save", "backward")
        for kernel, precision in itertools.product(kernels, ("ieee", "tf32")):
            key = launch.TileConfigKey(kernel, columns, dtype, precision)
            config = launch.tile_config(key, device)
            assert columns % config.block == 0 and config.block & (config.block - 1) == 0
            assert config.rows % 32 == 0 and config.block >= 16
            if dtype != torch.float32:  # masks in groups of 64 bits
                assert config.block == columns or config.block % 64 == 0


def test_precision_follows_the_switch_and_the_device(monkeypatch):
    assert launch.product_precision(torch.float32) == "ieee"
    monkeypatch.setattr(launch, "allows_tf32", lambda: True)
    monkeypatch.setattr(launch, "current_device", lambda: launch.GPUTarget("cuda", 90, 32))
    assert launch.product_precision(torch.float32) == "tf32"
    assert launch.product_precision(torch.float16) == "ieee"
    targets = {("cuda", 90, 32): True, ("hip", "gfx942", 64): True, ("hip", "gfx90a", 64): False}
    for target, has_tf32 in targets.items():
        assert ("tf32" in launch._precisions(launch.GPUTarget(*target))) == has_tf32
