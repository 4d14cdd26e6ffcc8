"""The command `liif-fast`: one entry in `COMMANDS` a subcommand, one sentence an error, exit codes that mean something.

0: done. 1: something failed, said on stderr. 2: the command line itself is wrong. 130 or 143: interrupted.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import os
import signal
import sys
import threading
import time
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn, TextIO

import torch
from PIL import Image
from torch import nn
from tqdm import tqdm

import liif_fast
from liif_fast.cli import bench as cli_bench
from liif_fast.cli import doctor
from liif_fast.cli import evaluate as cli_evaluate
from liif_fast.cli import train as cli_train
from liif_fast.images import files as image
from liif_fast.images import tiles
from liif_fast.images.upscaling import DTYPES, Scale, output_size, upscale, usable_device
from liif_fast.models import checkpoints
from liif_fast.ops.backends import BACKENDS
from liif_fast.utils import distributed, memory

_MIB = 1 << 20
# What goes wrong with files, numbers and memory, rather than in this program.
_EXPECTED = (ValueError, OSError, MemoryError, RuntimeError)


class _Parser(argparse.ArgumentParser):
    """Without the usage lines that argparse puts before every error."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message.rstrip('.')}; see {self.prog} --help.\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line `arguments` (None: those of the process) and return its exit code."""
    parser = _Parser(prog="liif-fast", description="LIIF: upscale images by any factor.")
    parser.add_argument("--version", action="version", version=f"liif-fast {liif_fast.__version__}")
    commands = parser.add_subparsers(title="commands", dest="command", required=True, parser_class=_Parser)
    for add in COMMANDS:
        add(commands)
    options = parser.parse_args(arguments)
    with _sentences(), _termination():
        try:
            return options.run(options)
        except KeyboardInterrupt:
            _complain("interrupted")
            return 130
        except _EXPECTED as error:
            _complain(error)
            return 1


def _add_doctor(commands: Any) -> None:
    parser = commands.add_parser("doctor", help="say what is installed and which backends can run here, or why not")
    parser.set_defaults(run=lambda _: doctor.main())


def _add_upscale(commands: Any) -> None:
    parser = commands.add_parser(
        "upscale",
        help="enlarge images by any factor",
        description="Enlarge images by any factor. Grey, RGB, alpha, 16 bits and colour profiles are kept where the "
        "output's format can hold them; EXIF orientation is applied.",
    )
    parser.add_argument("inputs", nargs="+", type=Path, metavar="INPUT", help="image files, or folders of them")
    known = ", ".join(sorted(image.FORMATS))
    parser.add_argument(
        "-o", "--output", required=True, help=f"a file ({known}) for one input, or a folder for any number of inputs"
    )
    target = parser.add_mutually_exclusive_group(required=True)
    target.add_argument("--scale", type=_scale, help="a factor such as 3.7, or one for rows and columns such as 2x3")
    target.add_argument("--size", type=_size, help="rows x columns of the result, such as 1080x1920")
    parser.add_argument("--model", help="a .safetensors or .pth file (default: the model that comes with the package)")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, ... (default: a GPU if there is one)")
    parser.add_argument("--backend", choices=list(BACKENDS), help="of the ops (default: the fastest that can run)")
    parser.add_argument("--dtype", choices=list(DTYPES), help="to compute in (default: that of the model's weights)")
    parser.add_argument("--threads", type=_whole_number, help="processor threads (default: as many as cores)")
    parser.add_argument("--quality", type=_whole_number, help="1 to 100, for JPEG and WebP (default: 95)")
    parser.add_argument(
        "--memory",
        type=_whole_number,
        default=tiles.DEFAULT_MEMORY // _MIB,
        metavar="MIB",
        help="working memory to aim at beside model, image and result (default: %(default)s)",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace output files that exist")
    parser.set_defaults(run=_upscale)


COMMANDS = (_add_upscale, cli_train.add, cli_evaluate.add, cli_bench.add, _add_doctor)


def _upscale(options: argparse.Namespace) -> int:
    """Every input on its own: what fails is named, the others are done."""
    Image.MAX_IMAGE_PIXELS = None  # memory is checked instead, on reading and before upscaling
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    jobs = distributed.share(_jobs(options.inputs, options.output))
    device = usable_device(distributed.own_device(options.device))
    model = checkpoints.load(options.model, device=device)
    failed = 0
    for source, target in jobs:
        try:
            _upscale_file(source, target, model, options)
        except _EXPECTED as error:
            _complain(error)
            failed += 1
    if failed and len(jobs) > 1:
        _complain(f"{failed} of {len(jobs)} images failed")
    return 1 if failed else 0


def _upscale_file(source: Path, target: Path, model: nn.Module, options: argparse.Namespace) -> None:
    start = time.perf_counter()
    picture = image.read(source)
    rows, cols = output_size((picture.height, picture.width), scale=options.scale, size=options.size)
    # The result, and the copies a format's writer makes of it: of its samples, and in four bytes a pixel.
    pixel_bytes = 2 * picture.channels * picture.colour.itemsize + 4
    memory.require(rows * cols * pixel_bytes, f"The {rows}x{cols} result of {source}", "choose a smaller scale or size")
    image.check_target(target, rows, cols, alpha=picture.alpha, quality=options.quality)
    if target.exists():
        if target.samefile(source):
            raise ValueError(f"{target} is the input itself: name another output.")
        if not options.overwrite:
            raise ValueError(f"{target} exists already: name another output or add --overwrite.")
    quiet = not sys.stderr.isatty()
    with tqdm(total=rows * cols, desc=source.name, unit="px", unit_scale=True, disable=quiet, leave=False) as bar:
        result = upscale(
            picture,
            size=(rows, cols),
            model=model,
            backend=options.backend,
            dtype=options.dtype,
            working_memory=options.memory * _MIB,
            progress=lambda done, _: _advance(bar, done),
        )
    image.write(result, target, quality=options.quality)
    seconds = time.perf_counter() - start
    print(f"{source} ({picture.height}x{picture.width}) -> {target} ({rows}x{cols}) in {seconds:.1f} s", flush=True)


def _advance(bar: Any, done: int) -> None:
    bar.update(done - bar.n)


def _jobs(inputs: Sequence[Path], out: str) -> list[tuple[Path, Path]]:
    """(input file, output file) pairs; makes the output folder where one is meant.

    Raises: ValueError, OSError for an output that does not fit the inputs.
    """
    files = [file for path in inputs for file in (_images_in(path) if path.is_dir() else [path])]
    one_to_one = len(inputs) == 1 and not inputs[0].is_dir()
    output = Path(out)
    is_folder = output.is_dir() or out.endswith(os.sep)
    if one_to_one and not is_folder and output.suffix.lower() in image.FORMATS:
        return [(files[0], output)]
    if one_to_one and not is_folder:
        known = ", ".join(sorted(image.FORMATS))
        raise ValueError(
            f"{output} has the unknown extension '{output.suffix}': name the output with one of {known}, or a folder "
            f"that exists or ends in '{os.sep}'."
        )
    if output.exists() and not output.is_dir():
        raise ValueError(f"{output} is a file, but several inputs need a folder as output.")
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"the folder {output} cannot be made: {error.strerror}.") from error
    jobs: dict[Path, Path] = {}
    for file in files:
        target = output / (file.name if file.suffix.lower() in image.FORMATS else f"{file.stem}.png")
        if target in jobs:
            raise ValueError(f"{jobs[target]} and {file} would both be written to {target}: rename one of them.")
        jobs[target] = file
    return [(file, target) for target, file in jobs.items()]


def _images_in(folder: Path) -> list[Path]:
    """The files of a folder whose names say that they are images, in order."""
    suffixes = {suffix for suffix, kind in Image.registered_extensions().items() if kind in Image.OPEN}
    found = sorted(f for f in folder.iterdir() if f.is_file() and f.suffix.lower() in suffixes and f.name[0] != ".")
    if not found:
        raise ValueError(f"{folder} is a folder without image files.")
    return found


def _scale(text: str) -> Scale:
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


def _whole_number(text: str) -> int:
    if not (text.isascii() and text.isdigit() and int(text) > 0):
        raise argparse.ArgumentTypeError(f"'{text}' is not a whole number from 1")
    return int(text)


def _complain(what: object) -> None:
    """One sentence on stderr."""
    text = str(what).strip() or type(what).__name__
    print(f"liif-fast: {text.splitlines()[0].rstrip('.')}.", file=sys.stderr, flush=True)


@contextlib.contextmanager
def _sentences() -> Iterator[None]:
    """Warnings in the same form as errors."""

    def show(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        _complain(f"warning: {message}")

    with warnings.catch_warnings():
        warnings.showwarning = show
        yield


@contextlib.contextmanager
def _termination() -> Iterator[None]:
    """Let SIGTERM end the program as Ctrl-C does, so that no temporary file stays behind."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(number: int, frame: object) -> NoReturn:
        raise SystemExit(128 + number)

    previous = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)
