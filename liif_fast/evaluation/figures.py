"""Pictures of a comparison: plots of PSNR over the scale, and the methods side by side at the largest scale."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from liif_fast.data import ENERGY_BLOCK, gradient_energy, list_images, read_pixels, shrink_whole
from liif_fast.evaluation import comparison, tables
from liif_fast.evaluation.comparison import ComparisonConfig, ScoreRecord
from liif_fast.images.sheet import side_by_side
from liif_fast.models import checkpoints
from liif_fast.utils.files import write_atomically

_PANEL = 240  # the largest side of a panel, in pixels
_PANELS_PER_ROW = 5
_GAP = 8


def write_plot(records: Sequence[ScoreRecord], path: str | Path, *, trained_up_to: float = 4.0) -> None:
    """Plot the mean PSNR of every method over the scale, and its difference to bicubic, as PNG.

    Raises RuntimeError without matplotlib.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise RuntimeError(f"plots need matplotlib ({error}): pip install matplotlib") from error
    means = tables.average(records)
    gained = tables.gains(means)
    figure = Figure(figsize=(11, 4) if gained else (6, 4))
    axes: Any = figure.subplots(1, 2 if gained else 1, squeeze=False)[0]
    colors = {label: f"C{index % 10}" for index, label in enumerate(means)}
    for axis, values, title in zip(axes, (means, gained), ("PSNR in dB", "dB above bicubic"), strict=False):
        scales = sorted({scale for found in values.values() for scale in found})
        for label, found in values.items():
            known = sorted(found)
            axis.plot(known, [found[scale] for scale in known], marker="o", label=label, color=colors[label])
        axis.set_xscale("log", base=2)
        axis.set_xticks(scales, [f"x{scale:g}" for scale in scales])
        axis.minorticks_off()
        if scales and scales[0] <= trained_up_to < scales[-1]:
            axis.axvline(trained_up_to, color="#888888", linestyle=":", linewidth=1)
        axis.set_ylabel(title)
        axis.set_xlabel(f"scale (dotted: the largest trained on, x{trained_up_to:g})")
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(fontsize=8)
    figure.suptitle(f"Mean over {len({record.image for record in records})} images", fontsize=10)
    data = io.BytesIO()
    figure.savefig(data, format="png", dpi=150, bbox_inches="tight", metadata={"Software": None})
    write_atomically(path, data.getvalue())


def choose_image(folder: str | Path, name: str | None = None) -> Path:
    """The image of a folder with a name (or stem), or the first image; raises ValueError if there is none."""
    paths = list_images(folder)
    found = [path for path in paths if name in (None, path.name, path.stem)]
    if not found:
        raise ValueError(f"{str(folder)!r} holds no image {name!r}; it holds {', '.join(path.name for path in paths)}")
    return found[0]


def write_comparison(image: Path, config: ComparisonConfig, records: Sequence[ScoreRecord], path: str | Path) -> None:
    """Show the most detailed part of an image, enlarged by every method at the largest scale, as PNG.

    Panels: the small image with its pixels as squares, every method and cell (with the PSNR of the whole image, if
    `records` has it), the original.
    """
    scale = max(config.scales)
    low, high = shrink_whole(read_pixels(image, config.n_colors), scale)
    size = (high.shape[0], high.shape[1])
    top, left, height, width = busiest_window(high, min(size[0], _PANEL), min(size[1], _PANEL))
    scores = {each.label: each.psnr for each in records if each.image == image.name and each.scale == scale}

    def panel(label: str, pixels: np.ndarray) -> tuple[str, Image.Image]:
        score = scores.get(label)
        text = label if score is None or not math.isfinite(score) else f"{label}: {score:.2f} dB"
        part = pixels[top : top + height, left : left + width, :3]
        return text, Image.fromarray(np.ascontiguousarray(np.broadcast_to(part, (height, width, 3))))

    rows_of_low, cols_of_low = (np.arange(length) * part // length for length, part in zip(size, low.shape))
    squares = low[rows_of_low][:, cols_of_low]
    panels = [panel(f"input, {low.shape[0]}x{low.shape[1]} pixels", squares)]
    for method in config.methods:
        file = method.file(scale)
        if method.files and file is None:
            continue
        model: Any = None if file is None else checkpoints.load(file, device=config.device, settings=config.settings)
        if model is not None:
            model.backend = config.backend
        for cell in config.cells if model is not None else (comparison.OWN_CELL,):
            if model is None or comparison.applies(model, scale, cell):
                label = ScoreRecord(method.name, cell, scale, "", math.nan, math.nan, "").label
                panels.append(panel(label, _pixels(comparison.enlarge(model, low, size, cell))))
    panels.append(panel(f"original, part of {size[0]}x{size[1]}", high))
    data = io.BytesIO()
    columns = math.ceil(len(panels) / math.ceil(len(panels) / _PANELS_PER_ROW))  # rows of nearly equal length
    sheet([panels[at : at + columns] for at in range(0, len(panels), columns)]).save(data, "PNG")
    write_atomically(path, data.getvalue())


def busiest_window(image: np.ndarray, height: int, width: int) -> tuple[int, int, int, int]:
    """(top, left, height, width) of the window with the most gradient energy, on a grid of ENERGY_BLOCK pixels.

    image: uint8 [H, W, C], at least as large as the window.
    """
    energy = gradient_energy(image)
    sums = np.pad(energy, ((1, 0), (1, 0))).cumsum(0).cumsum(1)
    best, corner = -1.0, (0, 0)
    for row in range((image.shape[0] - height) // ENERGY_BLOCK + 1):
        for col in range((image.shape[1] - width) // ENERGY_BLOCK + 1):
            bottom = min(row + max(1, height // ENERGY_BLOCK), energy.shape[0])
            right = min(col + max(1, width // ENERGY_BLOCK), energy.shape[1])
            found = sums[bottom, right] - sums[row, right] - sums[bottom, col] + sums[row, col]
            if found > best:
                best, corner = found, (row * ENERGY_BLOCK, col * ENERGY_BLOCK)
    return (*corner, height, width)


def sheet(rows: Sequence[Sequence[tuple[str, Image.Image]]]) -> Image.Image:
    """Rows of labeled panels in one picture."""
    strips = [side_by_side(row) for row in rows]
    height = sum(strip.height for strip in strips) + _GAP * (len(strips) - 1)
    whole = Image.new("RGB", (max(strip.width for strip in strips), height), "white")
    top = 0
    for strip in strips:
        whole.paste(strip, (0, top))
        top += strip.height + _GAP
    return whole


def _pixels(pred: torch.Tensor) -> np.ndarray:
    return pred.mul(255).round_().byte().permute(1, 2, 0).numpy()
