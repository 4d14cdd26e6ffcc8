"""A comparison's scores as tables, one row per method and one column per scale, as CSV and as Markdown."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean

from liif_fast.evaluation.comparison import BICUBIC, ScoreRecord
from liif_fast.utils import tables

Means = dict[str, dict[float, float]]
_DIGITS = {"psnr": 2, "ssim": 4}
_TITLES = {"psnr": "PSNR in dB", "ssim": "SSIM"}
_COMPARED = {
    "div2k": "RGB without a border of scale + 6 pixels",
    "benchmark": "luma without a border of scale pixels",
    "none": "RGB, all pixels",
}


def average(records: Sequence[ScoreRecord], metric: str = "psnr") -> Means:
    """{label of the method: {scale: mean over the images}}, in the order of the records.

    A method without scores for all images at a scale has no mean there, because means of other images do not compare.
    """
    images = {record.image for record in records}
    values: dict[str, dict[float, dict[str, float]]] = {}
    for record in records:
        values.setdefault(record.label, {}).setdefault(record.scale, {})[record.image] = getattr(record, metric)
    return {
        label: {scale: fmean(found.values()) for scale, found in scales.items() if set(found) == images}
        for label, scales in values.items()
    }


def markdown(
    records: Sequence[ScoreRecord], *, protocol: str, metrics: Sequence[str] = ("psnr",), trained_up_to: float = 4.0
) -> str:
    """The tables of a comparison, one per metric, with the best value of each column in bold.

    protocol: of the scores, for the caption; trained_up_to: the largest scale in training; larger scales get a star.
    """
    images = len({record.image for record in records})
    parts = []
    for metric in metrics:
        means = average(records, metric)
        scales = sorted({scale for found in means.values() for scale in found})
        beyond = [scale for scale in scales if scale > trained_up_to]
        note = f" Columns with * lie beyond the scales trained on (up to x{trained_up_to:g})." if beyond else ""
        columns = ["method", *(f"x{scale:g}{'*' if scale in beyond else ''}" for scale in scales)]
        cells = [_column(means, scale, _DIGITS[metric]) for scale in scales]
        table = tables.markdown(columns, zip(means, *cells, strict=True))
        parts.append(f"{_TITLES[metric]}, mean over {images} images ({_COMPARED[protocol]}).{note}\n\n{table}")
    if models := _models(records):
        files = ", ".join(f"{label} `{' '.join(found)}`" for label, found in models.items())
        parts.append(f"Models, as the first digits of their files' sha256: {files}.\n")
    return "\n".join(parts)


def _models(records: Sequence[ScoreRecord]) -> dict[str, list[str]]:
    """{label: the models' hashes}: several for a method with a model for each scale; bicubic has none."""
    found: dict[str, dict[str, None]] = {}
    for record in records:
        if record.model:
            found.setdefault(record.method, {})[record.model] = None
    return {method: list(models) for method, models in found.items()}


def _column(means: Means, scale: float, digits: int) -> list[str]:
    values = [found.get(scale) for found in means.values()]
    texts = ["-" if value is None else f"{value:.{digits}f}" for value in values]
    best = max((value for value in values if value is not None), default=math.inf)
    return [
        tables.bold(text) if len(texts) > 1 and value is not None and round(value - best, digits) == 0 else text
        for text, value in zip(texts, values, strict=True)
    ]


def write_means(records: Sequence[ScoreRecord], path: str | Path, metrics: Sequence[str] = ("psnr",)) -> None:
    """Save the tables as CSV with the columns metric, method, model (its hash) and one per scale."""
    scales = sorted({record.scale for record in records})
    models = {record.label: " ".join(_models(records).get(record.method, [])) for record in records}
    rows = [
        [metric, label, models[label], *(f"{found[scale]:.4f}" if scale in found else None for scale in scales)]
        for metric in metrics
        for label, found in average(records, metric).items()
    ]
    tables.write_csv(path, ["metric", "method", "model", *(f"x{scale:g}" for scale in scales)], rows)


def gains(means: Mapping[str, Mapping[float, float]]) -> Means:
    """The differences between the methods' means and those of bicubic; empty without bicubic."""
    base = {scale: value for scale, value in means.get(BICUBIC, {}).items() if math.isfinite(value)}
    if not base:
        return {}
    return {
        label: {scale: value - base[scale] for scale, value in found.items() if scale in base}
        for label, found in means.items()
        if label != BICUBIC
    }
