"""`liif-fast upscale`: image files, folders or a pipe in, larger images out."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from torch import nn
from tqdm import tqdm

from liif_fast.cli.arguments import MODEL, add_imports, add_settings, add_target, path, threads, whole_number
from liif_fast.cli.messages import EXPECTED_ERRORS, print_error
from liif_fast.images import files, tiles, upscaling
from liif_fast.images.folders import list_pictures
from liif_fast.images.jobs import upscale_file
from liif_fast.models import checkpoints
from liif_fast.ops.backends import BACKENDS
from liif_fast.training import config
from liif_fast.utils import distributed, hardware

_MIB = 1 << 20
_PIPE = "-"
_LOSSLESS = ("PNG", "TIFF")
_NAMED = 5  # left-out files and folders named in a message; the others are counted
_KNOWN = ", ".join(sorted(files.FORMATS))


class _Job(NamedTuple):
    """One picture: where it is read, and where its enlargement is written, as a PNG, JPEG, ... (kind)."""

    source: Path | BinaryIO
    target: Path | BinaryIO
    kind: str


def add(commands: Any) -> None:
    """Add the subcommand to argparse's."""
    parser = commands.add_parser(
        "upscale",
        help="enlarge images by any factor",
        description="Enlarge images by any factor. Gray, RGB, alpha, 16 bits and color profiles are kept if the "
        "output's format supports them. EXIF orientation is applied.",
    )
    inputs = "image files, folders of them, or - for a pipe"
    parser.add_argument("inputs", nargs="+", type=path, metavar="INPUT", help=inputs)
    output = f"a file ({_KNOWN}) for one input, a folder for any number of inputs, or - for a pipe"
    parser.add_argument("-o", "--output", required=True, type=_output, help=output)
    add_target(parser, required=True)
    parser.add_argument("--model", help=f"{MODEL} (default: the best of these)")
    add_settings(parser)
    add_imports(parser)
    parser.add_argument("--ensemble", action="store_true", help="average the results of all 8 flips and turns")
    _add_output_options(parser)
    _add_resource_options(parser)
    parser.set_defaults(run=run)


def _add_output_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("files and folders")
    group.add_argument("--recursive", action="store_true", help="enter subfolders, which the output folder repeats")
    kinds = sorted(suffix[1:] for suffix in files.FORMATS)
    formats = "format of files in the output folder, or of a pipe (default: the input's if it can be written, else png)"
    group.add_argument("--format", choices=kinds, help=formats)
    group.add_argument("--suffix", type=_suffix, default="", help="ending of names in the output folder, such as _x4")
    quality = (
        "quality of JPEG and WebP, 1 to 100 (default: 95: losses are hard to see); 100 makes WebP lossless, and a "
        "JPEG larger, but not lossless"
    )
    group.add_argument("--quality", type=lambda text: whole_number(text, 100), help=quality)
    existing = group.add_mutually_exclusive_group()
    existing.add_argument("--overwrite", action="store_true", help="replace output files that exist")
    existing.add_argument("--skip-existing", action="store_true", help="leave them: a job that was stopped goes on")


def _add_resource_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("computation")
    group.add_argument("--device", help="cpu, cuda, cuda:1, ... (default: a GPU if there is one)")
    group.add_argument("--backend", choices=list(BACKENDS), help="backend of the ops (default: first that can run)")
    dtype = "dtype of the computation (default: that of the weights)"
    group.add_argument("--dtype", choices=list(upscaling.DTYPES), help=dtype)
    group.add_argument("--threads", type=threads, help="processor threads (default: as many as cores)")
    group.add_argument(
        "--memory",
        type=whole_number,
        default=tiles.DEFAULT_MEMORY // _MIB,
        metavar="MIB",
        help="target for working memory, not counting model, image and result (default: %(default)s)",
    )
    largest = "refuse inputs of more pixels than this (default: whatever fits in memory)"
    group.add_argument("--max-pixels", type=whole_number, metavar="N", help=largest)


def run(options: argparse.Namespace) -> int:
    """Upscale each input; after an error, print it and continue with the next input. Returns the exit code."""
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    jobs = distributed.share(_jobs(options))
    if options.output != _PIPE:
        return _run_jobs(jobs, options)
    with contextlib.redirect_stdout(sys.stderr):  # the pipe holds the picture and nothing else
        return _run_jobs(jobs, options)


def _run_jobs(jobs: list[_Job], options: argparse.Namespace) -> int:
    waiting = jobs
    if options.skip_existing:
        waiting = [job for job in jobs if not (isinstance(job.target, Path) and job.target.exists())]
    if len(waiting) < len(jobs):
        print(f"skipped {len(jobs) - len(waiting)} of {len(jobs)} images, whose outputs exist", flush=True)
    if not waiting:
        return 0
    lossless = sorted({job.kind for job in waiting} & set(_LOSSLESS))
    if options.quality is not None and lossless:
        print_error(f"warning: --quality has no effect on {' and '.join(lossless)}: nothing is lost there")
    for name in options.imports:
        config.import_code(name)
    device = hardware.usable_device(distributed.own_device(options.device))
    model = checkpoints.load(options.model, device=device, settings=dict(options.settings))
    failed = 0
    for number, job in enumerate(waiting, 1):
        try:
            _upscale(job, model, options, f"{number} of {len(waiting)}: " if len(waiting) > 1 else "")
        except EXPECTED_ERRORS as error:
            print_error(error)
            failed += 1
    if failed and len(waiting) > 1:
        print_error(f"{failed} of {len(waiting)} images failed")
    return 1 if failed else 0


def _upscale(job: _Job, model: nn.Module, options: argparse.Namespace, place: str) -> None:
    start = time.perf_counter()
    if isinstance(job.target, Path) and options.recursive:
        job.target.parent.mkdir(parents=True, exist_ok=True)
    name, hidden = _label(job.source), not sys.stderr.isatty()
    with tqdm(desc=place + Path(name).name, unit="px", unit_scale=True, disable=hidden, leave=False) as bar:
        result = upscale_file(
            job.source,
            job.target,
            kind=job.kind,
            scale=options.scale,
            size=options.size,
            model=model,
            backend=options.backend,
            dtype=options.dtype,
            working_memory=options.memory * _MIB,
            ensemble=options.ensemble,
            quality=options.quality,
            overwrite=options.overwrite,
            max_pixels=options.max_pixels,
            progress=lambda done, _: bar.update(done - bar.n),
            started=lambda size: bar.reset(size[0] * size[1]),
        )
    (rows, cols), (new_rows, new_cols) = result.input_size, result.output_size
    if options.size is not None and abs(new_rows * cols - new_cols * rows) > max(rows, cols):  # more than rounding
        shape = f"{name} ({cols}x{rows}) becomes {new_cols}x{new_rows}, which changes its shape"
        print_error(f"warning: {shape}: --size {new_cols}x keeps it")
    done = f"{name} ({cols}x{rows}) -> {_label(job.target)} ({new_cols}x{new_rows})"
    print(f"{done} in {time.perf_counter() - start:.1f} s", flush=True)


def _label(end: Path | BinaryIO) -> str:
    return str(end) if isinstance(end, Path) else end.name  # <stdin>, <stdout>


def _jobs(options: argparse.Namespace) -> list[_Job]:
    """The work of the command line; creates the output folder if the output is one.

    Raises: ValueError, OSError for an output that does not match the inputs.
    """
    inputs, output = options.inputs, Path(options.output)
    pipe_in, pipe_out = Path(_PIPE) in inputs, options.output == _PIPE
    is_one = len(inputs) == 1 and (pipe_in or not inputs[0].is_dir())
    if (pipe_in or pipe_out) and not is_one:
        raise ValueError("a pipe (-) holds one picture: give one input, and a file or - as output.")
    is_folder = not pipe_out and (output.is_dir() or options.output.endswith(os.sep))
    if not is_one or (is_folder and not pipe_in):
        return _folder_jobs(options, output)
    if is_folder:
        raise ValueError(f"{output} is a folder: a picture from a pipe has no name, so name the output file.")
    if options.suffix:
        raise ValueError("--suffix is for files in a folder: this output has a name of its own.")
    if pipe_in and sys.stdin.isatty():
        raise ValueError("stdin is a terminal: pipe a picture into it, or name a file instead of -.")
    source = sys.stdin.buffer if pipe_in else inputs[0]
    if pipe_out:
        if options.format is None:
            raise ValueError("add --format, such as --format png: a pipe has no name that tells the format.")
        if sys.stdout.isatty():
            raise ValueError("stdout is a terminal, which cannot show a picture: redirect it, or name a file.")
        return [_Job(source, sys.stdout.buffer, files.FORMATS[f".{options.format}"])]
    kind = files.FORMATS.get(output.suffix.lower())
    if kind is None:
        raise ValueError(
            f"{output} has the unknown extension '{output.suffix}': name the output with one of {_KNOWN}, or a folder "
            f"that exists or ends in '{os.sep}'."
        )
    if options.format is not None and files.FORMATS[f".{options.format}"] != kind:
        raise ValueError(f"{output} is a {kind} by its name, but --format is {options.format}: leave one of them out.")
    return [_Job(source, output, kind)]


def _folder_jobs(options: argparse.Namespace, output: Path) -> list[_Job]:
    sources = list(_sources(options, output))
    if output.exists() and not output.is_dir():
        raise ValueError(f"{output} is a file, but several inputs need a folder as output.")
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"the folder {output} cannot be created: {error.strerror}.") from error
    targets: dict[Path, Path] = {}
    for file, folder in sources:
        known = file.suffix if file.suffix.lower() in files.FORMATS else ".png"
        ending = f".{options.format}" if options.format else known
        target = output / folder / f"{file.stem}{options.suffix}{ending}"
        if target in targets:
            both = f"{targets[target]} and {file} would both be written to {target}"
            raise ValueError(f"{both}: rename one of them{' or leave out --format' if options.format else ''}.")
        targets[target] = file
    if options.suffix:  # results of an earlier run in the same folder are no inputs
        results = {target.resolve() for target in targets}
        targets = {target: file for target, file in targets.items() if file.resolve() not in results}
    return [_Job(file, target, files.FORMATS[target.suffix.lower()]) for target, file in targets.items()]


def _sources(options: argparse.Namespace, output: Path) -> Iterator[tuple[Path, Path]]:
    """Every input file, with the folder below the output folder that its result belongs to."""
    for given in options.inputs:
        if not given.is_dir():
            yield given, Path()
            continue
        pictures, left_out = list_pictures(given, options.recursive, exclude=output)
        if not pictures:
            more = f": it holds {_described(left_out, given)}" if left_out else ""
            raise ValueError(f"{given} is a folder without image files{more}.")
        if left_out and os.environ.get("RANK", "0") == "0":  # one process of torchrun's
            print_error(f"left out of {given}: {_described(left_out, given)}")
        for file in pictures:
            yield file, file.parent.relative_to(given)


def _described(left_out: list[Path], folder: Path) -> str:
    """Files of other kinds and folders as words, counted and named."""
    folders, others = ([each for each in left_out if each.is_dir() == wanted] for wanted in (True, False))
    kinds = ", ".join(sorted({each.suffix.lower() or "no extension" for each in others}))
    parts = []
    for paths, word, why in (
        (others, "file", f"of other kinds ({kinds})"),
        (folders, "subfolder", "(see --recursive)"),
    ):
        names = ", ".join(str(each.relative_to(folder)) for each in paths[:_NAMED])
        more = f" and {len(paths) - _NAMED} more" if len(paths) > _NAMED else ""
        if paths:
            parts.append(f"{len(paths)} {word}{'s' if paths[1:] else ''} {why}: {names}{more}")
    return "; ".join(parts)


def _output(text: str) -> str:
    path(text)
    return text


def _suffix(text: str) -> str:
    if Path(f"x{text}").name != f"x{text}":
        raise argparse.ArgumentTypeError(f"'{text}' cannot be part of a file's name")
    return text
