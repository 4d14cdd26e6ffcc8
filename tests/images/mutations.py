"""`python -m tests.images.mutations SECONDS FOLDER`: changed bytes in valid files cost one sentence at most.

The file that is being read is FOLDER/now.*, so that it is still there after a crash.
"""

import io
import json
import random
import resource
import signal
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import pyvips
from PIL import Image

from liif_fast.images import files, upscaling
from liif_fast.images.jobs import upscale_file
from liif_fast.utils.memory import NotEnoughMemory
from tests.images.test_image import SRGB, exif_of, picture
from tests.images.test_jobs import described, nearest


def seeds(folder):
    """(suffix, bytes) of valid files: every format, with descriptions and without, in several layouts."""
    found = []
    for suffix in (".png", ".jpg", ".webp", ".tif"):
        described(folder / f"seed{suffix}")
        found.append((suffix, (folder / f"seed{suffix}").read_bytes()))
    for suffix, channels, dtype in ((".png", 4, np.uint16), (".tif", 4, np.float32), (".tif", 1, np.uint8)):
        files.write(picture(channels, dtype), folder / f"seed{suffix}")
        found.append((suffix, (folder / f"seed{suffix}").read_bytes()))
    rgb = Image.fromarray(picture(3, np.uint8).color)
    image = pyvips.Image.new_from_array(np.asarray(rgb))
    found.append((".png", image.pngsave_buffer(interlace=True)))
    for options in ({"tile": True, "pyramid": True, "bigtiff": True}, {"compression": "lzw"}, {"compression": "jpeg"}):
        found.append((".tif", image.tiffsave_buffer(**options)))
    found.append((".avif", image.heifsave_buffer(compression="av1")))
    for suffix, options in ((".jpg", {"progressive": True}), (".gif", {}), (".bmp", {}), (".ppm", {}), (".tga", {}),
                            (".jp2", {}), (".ico", {}), (".png", {"bits": 2})):  # fmt: skip
        data = io.BytesIO()
        mode = rgb.quantize(4) if "bits" in options else rgb
        mode.save(data, Image.registered_extensions()[suffix], **options)
        found.append((suffix, data.getvalue()))
    data = io.BytesIO()
    rgb.convert("CMYK").save(data, "JPEG", exif=exif_of({0x0112: 6}), icc_profile=SRGB)
    return [*found, (".jpg", data.getvalue())]


def mutated(data, rng):
    """A copy with a few changed, removed, repeated or moved bytes; most changes lie near the beginning."""
    data = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 4, 16))):
        place = rng.randrange(min(len(data), rng.choice((64, 512, len(data)))) or 1)
        size = rng.choice((1, 2, 4))
        kind = rng.randrange(8)
        if kind < 4:
            data[place : place + size] = rng.choice((rng.randbytes(size), b"\0" * size, b"\xff" * size, b"\x7f" * size))
        elif kind == 4:
            data[place : place + 1] = bytes([data[place] ^ 1 << rng.randrange(8)]) if data else b""
        elif kind == 5:
            del data[place : place + rng.choice((1, 4, 64))]
        elif kind == 6:
            data[place:place] = data[rng.randrange(len(data) or 1) :][: rng.choice((4, 64))]
        else:
            del data[rng.randrange(len(data) or 1) :]
    return bytes(data)


def main(seconds, folder):
    """Prints the numbers of files and of refusals."""
    folder = Path(folder)
    warnings.simplefilter("ignore")
    resource.setrlimit(resource.RLIMIT_AS, (16 << 30, 16 << 30))
    upscaling.upscale_rows = nearest
    rng, valid = random.Random(0), seeds(folder)
    counts = {"files": 0, "refused": 0, "slowest": 0.0}
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        suffix, data = rng.choice(valid)
        path = folder / f"now{suffix}"
        path.write_bytes(mutated(data, rng))
        start = time.monotonic()
        signal.alarm(60)  # a file that takes longer ends the process
        try:
            if rng.random() < 0.8:
                files.read(path)
            else:
                upscale_file(path, folder / "out.tif", size=(9, 9), overwrite=True)
        except (files.ImageError, NotEnoughMemory) as error:
            text = str(error)
            assert str(folder) in text and "\n" not in text and text.endswith("."), text
            counts["refused"] += 1
        signal.alarm(0)
        counts["files"] += 1
        counts["slowest"] = max(counts["slowest"], time.monotonic() - start)
    counts["peak_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps(counts))


if __name__ == "__main__":
    main(float(sys.argv[1]), sys.argv[2])
