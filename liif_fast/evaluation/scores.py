"""One model beside Pillow's bicubic on a folder of photographs: scores, their means, tables and files of them."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from liif_fast.data import list_images, read_rgb, resize_bicubic, shrink_whole, to_tensor
from liif_fast.evaluation.metrics import psnr
from liif_fast.utils.files import write_atomically


class Score(NamedTuple):
    """PSNR of one image at one scale, in dB, of the model and of bicubic."""

    image: str
    scale: float
    model: float
    bicubic: float


@torch.no_grad()
def predict(model: Any, low: np.ndarray, size: tuple[int, int], cell: tuple[float, float] | None = None) -> Tensor:
    """The model's enlargement of an 8-bit image: uint8 [h, w, C] -> float32 [C, H, W] in [0, 1], size = (H, W).

    cell: (rows, cols) size of a query's pixel in coordinates, for models that decode with cells; None = (2/H, 2/W).
    """
    parameter = next(model.parameters())
    norm = {
        side: [torch.tensor(model.data_norm[side][key]).view(-1, 1, 1).to(parameter) for key in ("sub", "div")]
        for side in ("inp", "gt")
    }
    image = to_tensor(low).to(parameter)
    model.gen_feat(((image - norm["inp"][0]) / norm["inp"][1])[None])
    out = model.render(size, cell=cell)[0]
    model.feat = None  # a large map, and the next image has another
    return (out * norm["gt"][1] + norm["gt"][0]).clamp(0, 1).float().cpu()


def evaluate(
    model: Any, images: Iterable[tuple[str, np.ndarray]], scales: Sequence[float], *, progress: bool = False
) -> list[Score]:
    """Score a model and Pillow's bicubic on images shrunk by Pillow's bicubic, at every scale.

    images: (name, uint8 [H, W, 3]). Low resolution is the image cropped to a multiple of the scale and shrunk to 8
    bits; RGB PSNR with scale + 6 pixels shaved (div2k). The model's output is clamped, not rounded; bicubic's is 8-bit.
    The mode of the model (training or evaluation) is kept.
    """
    images = list(images)
    training = model.training
    model.eval()
    scores = []
    jobs = [(scale, name, image) for scale in scales for name, image in images]
    for scale, name, image in tqdm(jobs, desc="evaluate", unit="image", disable=not progress, leave=False):
        low, high = shrink_whole(image, scale)
        size = (high.shape[0], high.shape[1])
        target = to_tensor(high)
        protocol = f"div2k-{math.ceil(scale)}"
        ours = psnr(predict(model, low, size), target, protocol)
        scores.append(Score(name, scale, ours, psnr(to_tensor(resize_bicubic(low, size)), target, protocol)))
    model.train(training)
    return scores


def mean_scores(scores: Sequence[Score]) -> list[Score]:
    """Mean PSNR over the images, one row a scale, in the scales' first order; the image is called 'mean'."""
    by_scale: dict[float, list[Score]] = {}
    for score in scores:
        by_scale.setdefault(score.scale, []).append(score)
    return [
        Score("mean", scale, fmean(row.model for row in rows), fmean(row.bicubic for row in rows))
        for scale, rows in by_scale.items()
    ]


def markdown_table(scores: Sequence[Score]) -> str:
    """A Markdown table of scores: image, scale, bicubic, model, gain."""
    lines = ["| image | scale | bicubic | model | gain |", "|---|---|---|---|---|"]
    lines += [
        f"| {row.image} | x{row.scale:g} | {row.bicubic:.2f} | {row.model:.2f} | {row.model - row.bicubic:+.2f} |"
        for row in scores
    ]
    return "\n".join(lines)


def write_csv(scores: Sequence[Score], path: str | Path) -> None:
    """Save scores, every image and the means, with the columns image, scale, model, bicubic."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(Score._fields)
    for row in [*scores, *mean_scores(scores)]:
        writer.writerow([row.image, f"{row.scale:g}", f"{row.model:.4f}", f"{row.bicubic:.4f}"])
    write_atomically(path, text.getvalue().encode())


def read_csv(path: str | Path) -> list[Score]:
    """Read what `write_csv` saved, without the rows of means."""
    with open(path, newline="", encoding="utf-8") as file:
        return [
            Score(row["image"], float(row["scale"]), float(row["model"]), float(row["bicubic"]))
            for row in csv.DictReader(file)
            if row["image"] != "mean"
        ]


def read_folder(folder: str | Path) -> list[tuple[str, np.ndarray]]:
    """(file name, uint8 RGB [H, W, 3]) of every image of a folder."""
    return [(path.name, read_rgb(path)) for path in list_images(folder)]
