"""The search of Triton's launch settings: which settings it tries, and that it restores the table."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")
from bench import tune_triton
from liif_fast.ops.backends.triton import decode, launch


@pytest.mark.parametrize("width", [20, 64, 180, 256])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_a_search_tries_every_setting_of_the_table(width: int, dtype: torch.dtype) -> None:
    columns, tried = launch.tile_width(width), tune_triton.candidates(width, dtype)
    assert len(tried) == len(set(tried)) and all(columns % setting.block == 0 for setting in tried)
    for arch in (80, 86, 90, 100):
        for kernel in ("forward", "save", "backward"):
            problem = launch.Problem(kernel, columns, dtype, "ieee")
            assert launch.launch_settings(problem, launch.GPUTarget("cuda", arch, 32)) in tried


def test_a_search_times_every_setting_that_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = launch.Problem("save", 32, torch.float16, "ieee")
    settings = [launch.Settings(rows, 32, 4, 2) for rows in (32, 48, 64)]  # Triton refuses 48
    monkeypatch.setattr(tune_triton, "REPETITIONS", 2)
    seconds = {32: 2.0, 64: 1.0}
    found = tune_triton.search(
        problem, lambda: decode.launch_settings(problem, None), settings, lambda run: seconds[run().rows]
    )
    assert list(found.items()) == [(settings[2], 1.0), (settings[0], 2.0)]
    assert decode.launch_settings is launch.launch_settings
