"""`python -m liif_fast.cli.demo`: the photo in the package, enlarged by LIIF, next to Pillow's bicubic."""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from liif_fast.cli.messages import EXPECTED_ERRORS, escape_for_terminal, show_log
from liif_fast.images import files
from liif_fast.images.picture import from_pil, to_pil
from liif_fast.images.sheet import side_by_side
from liif_fast.images.upscaling import upscale
from liif_fast.models import catalog, checkpoints, fetch

PHOTO = Path(__file__).resolve().parents[1] / "assets" / "demo.png"
SCALES = (4, 2.7)


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the enlarged photos and the comparisons; print where they are and how long they took."""
    parser = argparse.ArgumentParser(prog="python -m liif_fast.cli.demo", description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("demo"), help="folder to write to (default: %(default)s)")
    parser.add_argument("--model", help="a file, or a name that `liif-fast models` lists (default: the best of these)")
    parser.add_argument("--fetch", action="store_true", help="fetch the published model first, if that is possible")
    options = parser.parse_args(arguments)
    escape_for_terminal()
    if options.fetch:
        _try_to_fetch()
    options.output.mkdir(parents=True, exist_ok=True)
    photo = to_pil(files.read(PHOTO))
    with show_log():
        model = checkpoints.load(options.model)
    print(f"{PHOTO.name}, {photo.width}x{photo.height} pixels:")
    for scale in SCALES:
        start = time.perf_counter()
        result = upscale(photo, scale=scale, model=model)
        seconds = time.perf_counter() - start
        enlarged = options.output / f"photo-x{scale}.png"
        files.write(from_pil(result), enlarged)
        comparison_file = options.output / f"comparison-x{scale}.png"
        bicubic = photo.resize(result.size, Image.Resampling.BICUBIC)
        comparison = side_by_side([(f"bicubic x{scale}", bicubic), (f"LIIF x{scale}", result)])
        files.write(from_pil(comparison), comparison_file)
        print(f"  x{scale}: {result.width}x{result.height} pixels in {seconds:.2f} s: {enlarged} and {comparison_file}")
    return 0


def _try_to_fetch() -> None:
    """Fetch the published model; if that fails, say so in one sentence."""
    try:
        fetch.get(catalog.CATALOG[0].name, report=print)
    except EXPECTED_ERRORS as error:
        print(f"{error}; the demo goes on with {catalog.default().name}.")


if __name__ == "__main__":
    raise SystemExit(main())
