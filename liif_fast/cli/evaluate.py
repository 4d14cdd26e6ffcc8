"""`liif-fast evaluate`: the original's test files as they are, or the paper's tables from a folder of images."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from liif_fast.ops.backends import BACKENDS

_SCALES = (2.0, 3.0, 4.0, 6.0, 12.0, 18.0, 24.0, 30.0)


def add(commands: Any) -> None:
    """Add the subcommand to argparse's."""
    parser = commands.add_parser(
        "evaluate",
        help="score models: a test configuration, or tables from a folder of images",
        description="With --config: score a model as a YAML test configuration in the format of yinboc/liif says. With "
        "--images: shrink every image of a folder by every scale, enlarge it by every method, and write scores.csv, "
        "table.csv, table.md, psnr.png and a visual comparison; started again, it computes only what is new. Several "
        "processes: torchrun --nproc-per-node N -m liif_fast evaluate ...",
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--config", type=Path, metavar="FILE", help="YAML file with test_dataset")
    source.add_argument("--images", type=Path, metavar="DIR", help="folder of high-resolution images")
    parser.add_argument(
        "--model",
        action="append",
        default=[],
        metavar="[NAME[@SCALE]=]FILE",
        help="with --config: a checkpoint; with --images: one for a method, or for a method at one scale (repeatable)",
    )
    parser.add_argument("--metrics", nargs="+", default=["psnr"], help="psnr, ssim (default: psnr)")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, ... (default: a GPU if there is one)")
    parser.add_argument("--backend", choices=list(BACKENDS), help="of the ops (default: the fastest that can run)")
    parser.add_argument("--threads", type=int, help="processor threads (default: as many as cores)")
    images = parser.add_argument_group("with --images")
    images.add_argument("--scales", nargs="+", type=float, default=list(_SCALES), help="default: 2 3 4 6 12 18 24 30")
    images.add_argument(
        "--methods", nargs="+", help="bicubic, liif (the shipped model), or names given by --model (default: all)"
    )
    images.add_argument(
        "--cells", nargs="+", default=["1/s"], help="cells to decode with beside 1/s, such as 1/4 (default: 1/s)"
    )
    images.add_argument("--protocol", default="div2k", help="div2k, benchmark or none (default: %(default)s)")
    images.add_argument("--n-colors", type=int, default=3, help="1 (grey), 3 (RGB) or 4 (default: 3)")
    images.add_argument(
        "--trained-up-to", type=float, default=4.0, metavar="SCALE", help="scales above are marked (default: 4)"
    )
    images.add_argument("--compare", metavar="IMAGE", help="image of the visual comparison (default: the first)")
    images.add_argument(
        "--out",
        type=Path,
        default=Path("evaluation"),
        metavar="DIR",
        help="folder of the results (default: %(default)s)",
    )
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Evaluate; returns the exit code."""
    from liif_fast.utils import distributed  # the command line starts faster without torch.distributed

    if options.threads is not None:
        if options.threads < 1:
            raise ValueError(f"--threads is {options.threads}; it must be at least 1")
        torch.set_num_threads(options.threads)
    with distributed.setup(options.device) as device:
        if options.config is not None:
            _evaluate_config(options, device)
        else:
            _evaluate_images(options, device)
    return 0


def _evaluate_config(options: argparse.Namespace, device: torch.device) -> None:
    """Print the mean scores of a test configuration, the PSNR as the original does."""
    from liif_fast import data, evaluation
    from liif_fast.models import checkpoints
    from liif_fast.training import config
    from liif_fast.utils import distributed

    if len(options.model) != 1:
        raise ValueError(f"--config scores one model, not {len(options.model)}: give one --model FILE")
    content = config.load(options.config, "test")
    model: Any = checkpoints.load(options.model[0], device=device)
    model.backend = options.backend
    rank, world = distributed.rank(), distributed.world_size()
    section = {**content["test_dataset"], "loader": "workers"}
    loader = data.make_loader(section, split="items", rank=rank, world=world, device=device)
    _check_metrics(options.metrics)
    sums, count = dict.fromkeys(options.metrics, 0.0), 0
    if len(loader):  # there may be more processes than images
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
    """Write tables, plot and comparison; print the table."""
    from liif_fast.evaluation import figures, study, tables
    from liif_fast.utils import distributed
    from liif_fast.utils.files import write_atomically

    settings = study.Settings(
        methods=study.resolve_methods(options.methods, options.model),
        scales=list(dict.fromkeys(options.scales)),
        cells=list(dict.fromkeys(["1/s", *options.cells])),
        metrics=list(dict.fromkeys(["psnr", *options.metrics])),
        protocol=options.protocol,
        n_colors=options.n_colors,
        device=device,
        backend=options.backend,
    )
    image = figures.choose_image(options.images, options.compare)
    show = distributed.is_main() and sys.stderr.isatty()
    rows = study.run(options.images, settings, options.out, progress=show)
    if not distributed.is_main():
        return
    text = tables.markdown(
        rows, protocol=settings.protocol, metrics=settings.metrics, trained_up_to=options.trained_up_to
    )
    tables.write_means(rows, options.out / "table.csv", settings.metrics)
    write_atomically(options.out / "table.md", text.encode())
    written = ["scores.csv", "table.csv", "table.md"]
    picture = f"comparison-x{max(settings.scales):g}.png"
    figures.comparison(image, settings, rows, options.out / picture)
    written.append(picture)
    print(text, flush=True)
    try:
        figures.plot(rows, options.out / "psnr.png", trained_up_to=options.trained_up_to)
        written.append("psnr.png")
    finally:  # without matplotlib the rest is there all the same
        print(f"Written to {options.out}: {', '.join(written)}", flush=True)


def _check_metrics(names: Sequence[str]) -> None:
    from liif_fast.evaluation import METRICS

    if unknown := [name for name in names if name not in METRICS]:
        raise ValueError(f"no metric is named {unknown[0]!r}; choose of {', '.join(METRICS)}")
