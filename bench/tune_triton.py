"""Searches the tile configurations of Triton's fused decode on the current GPU; not yet run on one.

    python -m bench.tune_triton [--dtype bfloat16 | float16 | float32 | tf32] [--width 256]

Times every configuration that compiles and fits, kernel by kernel: the forward in inference (1024x1024 from 256x256),
the forward that saves activations and the backward in a training step (16 maps of 48x48, 2304 queries each). The other
kernels keep their configurations from the table. Configurations take turns. They are printed from fastest to slowest,
with a mark at the table's own. Copy a winner into ops/backends/triton/launch.py by hand.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
from collections.abc import Callable

import torch
from triton.backends.compiler import GPUTarget

from liif_fast import ops
from liif_fast.benchmark.problem import random_problem
from liif_fast.benchmark.runs import DTYPES, matmul_in, with_passes
from liif_fast.ops.backends.triton import fused
from liif_fast.ops.backends.triton.launch import (
    Kernel,
    TileConfig,
    TileConfigKey,
    current_device,
    product_precision,
    tile_config,
    tile_width,
)

REPETITIONS = 20
NARROW = (64, 128), (64, 128), (4, 8), (2, 3, 4)  # rows, blocks, warps, stages for operands of 16 bits
WIDE = (32, 64, 128), (32, 64), (4, 8), (1, 2, 3)  # for operands of 32


def candidates(width: int, dtype: torch.dtype) -> list[TileConfig]:
    """Every combination whose blocks fill the tile; a tile narrower than a block is one block."""
    columns = tile_width(width)
    found = {}
    for rows, block, warps, stages in itertools.product(*(WIDE if dtype == torch.float32 else NARROW)):
        if columns % min(block, columns) == 0:
            found[TileConfig(rows, min(block, columns), warps, stages)] = None
    return list(found)


def inference(dtype: torch.dtype, width: int, device: torch.device) -> Callable[[], object]:
    """Decodes 1024x1024 pixels from a folded 256x256 map."""
    problem = random_problem((256, 256), queries=1, device=device, hidden=(width,) * 4).to(dtype)
    latent_map = ops.fold(problem.feat, problem.weights[0])
    options = {"latent_map": latent_map, "backend": "triton"}
    return torch.no_grad()(lambda: ops.render(problem.feat, (1024, 1024), problem.weights, problem.biases, **options))


def training(dtype: torch.dtype, width: int, device: torch.device) -> Callable[[], object]:
    """Forward and backward of 16 maps with 2304 queries each."""
    problem = random_problem((48, 48), queries=2304, batch=16, device=device, hidden=(width,) * 4)
    problem = problem.to(dtype).with_gradients()
    return with_passes(lambda: ops.query(*problem, backend="triton"), problem.leaves())


def milliseconds(run: Callable[[], object]) -> float:
    """One call, timed by events of the device, which may be of any vendor."""
    begin, end = (torch.Event(enable_timing=True) for _ in range(2))
    begin.record()
    run()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end)


def search(
    key: TileConfigKey, run: Callable[[], object], tried: list[TileConfig], clock: Callable[..., float] = milliseconds
) -> dict[TileConfig, float]:
    """Times `run` with every tile configuration in `tried` for the key's kernel, in turns.

    Returns the median of each one that runs, the fastest first. Those that fail are printed with their reason.
    """
    times: dict[TileConfig, list[float]] = {}

    def choose(wanted: TileConfigKey, device: GPUTarget | None) -> TileConfig:
        return config if wanted.kernel == key.kernel else tile_config(wanted, device)

    fused.tile_config = choose
    try:
        for repetition in range(REPETITIONS + 1):
            for config in tried if repetition == 0 else list(times):
                try:
                    elapsed = clock(run)
                except Exception as error:  # too much shared memory, or a tile that Triton cannot lay out
                    times.pop(config, None)
                    reason = next(iter(str(error).splitlines()), type(error).__name__)
                    print(f"{key.kernel}: {tuple(config)} does not run: {reason[:100]}")
                    continue
                times.setdefault(config, [])
                if repetition:  # the first call compiles
                    times[config].append(elapsed)
    finally:
        fused.tile_config = tile_config
    medians = {config: statistics.median(taken) for config, taken in times.items()}
    return dict(sorted(medians.items(), key=lambda item: item[1]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32", "tf32"))
    parser.add_argument("--width", type=int, default=256, help="of the hidden layers, at most 256")
    args = parser.parse_args()
    if not torch.accelerator.is_available():
        parser.error("torch finds no GPU that it can use")
    device = torch.accelerator.current_accelerator()
    dtype = DTYPES[args.dtype]
    kernels: tuple[Kernel, ...] = ("forward", "save", "backward")
    with matmul_in(args.dtype, device, autocast=False):
        for kernel in kernels:
            key = TileConfigKey(kernel, tile_width(args.width), dtype, product_precision(dtype))
            run = (inference if kernel == "forward" else training)(dtype, args.width, device)
            for config, taken in search(key, run, candidates(args.width, dtype)).items():
                mark = "  <- the table's" if config == tile_config(key, current_device()) else ""
                print(f"{kernel}: {taken:8.3f} ms  rows, block, warps, stages = {tuple(config)}{mark}")


if __name__ == "__main__":
    main()
