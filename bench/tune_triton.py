"""Searches the launch settings of Triton's fused decode on the GPU at hand; not yet run on one.

    python -m bench.tune_triton [--dtype bfloat16 | float16 | float32 | tf32] [--width 256]

Times every setting that compiles and fits, kernel by kernel: the forward in inference (1024x1024 from 256x256), the
forward that keeps activations and the backward in a training step (16 maps of 48x48, 2304 queries each), where the
other kernels keep the table's settings. Settings take turns; they are printed from fastest to slowest, and what
`launch_settings` says is marked. Copy a winner into ops/backends/triton/launch.py by hand: the table is the only place
that decides.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
from collections.abc import Callable

import torch
from triton.backends.compiler import GPUTarget

from liif_fast import ops
from liif_fast.ops.backends.triton import decode as triton_query
from liif_fast.ops.backends.triton.launch import (
    Kernel,
    Problem,
    Settings,
    current_device,
    launch_settings,
    product_precision,
    tile_width,
)

REPETITIONS = 20
NARROW = (64, 128), (64, 128), (4, 8), (2, 3, 4)  # rows, blocks, warps, stages for operands of 16 bits
WIDE = (32, 64, 128), (32, 64), (4, 8), (1, 2, 3)  # for operands of 32


def candidates(width: int, dtype: torch.dtype) -> list[Settings]:
    """Every combination whose blocks fill the tile; of a tile narrower than a block, as one."""
    columns = tile_width(width)
    found = {}
    for rows, block, warps, stages in itertools.product(*(WIDE if dtype == torch.float32 else NARROW)):
        if columns % min(block, columns) == 0:
            found[Settings(rows, min(block, columns), warps, stages)] = None
    return list(found)


def make_problem(dtype: torch.dtype, width: int, device: torch.device) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Weights and biases of a 580-(width x 4)-3 imnet."""
    generator = torch.Generator(device).manual_seed(0)
    sizes = [580, *[width] * 4, 3]
    weights = [
        torch.randn(o, i, generator=generator, device=device, dtype=dtype) / i**0.5
        for i, o in itertools.pairwise(sizes)
    ]
    return weights, [torch.zeros(o, device=device, dtype=dtype) for o in sizes[1:]]


def inference(dtype: torch.dtype, width: int, device: torch.device) -> Callable[[], object]:
    """Decodes 1024x1024 pixels from a folded 256x256 map."""
    weights, biases = make_problem(dtype, width, device)
    feat = torch.randn(1, 64, 256, 256, device=device, dtype=dtype)
    latent_map = ops.fold(feat, weights[0])

    @torch.no_grad()
    def run() -> object:
        return ops.render(feat, (1024, 1024), weights, biases, latent_map=latent_map, backend="triton")

    return run


def training(dtype: torch.dtype, width: int, device: torch.device) -> Callable[[], object]:
    """Forward and backward of 16 maps with 2304 queries each."""
    weights, biases = make_problem(dtype, width, device)
    leaves = [tensor.requires_grad_() for tensor in (*weights, *biases)]
    feat = torch.randn(16, 64, 48, 48, device=device, dtype=dtype, requires_grad=True)
    coord = torch.rand(16, 2304, 2, device=device) * 2 - 1
    cell = torch.full_like(coord, 2 / 192)

    def run() -> object:
        out = ops.query(feat, coord, cell, weights, biases, backend="triton")
        return torch.autograd.grad(out.float().square().sum(), [feat, *leaves])

    return run


def milliseconds(run: Callable[[], object]) -> float:
    """One call, by the device's own clock."""
    begin, end = (torch.Event(enable_timing=True) for _ in range(2))
    begin.record()
    run()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end)


def search(
    problem: Problem,
    run: Callable[[], object],
    settings: list[Settings],
    clock: Callable[[Callable[[], object]], float] = milliseconds,
) -> dict[Settings, float]:
    """Times `run` with every setting of the problem's kernel, in turns.

    Returns:
        What the clock said, the median of each setting that runs, the fastest first. Those that do not run are printed
        with their reason.
    """
    times: dict[Settings, list[float]] = {}

    def choose(wanted: Problem, device: GPUTarget | None) -> Settings:
        return setting if wanted.kernel == problem.kernel else launch_settings(wanted, device)

    triton_query.launch_settings = choose
    try:
        for repetition in range(REPETITIONS + 1):
            for setting in settings if repetition == 0 else list(times):
                try:
                    elapsed = clock(run)
                except Exception as error:  # too much shared memory, or a tile that Triton cannot lay out
                    times.pop(setting, None)
                    reason = next(iter(str(error).splitlines()), type(error).__name__)
                    print(f"{problem.kernel}: {tuple(setting)} does not run: {reason[:100]}")
                    continue
                times.setdefault(setting, [])
                if repetition:  # the first call compiles
                    times[setting].append(elapsed)
    finally:
        triton_query.launch_settings = launch_settings
    medians = {setting: statistics.median(taken) for setting, taken in times.items()}
    return dict(sorted(medians.items(), key=lambda item: item[1]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32", "tf32"))
    parser.add_argument("--width", type=int, default=256, help="of the hidden layers, at most 256")
    arguments = parser.parse_args()
    if not torch.accelerator.is_available():
        parser.error("torch finds no GPU that it can use")
    if arguments.dtype == "tf32":
        torch.backends.cuda.matmul.fp32_precision = "tf32"
    device = torch.accelerator.current_accelerator()
    dtype = torch.float32 if arguments.dtype == "tf32" else getattr(torch, arguments.dtype)
    settings = candidates(arguments.width, dtype)
    width, precision = tile_width(arguments.width), product_precision(dtype)
    kernels: tuple[Kernel, ...] = ("forward", "save", "backward")
    for kernel in kernels:
        problem = Problem(kernel, width, dtype, precision)
        run = (inference if kernel == "forward" else training)(dtype, arguments.width, device)
        for setting, taken in search(problem, run, settings).items():
            mark = "  <- the table's" if setting == launch_settings(problem, current_device()) else ""
            print(f"{kernel}: {taken:8.3f} ms  rows, block, warps, stages = {tuple(setting)}{mark}")


if __name__ == "__main__":
    main()
