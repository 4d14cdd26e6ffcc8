"""`liif-fast upscale`: image files or folders in, larger image files out."""

from __future__ import annotations

import argparse
import math
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import nn
from tqdm import tqdm

from liif_fast.cli.arguments import add_settings, whole_number
from liif_fast.cli.messages import EXPECTED_ERRORS, print_error
from liif_fast.images import files, tiles, upscaling
from liif_fast.models import checkpoints
from liif_fast.ops.backends import BACKENDS
from liif_fast.utils import distributed, hardware, memory

_MIB = 1 << 20


def add(commands: Any) -> None:
    """Add the subcommand to argparse's."""
    parser = commands.add_parser(
        "upscale",
        help="enlarge images by any factor",
        description="Enlarge images by any factor. Gray, RGB, alpha, 16 bits and color profiles are kept if the "
        "output's format supports them. EXIF orientation is applied.",
    )
    parser.add_argument("inputs", nargs="+", type=Path, metavar="INPUT", help="image files, or folders of them")
    known = ", ".join(sorted(files.FORMATS))
    parser.add_argument(
        "-o", "--output", required=True, help=f"a file ({known}) for one input, or a folder for any number of inputs"
    )
    target = parser.add_mutually_exclusive_group(required=True)
    target.add_argument("--scale", type=_scale, help="a factor such as 3.7, or one for rows and columns such as 2x3")
    target.add_argument("--size", type=_size, help="rows x columns of the result, such as 1080x1920")
    model = "a .safetensors or .pth file, or a name that `liif-fast models` lists (default: the best of these)"
    parser.add_argument("--model", help=model)
    add_settings(parser)
    parser.add_argument("--device", help="cpu, cuda, cuda:1, ... (default: a GPU if there is one)")
    parser.add_argument("--backend", choices=list(BACKENDS), help="backend of the ops (default: first that can run)")
    dtype = "dtype of the computation (default: that of the weights)"
    parser.add_argument("--dtype", choices=list(upscaling.DTYPES), help=dtype)
    parser.add_argument("--threads", type=whole_number, help="processor threads (default: as many as cores)")
    parser.add_argument("--quality", type=whole_number, help="quality of JPEG and WebP, 1 to 100 (default: 95)")
    parser.add_argument(
        "--memory",
        type=whole_number,
        default=tiles.DEFAULT_MEMORY // _MIB,
        metavar="MIB",
        help="target for working memory, not counting model, image and result (default: %(default)s)",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace output files that exist")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Upscale each input; after an error, print it and continue with the next input. Returns the exit code."""
    Image.MAX_IMAGE_PIXELS = None  # memory is checked instead, before reading and before upscaling
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    jobs = distributed.share(_jobs(options.inputs, options.output))
    device = hardware.usable_device(distributed.own_device(options.device))
    model = checkpoints.load(options.model, device=device, settings=dict(options.settings))
    failed = 0
    for source, target in jobs:
        try:
            _upscale_file(source, target, model, options)
        except EXPECTED_ERRORS as error:
            print_error(error)
            failed += 1
    if failed and len(jobs) > 1:
        print_error(f"{failed} of {len(jobs)} images failed")
    return 1 if failed else 0


def _upscale_file(source: Path, target: Path, model: nn.Module, options: argparse.Namespace) -> None:
    start = time.perf_counter()
    picture = files.read(source)
    size = rows, cols = upscaling.output_size((picture.height, picture.width), scale=options.scale, size=options.size)
    # The result, and the copies in the format's writer: one of its samples, and one of four bytes per pixel.
    pixel_bytes = 2 * picture.channels * picture.color.itemsize + 4
    memory.require(rows * cols * pixel_bytes, f"The {rows}x{cols} result of {source}", "choose a smaller scale or size")
    files.check_target(target, picture, size, quality=options.quality)
    if target.exists():
        if target.samefile(source):
            raise ValueError(f"{target} is the input itself: name another output.")
        if not options.overwrite:
            raise ValueError(f"{target} exists already: name another output or add --overwrite.")
    hidden = not sys.stderr.isatty()
    with tqdm(total=rows * cols, desc=source.name, unit="px", unit_scale=True, disable=hidden, leave=False) as bar:
        result = upscaling.upscale(
            picture,
            size=size,
            model=model,
            backend=options.backend,
            dtype=options.dtype,
            working_memory=options.memory * _MIB,
            progress=lambda done, _: bar.update(done - bar.n),
        )
    files.write(result, target, quality=options.quality)
    seconds = time.perf_counter() - start
    print(f"{source} ({picture.height}x{picture.width}) -> {target} ({rows}x{cols}) in {seconds:.1f} s", flush=True)


def _jobs(inputs: Sequence[Path], out: str) -> list[tuple[Path, Path]]:
    """(input file, output file) pairs; creates the output folder if `out` is one.

    Raises: ValueError, OSError for an output that does not match the inputs.
    """
    sources = [file for path in inputs for file in (_images_in(path) if path.is_dir() else [path])]
    one_to_one = len(inputs) == 1 and not inputs[0].is_dir()
    output = Path(out)
    is_folder = output.is_dir() or out.endswith(os.sep)
    if one_to_one and not is_folder and output.suffix.lower() in files.FORMATS:
        return [(sources[0], output)]
    if one_to_one and not is_folder:
        known = ", ".join(sorted(files.FORMATS))
        raise ValueError(
            f"{output} has the unknown extension '{output.suffix}': name the output with one of {known}, or a folder "
            f"that exists or ends in '{os.sep}'."
        )
    if output.exists() and not output.is_dir():
        raise ValueError(f"{output} is a file, but several inputs need a folder as output.")
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"the folder {output} cannot be created: {error.strerror}.") from error
    jobs: dict[Path, Path] = {}
    for file in sources:
        target = output / (file.name if file.suffix.lower() in files.FORMATS else f"{file.stem}.png")
        if target in jobs:
            raise ValueError(f"{jobs[target]} and {file} would both be written to {target}: rename one of them.")
        jobs[target] = file
    return [(file, target) for target, file in jobs.items()]


def _images_in(folder: Path) -> list[Path]:
    """The files of a folder with an image suffix, in order of name."""
    suffixes = {suffix for suffix, kind in Image.registered_extensions().items() if kind in Image.OPEN}
    found = sorted(f for f in folder.iterdir() if f.is_file() and f.suffix.lower() in suffixes and f.name[0] != ".")
    if not found:
        raise ValueError(f"{folder} is a folder without image files.")
    return found


def _scale(text: str) -> upscaling.Scale:
    parts = text.lower().split("x")
    try:
        factors = [float(part) for part in parts]
    except ValueError:
        factors = []
    if len(factors) not in (1, 2) or not all(math.isfinite(factor) and factor > 0 for factor in factors):
        raise argparse.ArgumentTypeError(f"'{text}' is not a positive number such as 3.7, nor two such as 2x3")
    return factors[0] if len(factors) == 1 else (factors[0], factors[1])


def _size(text: str) -> tuple[int, int]:
    parts = text.lower().split("x")
    if len(parts) != 2 or not all(part.isascii() and part.isdigit() and int(part) > 0 for part in parts):
        raise argparse.ArgumentTypeError(f"'{text}' is not rows x columns such as 1080x1920")
    return int(parts[0]), int(parts[1])
