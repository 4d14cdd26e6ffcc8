"""Scores of a model on a loader's items, as in the original's test.py and in its validation."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from liif_fast.data import Item
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

    Predictions are clamped to [0, 1] and not rounded. Every item has its own score, so the mean does not depend on the
    batch size or on the number of processes. The original scores all pixels of a batch together, which is the same for
    batches of one image, as in all of its test files.
    Raises ValueError for an unknown protocol or metric, a loader without items or a bad data_norm.
    """
    parse_protocol(eval_type)
    check_metrics(metrics)
    if eval_bsize is not None and eval_bsize < 1:
        raise ValueError(f"eval_bsize is {eval_bsize}; it must be at least 1, or None for all queries at once")
    device = next(model.parameters()).device
    inp_norm, gt_norm = normalizations(data_norm or getattr(model, "data_norm", None) or default_data_norm(), device)
    sums, count = dict.fromkeys(metrics, 0.0), 0
    with _in_eval_mode(model), tqdm(_batches(loader), desc="val", leave=False, disable=not verbose) as bar:
        for batch in bar:
            batch = {key: value.to(device, non_blocking=True) for key, value in batch.items()}
            pred = _decode(model, inp_norm.normalize(batch["inp"]), batch["coord"], batch["cell"], eval_bsize)
            pred = gt_norm.restore(pred.float(), channel=-1).clamp_(0, 1)
            for each in range(len(pred)):
                cell = None if eval_type is None else batch["cell"][each]
                pair = [_picture(samples[each], cell) for samples in (pred, batch["gt"])]
                for name in metrics:
                    sums[name] += METRICS[name](pair[0], pair[1], eval_type)
                count += 1
            bar.set_postfix_str(", ".join(f"{name} {total / count:.4f}" for name, total in sums.items()), refresh=False)
    if not count:
        raise ValueError("the loader has no items to evaluate")
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
