"""A comparison's rows as tables: a row a method, a column a scale, as CSV and as Markdown."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean

from liif_fast.evaluation.study import BICUBIC, Row
from liif_fast.utils.files import write_atomically

Means = dict[str, dict[float, float]]
_DIGITS = {"psnr": 2, "ssim": 4}
_TITLES = {"psnr": "PSNR in dB", "ssim": "SSIM"}
_SHAVED = {
    "div2k": "RGB, scale + 6 pixels shaved a side",
    "benchmark": "luma, scale pixels shaved a side",
    "none": "RGB, all pixels",
}


def average(rows: Sequence[Row], metric: str = "psnr") -> Means:
    """{label of the method: {scale: mean over the images}}, in the order of the rows.

    A method that lacks some of the images at a scale has no mean there: it would compare different images.
    """
    images = {row.image for row in rows}
    values: dict[str, dict[float, dict[str, float]]] = {}
    for row in rows:
        values.setdefault(row.label, {}).setdefault(row.scale, {})[row.image] = getattr(row, metric)
    return {
        label: {scale: fmean(found.values()) for scale, found in scales.items() if set(found) == images}
        for label, scales in values.items()
    }


def markdown(
    rows: Sequence[Row], *, protocol: str, metrics: Sequence[str] = ("psnr",), trained_up_to: float = 4.0
) -> str:
    """The tables of a comparison, one a metric; the best of a column is bold, scales beyond the training's are marked.

    protocol: of the scores, for the line above; trained_up_to: the largest scale that the models were trained on.
    """
    images = len({row.image for row in rows})
    parts = []
    for metric in metrics:
        means = average(rows, metric)
        scales = sorted({scale for found in means.values() for scale in found})
        beyond = [scale for scale in scales if scale > trained_up_to]
        note = f" Columns with * lie beyond the scales trained on (up to x{trained_up_to:g})." if beyond else ""
        head = ["method", *(f"x{scale:g}{'*' if scale in beyond else ''}" for scale in scales)]
        lines = [head, ["---", *["---:"] * len(scales)]]
        best = {scale: max(found[scale] for found in means.values() if scale in found) for scale in scales}
        digits = _DIGITS[metric]
        for label, found in means.items():
            cells = []
            for scale in scales:
                text = f"{found[scale]:.{digits}f}" if scale in found else "-"
                is_best = scale in found and len(means) > 1 and round(found[scale] - best[scale], digits) == 0
                cells.append(f"**{text}**" if is_best else text)
            lines.append([label, *cells])
        table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
        parts.append(f"{_TITLES[metric]}, mean over {images} images ({_SHAVED[protocol]}).{note}\n\n{table}\n")
    return "\n".join(parts)


def write_means(rows: Sequence[Row], path: str | Path, metrics: Sequence[str] = ("psnr",)) -> None:
    """Save the tables as CSV with the columns metric, method and one a scale."""
    scales = sorted({row.scale for row in rows})
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["metric", "method", *(f"x{scale:g}" for scale in scales)])
    for metric in metrics:
        for label, found in average(rows, metric).items():
            writer.writerow([metric, label, *(f"{found[x]:.4f}" if x in found else "" for x in scales)])
    write_atomically(path, text.getvalue().encode())


def gains(means: Mapping[str, Mapping[float, float]]) -> Means:
    """The methods' means above bicubic's; empty without bicubic."""
    base = {scale: value for scale, value in means.get(BICUBIC, {}).items() if math.isfinite(value)}
    if not base:
        return {}
    return {
        label: {scale: value - base[scale] for scale, value in found.items() if scale in base}
        for label, found in means.items()
        if label != BICUBIC
    }
