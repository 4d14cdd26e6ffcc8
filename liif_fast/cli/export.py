"""`liif-fast export`: a model as a file for programs without PyTorch."""

from __future__ import annotations

import argparse
import time
from typing import Any

from liif_fast.cli.arguments import MODEL, add_imports, add_settings, add_target, path
from liif_fast.models import checkpoints
from liif_fast.models.export import DTYPES, export
from liif_fast.training import config


def add(commands: Any) -> None:
    """Add the subcommand to argparse's."""
    parser = commands.add_parser(
        "export",
        help="write a model as ONNX, or as a program of torch.export",
        description="Write encoder and decoder as one program for images of any size: ONNX (.onnx), or what "
        "torch.export.load reads (.pt2). Without --scale and --size it has a second input `size`, (rows, columns).",
    )
    parser.add_argument("model", metavar="MODEL", help=MODEL)
    parser.add_argument("-o", "--output", required=True, type=path, help="the file, .onnx or .pt2")
    add_target(parser, required=False)
    parser.add_argument("--dtype", choices=list(DTYPES), help="dtype of the program (default: that of the weights)")
    add_settings(parser)
    add_imports(parser)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Export and print what the file holds; returns the exit code."""
    if options.size is not None and None in options.size:
        raise ValueError("--size needs both sides, such as 1920x1080: a program takes images of any shape")
    for name in options.imports:
        config.import_code(name)
    start = time.perf_counter()
    model = checkpoints.load(options.model, settings=dict(options.settings))
    file = export(model, options.output, scale=options.scale, size=options.size, dtype=options.dtype)
    print(f"{options.model} -> {file} ({file.stat().st_size / 1e6:.1f} MB) in {time.perf_counter() - start:.1f} s")
    return 0
