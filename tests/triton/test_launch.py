"""The table of launch settings, which imnets are fused, and the precision of products. No kernel runs."""

from __future__ import annotations

import importlib.util
import itertools

import pytest
import torch

if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton is not installed", allow_module_level=True)

from liif_fast.ops.backends.triton import launch
from liif_fast.ops.backends.triton.decode import is_fused


def test_what_is_fused():
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert is_fused((256, 13, 8), dtype) and is_fused((1, 1), dtype)
        assert not any(is_fused(widths, dtype) for widths in ((257, 3), (16, 9), (3,)))
    assert not is_fused((16, 3), torch.float64)


def test_launch_settings_fit_together():
    target = launch.GPUTarget
    devices = [target("cuda", arch, 32) for arch in (80, 86, 87, 89, 90, 100, 103, 120)]
    devices += [target("hip", "gfx942", 64), target("xpu", {}, 32), None]
    for device, width, dtype in itertools.product(devices, range(1, 257), (torch.bfloat16, torch.float32)):
        columns = launch.tile_width(width)
        assert width <= launch.padded_width(width) <= columns and launch.padded_width(width) % 16 == 0
        for kernel, precision in itertools.product(("forward", "save", "backward"), ("ieee", "tf32")):
            problem = launch.Problem(kernel, columns, dtype, precision)
            settings = launch.launch_settings(problem, device)
            assert columns % settings.block == 0 and settings.block & (settings.block - 1) == 0
            assert settings.rows % 32 == 0 and settings.block >= 16
            if dtype != torch.float32:  # masks in groups of 64 bits
                assert settings.block == columns or settings.block % 64 == 0


def test_precision_follows_the_switch_and_the_device(monkeypatch):
    assert launch.product_precision(torch.float32) == "ieee"
    monkeypatch.setattr(launch, "allows_tf32", lambda: True)
    assert launch.product_precision(torch.float32) == "tf32"
    assert launch.product_precision(torch.float16) == "ieee"
    targets = {("cuda", 90, 32): True, ("hip", "gfx942", 64): True, ("hip", "gfx90a", 64): False}
    for target, has_tf32 in targets.items():
        assert ("tf32" in launch._precisions(launch.GPUTarget(*target))) == has_tf32
