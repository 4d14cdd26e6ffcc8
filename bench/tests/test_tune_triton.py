"""The search of Triton's tile configurations: which ones it tries, and that it restores the table."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")
from bench import tune_triton
from liif_fast.ops.backends.triton import fused, launch


@pytest.mark.parametrize("width", [20, 64, 180, 256])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_a_search_tries_every_configuration_of_the_table(width: int, dtype: torch.dtype) -> None:
    columns, tried = launch.tile_width(width), tune_triton.candidates(width, dtype)
    assert len(tried) == len(set(tried)) and all(columns % config.block == 0 for config in tried)
    for arch in (80, 86, 90, 100):
        for kernel in ("forward", "save", "backward"):
            key = launch.TileConfigKey(kernel, columns, dtype, "ieee")
            assert launch.tile_config(key, launch.GPUTarget("cuda", arch, 32)) in tried


def test_a_search_times_every_configuration_that_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    key = launch.TileConfigKey("save", 32, torch.float16, "ieee")
    configs = [launch.TileConfig(rows, 32, 4, 2) for rows in (32, 48, 64)]  # Triton refuses 48
    monkeypatch.setattr(tune_triton, "REPETITIONS", 2)
    seconds = {32: 2.0, 64: 1.0}
    found = tune_triton.search(key, lambda: fused.tile_config(key, None), configs, lambda run: seconds[run().rows])
    assert list(found.items()) == [(configs[2], 1.0), (configs[0], 2.0)]
    assert fused.tile_config is launch.tile_config
