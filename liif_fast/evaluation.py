"""PSNR as the paper measures it, and tables of it: a model beside Pillow's bicubic on a folder of photographs.

`python -m liif_fast.evaluation --images DIR --model FILE --scales 2 3 4 6` prints the table and saves it as CSV.
"""

from __future__ import annotations

import argparse
import csv
import io
import math
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from liif_fast.checkpoints import load
from liif_fast.data import list_images, read_rgb, resize_bicubic, shrink_whole, to_tensor
from liif_fast.files import write_atomically

LUMA_WEIGHTS = (65.738 / 256, 129.057 / 256, 25.064 / 256)
DIV2K_BORDER = 6  # pixels that div2k shaves beside the scale


class Score(NamedTuple):
    """PSNR of one image at one scale, in dB, of the model and of bicubic."""

    image: str
    scale: float
    model: float
    bicubic: float


def parse_protocol(protocol: str | None) -> tuple[str | None, int]:
    """'div2k-4' -> ('div2k', 4), 'benchmark-2' -> ('benchmark', 2), None -> (None, 0); otherwise ValueError."""
    if protocol is None:
        return None, 0
    kind, _, scale = protocol.partition("-")
    if kind not in ("div2k", "benchmark") or not scale.isdecimal() or int(scale) < 1:
        raise ValueError(f"protocol is {protocol!r}; give 'div2k-N' or 'benchmark-N' with a whole scale N, or None")
    return kind, int(scale)


def psnr(pred: Tensor, target: Tensor, protocol: str | None = None) -> float:
    """Peak signal-to-noise ratio in dB of one image or a batch taken as one.

    pred, target: [..., C, H, W] in [0, 1]; no rounding to 8 bits happens here. protocol: 'div2k-N' shaves N + 6 pixels
    a side, 'benchmark-N' shaves N and compares luma where there are three colours, None compares everything as it is.
    Identical images give infinity. Raises ValueError for different shapes or when shaving leaves nothing.
    Source: original utils.py, calc_psnr; paper, section 4.
    """
    if pred.shape != target.shape:
        raise ValueError(f"pred {tuple(pred.shape)} and target {tuple(target.shape)} must have the same shape")
    kind, scale = parse_protocol(protocol)
    difference = pred.double() - target.double()
    if kind == "benchmark" and difference.shape[-3] == len(LUMA_WEIGHTS):
        weights = difference.new_tensor(LUMA_WEIGHTS).view(-1, 1, 1)
        difference = (difference * weights).sum(dim=-3, keepdim=True)
    border = {"div2k": scale + DIV2K_BORDER, "benchmark": scale, None: 0}[kind]
    height, width = difference.shape[-2:]
    if min(height, width) <= 2 * border:
        raise ValueError(f"an image of {height}x{width} pixels is nothing once {protocol} has shaved {border} a side")
    difference = difference[..., border : height - border, border : width - border]
    error = float(difference.square().mean())
    return -10 * math.log10(error) if error > 0 else math.inf


@torch.no_grad()
def predict(model: Any, low: np.ndarray, size: tuple[int, int]) -> Tensor:
    """The model's enlargement of an 8-bit image: uint8 [h, w, 3] -> float32 [3, H, W] in [0, 1], size = (H, W)."""
    parameter = next(model.parameters())
    norm = {
        side: [torch.tensor(model.data_norm[side][key]).view(-1, 1, 1).to(parameter) for key in ("sub", "div")]
        for side in ("inp", "gt")
    }
    image = to_tensor(low).to(parameter)
    model.gen_feat(((image - norm["inp"][0]) / norm["inp"][1])[None])
    out = model.render(size)[0]
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


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m liif_fast.evaluation", description=__doc__.splitlines()[0])
    parser.add_argument("--images", required=True, help="folder of high-resolution images")
    parser.add_argument("--model", required=True, help="checkpoint, as liif_fast.load takes it")
    parser.add_argument("--scales", type=float, nargs="+", default=[2, 3, 4, 6])
    parser.add_argument("--backend", help="backend of the ops; the first that can run when left out")
    parser.add_argument("--threads", type=int, help="threads of PyTorch and of the ops")
    parser.add_argument("--csv", help="save every image's scores here")
    options = parser.parse_args(arguments)
    try:
        if options.threads:
            torch.set_num_threads(options.threads)
        model = load(options.model)
        model.backend = options.backend
        scores = evaluate(model, read_folder(options.images), options.scales, progress=sys.stderr.isatty())
        if options.csv:
            write_csv(scores, options.csv)
    except (OSError, RuntimeError, ValueError) as error:
        print(f"evaluation: {error}", file=sys.stderr)
        return 1
    print(markdown_table(mean_scores(scores)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
