"""`python -m tests.images.large_job FOLDER SIDE SCALE SUFFIX`: upscale a TIFF of SIDE x SIDE pixels, print peak memory.

python -m tests.images.large_job /tmp 27272 1.1 .png
"""

import json
import resource
import sys
import time
from pathlib import Path

import numpy as np

from liif_fast.images import files
from liif_fast.images.jobs import upscale_file
from liif_fast.images.picture import Description
from liif_fast.models import LIIF


def main(folder, side, scale, suffix):
    """The picture is written band by band too, so that the peak is that of the whole process."""
    source, target = Path(folder, "in.tif"), Path(folder, f"out{suffix}")
    if not source.exists():
        columns = np.arange(side)[None, :, None] // np.array([97, 53, 31])
        with files.write_rows(source, files.Layout(side, side, 3, False, np.dtype(np.uint8)), Description()) as put:
            for top in range(0, side, 256):
                rows = np.arange(top, min(top + 256, side))[:, None, None]
                put((rows // 41 + columns).astype(np.uint8))
    spec = {"name": "edsr-baseline", "args": {"no_upsampling": True, "n_resblocks": 1, "n_feats": 4}}
    model = LIIF(spec, {"name": "mlp", "args": {"out_dim": 3, "hidden_list": [16]}})
    start = time.perf_counter()
    result = upscale_file(source, target, scale=scale, model=model, device="cpu", overwrite=True)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    seconds = round(time.perf_counter() - start)
    print(
        json.dumps({"size": result.output_size, "peak_bytes": peak, "seconds": seconds, "bytes": target.stat().st_size})
    )


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), float(sys.argv[3]), sys.argv[4])
