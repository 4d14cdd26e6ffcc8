"""`python -m liif_fast.cli.demo`: the shipped photo enlarged by the shipped model, beside Pillow's bicubic."""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw

from liif_fast.images import files as image
from liif_fast.images.upscaling import upscale
from liif_fast.models import checkpoints

PHOTO = Path(__file__).resolve().parents[1] / "assets" / "demo.png"
SCALES = (4, 2.7)
_LABEL_HEIGHT = 20
_MARGIN = 8


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the enlarged photos and the comparisons; print where they are and how long they took."""
    parser = argparse.ArgumentParser(prog="python -m liif_fast.cli.demo", description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("demo"), help="folder to write to (default: %(default)s)")
    parser.add_argument("--model", help="weights to use (default: those that come with the package)")
    options = parser.parse_args(arguments)
    options.output.mkdir(parents=True, exist_ok=True)
    photo = image.to_pil(image.read(PHOTO))
    model = checkpoints.load(options.model)
    print(f"{PHOTO.name}, {photo.height}x{photo.width} pixels:")
    for scale in SCALES:
        start = time.perf_counter()
        result = upscale(photo, scale=scale, model=model)
        seconds = time.perf_counter() - start
        enlarged = options.output / f"photo-x{scale}.png"
        image.write(image.from_pil(result), enlarged)
        beside = options.output / f"comparison-x{scale}.png"
        bicubic = photo.resize(result.size, Image.Resampling.BICUBIC)
        comparison = side_by_side([(f"bicubic x{scale}", bicubic), (f"LIIF x{scale}", result)])
        image.write(image.from_pil(comparison), beside)
        print(f"  x{scale}: {result.height}x{result.width} pixels in {seconds:.2f} s: {enlarged} and {beside}")
    return 0


def side_by_side(panels: Sequence[tuple[str, Image.Image]]) -> Image.Image:
    """Pictures of one height in a row, each under its label."""
    width = sum(panel.width for _, panel in panels) + _MARGIN * (len(panels) - 1)
    sheet = Image.new("RGB", (width, panels[0][1].height + _LABEL_HEIGHT), "white")
    draw = ImageDraw.Draw(sheet)
    left = 0
    for label, panel in panels:
        draw.text((left + 4, 4), label, fill="black")
        sheet.paste(panel, (left, _LABEL_HEIGHT))
        left += panel.width + _MARGIN
    return sheet


if __name__ == "__main__":
    raise SystemExit(main())
