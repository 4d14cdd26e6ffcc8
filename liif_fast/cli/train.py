"""`liif-fast train`: train from a configuration in the original's format, in one process or several."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch

from liif_fast import training
from liif_fast.cli.arguments import path, threads
from liif_fast.training import config
from liif_fast.utils import distributed


def add(commands: Any) -> None:
    """Add the subcommand to argparse's."""
    parser = commands.add_parser(
        "train",
        help="train a model from a configuration",
        description="Train a model from a YAML configuration in the format of yinboc/liif. The run's folder is "
        "SAVE/NAME[_TAG]; an existing folder needs --resume. On several GPUs or in several processes: "
        "torchrun --nproc-per-node N -m liif_fast train --config FILE.",
    )
    parser.add_argument("--config", required=True, type=path, metavar="FILE", help="YAML file")
    parser.add_argument("--name", help="name of the run's folder (default: _ and the configuration's name)")
    parser.add_argument("--tag", help="suffix of the name, after an underscore")
    parser.add_argument("--save", type=path, default=Path("save"), help="folder of all runs (default: %(default)s)")
    parser.add_argument(
        "--set",
        dest="overrides",
        action="append",
        nargs="+",
        default=[],
        metavar="KEY=VALUE",
        help="change the configuration, for example optimizer.args.lr=1e-3 (repeatable, with one or more values)",
    )
    parser.add_argument(
        "--resume", metavar="auto|FILE", help="resume the run in its folder, or from a state.pth or epoch-*.pth"
    )
    parser.add_argument("--device", help="cpu, cuda, cuda:1, ... (default: a GPU if there is one)")
    parser.add_argument("--threads", type=threads, help="processor threads (default: as many as cores)")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Train; returns the exit code."""
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    overrides = [each for group in options.overrides for each in group]
    content = config.load(options.config, "train", overrides)
    with distributed.setup(options.device) as device:
        report = _print_line if distributed.is_main() else _ignore
        folder, source = options.save / _folder_name(options), str(options.config)
        training.train(content, folder, resume=options.resume, device=device, source=source, report=report)
        report(f"wrote {folder}")
    return 0


def _folder_name(options: argparse.Namespace) -> str:
    name = options.name or f"_{options.config.stem}"
    name = f"{name}_{options.tag}" if options.tag else name
    if Path(name).name != name:
        raise ValueError(f"the run's name {name!r} must be the name of one folder: give --name and --tag without '/'")
    return name


def _print_line(line: str) -> None:
    print(line, flush=True)


def _ignore(line: str) -> None:
    pass
