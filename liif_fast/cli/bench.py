"""`liif-fast bench`: the speed on this machine compared with the original formulation, in two minutes."""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

import torch

from liif_fast.cli.arguments import whole_number
from liif_fast.utils.hardware import usable_device


def add(commands: Any) -> None:
    """Add the subcommand to argparse's."""
    parser = commands.add_parser(
        "bench",
        help="measure the speed on this machine against the original formulation",
        description="Time decoding, a training step and a whole upscaling, with liif_fast and the original formulation "
        "in plain PyTorch, and print one table. It takes two minutes; do not use the machine meanwhile.",
    )
    parser.add_argument("--device", help="cpu, cuda, cuda:1, ... (default: a GPU if there is one)")
    parser.add_argument("--threads", type=whole_number, help="processor threads (default: as many as cores)")
    duration = "duration (default: %(default)g); methods that need more than twice as long are left out"
    parser.add_argument("--seconds", type=_seconds, default=120.0, help=duration)
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the numbers to a file")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Measure and print. Raises ValueError for a device that cannot be used or a file that cannot be written."""
    from liif_fast.benchmark import command  # imports torch.utils.benchmark, which the other commands do not need

    if options.json is not None and not options.json.resolve().parent.is_dir():
        raise ValueError(f"the folder of --json {options.json} does not exist: make it first.")
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    device = usable_device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"device {str(device)!r} cannot be timed: choose cpu or cuda.")
    return command.main(device, seconds=options.seconds, json_file=options.json)


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and value > 0):
        raise argparse.ArgumentTypeError(f"'{text}' is not a number of seconds above 0")
    return value
