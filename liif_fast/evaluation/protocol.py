"""Scores of a model on a loader's items, as in the original's test.py and in its validation."""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from liif_fast.data import Item, explaining_killed_workers, naming
from liif_fast.evaluation.metrics import METRICS, check_metrics, parse_protocol
from liif_fast.models import default_data_norm
from liif_fast.utils.normalization import Norm, normalizations


def eval_psnr(
    loader: Any,
    model: nn.Module,
    data_norm: Norm | None = None,
    eval_type: str | None = None,
    eval_bsize: int | None = None,
    verbose: bool = False,
) -> float:
    """Mean PSNR in dB of a loader's items; arguments as for `eval_metrics_sum`. Source: original test.py, eval_psnr."""
    total, count = eval_psnr_sum(loader, model, data_norm, eval_type, eval_bsize, verbose)
    return total / count


def eval_psnr_sum(
    loader: Any,
    model: nn.Module,
    data_norm: Norm | None = None,
    eval_type: str | None = None,
    eval_bsize: int | None = None,
    verbose: bool = False,
) -> tuple[float, int]:
    """Sum of the items' PSNR in dB, and their number; several processes add their sums."""
    sums, count = eval_metrics_sum(loader, model, data_norm, eval_type, eval_bsize, verbose)
    return sums["psnr"], count


@explaining_killed_workers()
@torch.no_grad()
def eval_metrics_sum(
    loader: Any,
    model: nn.Module,
    data_norm: Norm | None = None,
    eval_type: str | None = None,
    eval_bsize: int | None = None,
    verbose: bool = False,
    metrics: Sequence[str] = ("psnr",),
) -> tuple[dict[str, float], int]:
    """Sums of the items' scores, and the number of items.

    loader: from liif_fast.data, of which epoch 0 is used, or any iterable of batches {'inp', 'coord', 'cell', 'gt'}.
    model: called as model(inp, coord, cell) on its own device, in eval mode; its mode is restored afterward.
    data_norm: {'inp': {'sub', 'div'}, 'gt': ...}; None uses the model's, or the paper's.
    eval_type: 'div2k-N' or 'benchmark-N' as for `metrics.psnr`, for items that are whole images; None compares the
        sampled pixels.
    eval_bsize: number of queries decoded at once (the model then needs gen_feat and query_rgb); None decodes all.
    verbose: show a progress bar with the current mean.

    Predictions are clamped to [0, 1] and not rounded. Data that have a `data_range` are not clamped; their RMSE has
    their unit, and their PSNR is over that range. Pixels and items without a value (NaN) do not count.
    Every item has its own score, so the mean does not depend on the batch size or on the number of processes. The
    original scores all pixels of a batch together, which is the same for batches of one image, as in all of its test
    files.
    Raises ValueError for an unknown protocol or metric, a loader without items or a bad data_norm.
    """
    data_range = getattr(loader, "data_range", None)
    span = 1.0 if data_range is None else data_range[1] - data_range[0]
    parse_protocol(eval_type)
    check_metrics(metrics)
    if eval_bsize is not None and eval_bsize < 1:
        raise ValueError(f"eval_bsize is {eval_bsize}; it must be at least 1, or None for all queries at once")
    device = next(model.parameters()).device
    inp_norm, gt_norm = normalizations(data_norm or getattr(model, "data_norm", None) or default_data_norm(), device)
    sums, count = dict.fromkeys(metrics, 0.0), 0
    names = loader.names() if hasattr(loader, "epoch") else (f"item {number}" for number in itertools.count())
    with _in_eval_mode(model), tqdm(_batches(loader), desc="val", leave=False, disable=not verbose) as bar:
        for batch in bar:
            batch = {key: value.to(device, non_blocking=True) for key, value in batch.items()}
            pred = _decode(model, inp_norm.normalize(batch["inp"]), batch["coord"], batch["cell"], eval_bsize)
            pred = gt_norm.restore(pred.float(), channel=-1)
            if data_range is None:
                pred.clamp_(0, 1)
            for samples, target, cell, name in zip(pred, batch["gt"], batch["cell"], names):
                with naming(name):
                    pair = [_picture(each, None if eval_type is None else cell) for each in (samples, target)]
                    scores = {metric: METRICS[metric](pair[0], pair[1], eval_type) for metric in metrics}
                if any(map(math.isnan, scores.values())) and samples.isfinite().all():
                    continue  # no pixel of the target has a value
                for metric, score in scores.items():
                    sums[metric] += score * (span if metric == "rmse" else 1)
                count += 1
            if count:
                means = ", ".join(f"{metric} {total / count:.4f}" for metric, total in sums.items())
                bar.set_postfix_str(means, refresh=False)
    if not count:
        raise ValueError("the loader has no items with values to evaluate")
    return sums, count


def _batches(loader: Any) -> Iterable[Item]:
    return loader.epoch(0) if hasattr(loader, "epoch") else loader


def _decode(model: Any, inp: Tensor, coord: Tensor, cell: Tensor, eval_bsize: int | None) -> Tensor:
    if eval_bsize is None:
        return model(inp, coord, cell)
    model.gen_feat(inp)
    chunks = zip(coord.split(eval_bsize, dim=1), cell.split(eval_bsize, dim=1), strict=True)
    return torch.cat([model.query_rgb(*chunk) for chunk in chunks], dim=1)


def _picture(samples: Tensor, cell: Tensor | None) -> Tensor:
    """Samples [Q, C] of a whole image, row by row, as [C, H, W] with the size 2 / cell; [C, Q, 1] without a cell."""
    if cell is None:
        return samples.t().unsqueeze(2)
    height, width = (round(2 / float(side)) for side in cell[0])
    if height * width != len(samples):
        raise ValueError(
            f"eval_type compares whole images, but an item has {len(samples)} of {height}x{width} pixels; leave "
            "sample_q out of the wrapper, or eval_type out of the configuration"
        )
    return samples.view(height, width, -1).permute(2, 0, 1)


@contextlib.contextmanager
def _in_eval_mode(model: nn.Module) -> Iterator[None]:
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)
