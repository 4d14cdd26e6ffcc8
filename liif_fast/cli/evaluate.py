"""`liif-fast evaluate`: scores from the original's test files, or the paper's tables from a folder of images."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch

from liif_fast import data, evaluation
from liif_fast.cli.arguments import add_imports, add_settings, path, threads
from liif_fast.evaluation import comparison, figures, tables
from liif_fast.models import checkpoints
from liif_fast.ops.backends import BACKENDS
from liif_fast.training import config
from liif_fast.utils import distributed
from liif_fast.utils.files import write_atomically

_SCALES = (2.0, 3.0, 4.0, 6.0, 12.0, 18.0, 24.0, 30.0)


def add(commands: Any) -> None:
    """Add the subcommand to argparse's."""
    parser = commands.add_parser(
        "evaluate",
        help="score models: a test configuration, or tables from a folder of images",
        description="With --config: score a model with a YAML test configuration in the format of yinboc/liif. With "
        "--images: shrink every image of a folder by every scale, enlarge it by every method, and write scores.csv, "
        "table.csv, table.md, psnr.png and a visual comparison; a repeated run computes only new scores. In several "
        "processes: torchrun --nproc-per-node N -m liif_fast evaluate ...",
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--config", type=path, metavar="FILE", help="YAML file with test_dataset")
    source.add_argument("--images", type=path, metavar="DIR", help="folder of high-resolution images")
    parser.add_argument(
        "--model",
        action="append",
        default=[],
        metavar="[NAME[@SCALE]=]FILE",
        help="with --config: a checkpoint; with --images: the checkpoint of a method, or of a method at one scale "
        "(repeatable); a file or a name that `liif-fast models` lists",
    )
    add_imports(parser)
    add_settings(parser)
    parser.add_argument("--metrics", nargs="+", default=["psnr"], help="psnr, ssim (default: psnr)")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, ... (default: a GPU if there is one)")
    parser.add_argument("--backend", choices=list(BACKENDS), help="backend of the ops (default: first that can run)")
    parser.add_argument("--threads", type=threads, help="processor threads (default: as many as cores)")
    images = parser.add_argument_group("with --images")
    images.add_argument("--scales", nargs="+", type=float, default=list(_SCALES), help="default: 2 3 4 6 12 18 24 30")
    images.add_argument(
        "--methods",
        nargs="+",
        help="bicubic, liif (the default model), names that `liif-fast models` lists or from --model (default: all of "
        "--model, or bicubic and liif)",
    )
    cells = "cells to decode with in addition to 1/s, such as 1/4 (default: 1/s)"
    images.add_argument("--cells", nargs="+", default=["1/s"], help=cells)
    images.add_argument("--protocol", default="div2k", help="div2k, benchmark or none (default: %(default)s)")
    images.add_argument("--n-colors", type=int, default=3, help="1 (gray), 3 (RGB) or 4 (default: 3)")
    images.add_argument(
        "--trained-up-to", type=float, default=4.0, metavar="SCALE", help="mark scales above this (default: 4)"
    )
    images.add_argument("--compare", metavar="IMAGE", help="image of the visual comparison (default: the first)")
    out = "folder of the results (default: %(default)s)"
    images.add_argument("--out", type=path, default=Path("evaluation"), metavar="DIR", help=out)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Evaluate; returns the exit code."""
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    for name in options.imports:
        config.import_code(name)
    with distributed.setup(options.device) as device:
        if options.config is not None:
            _evaluate_config(options, device)
        else:
            _evaluate_images(options, device)
    return 0


def _evaluate_config(options: argparse.Namespace, device: torch.device) -> None:
    """Print the mean scores of a test configuration, and PSNR in the original's format."""
    if len(options.model) != 1:
        raise ValueError(f"--config scores one model, not {len(options.model)}: give one --model FILE")
    content = config.load(options.config, "test")
    model: Any = checkpoints.load(options.model[0], device=device, settings=dict(options.settings))
    model.backend = options.backend
    rank, world = distributed.rank(), distributed.world_size()
    loader = data.make_loader(content["test_dataset"], split="items", rank=rank, world=world, device=device)
    evaluation.check_metrics(options.metrics)
    sums, count = dict.fromkeys(options.metrics, 0.0), 0
    if len(loader):  # a process has no images if there are more processes than images
        sums, count = evaluation.eval_metrics_sum(
            loader,
            model,
            content.get("data_norm"),
            content.get("eval_type"),
            content.get("eval_bsize"),
            verbose=distributed.is_main() and sys.stderr.isatty(),
            metrics=options.metrics,
        )
    *totals, number = distributed.sum_over_ranks([*sums.values(), count])
    if distributed.is_main():
        for name, total in zip(sums, totals, strict=True):
            print(f"{'result' if name == 'psnr' else name}: {total / number:.4f}", flush=True)


def _evaluate_images(options: argparse.Namespace, device: torch.device) -> None:
    """Write tables, plot and visual comparison; print the tables."""
    setup = comparison.ComparisonConfig(
        methods=comparison.resolve_methods(options.methods, options.model),
        scales=list(dict.fromkeys(options.scales)),
        cells=list(dict.fromkeys(["1/s", *options.cells])),
        metrics=list(dict.fromkeys(["psnr", *options.metrics])),
        protocol=options.protocol,
        n_colors=options.n_colors,
        device=device,
        backend=options.backend,
        settings=dict(options.settings),
    )
    image = figures.choose_image(options.images, options.compare)
    show = distributed.is_main() and sys.stderr.isatty()
    records = comparison.run(options.images, setup, options.out, progress=show)
    if not distributed.is_main():
        return
    text = tables.markdown(records, protocol=setup.protocol, metrics=setup.metrics, trained_up_to=options.trained_up_to)
    tables.write_means(records, options.out / "table.csv", setup.metrics)
    write_atomically(options.out / "table.md", text.encode())
    written = ["scores.csv", "table.csv", "table.md"]
    picture = f"comparison-x{max(setup.scales):g}.png"
    figures.write_comparison(image, setup, records, options.out / picture)
    written.append(picture)
    print(text, flush=True)
    try:
        figures.write_plot(records, options.out / "psnr.png", trained_up_to=options.trained_up_to)
        written.append("psnr.png")
    finally:  # without matplotlib all other files exist
        print(f"Written to {options.out}: {', '.join(written)}", flush=True)
