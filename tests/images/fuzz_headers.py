"""`python tests/images/fuzz_headers.py -max_total_time=600`: the code that reads headers, under atheris.

atheris is not a dependency: `pip install atheris`. Only the three exceptions below may leave the code.
"""

import io
import struct
import sys
from pathlib import Path

import atheris

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
with atheris.instrument_imports(include=["liif_fast.images.headers", "liif_fast.images.tags"]):
    from liif_fast.images import headers, tags

PATH = Path("a.png")
PARTS = (headers._png_chunks, headers._tiff, lambda _, file: list(headers._jpeg_segments(file)))


def one_input(data):
    """The first bytes as a file of each kind, as an EXIF block, and as the tags of a file that is written."""
    for part in (lambda path, file: headers._kind(path, file.read(4096)), *PARTS):
        try:
            part(PATH, io.BytesIO(data))
        except (headers.ImageError, ValueError, struct.error):
            continue
    if exif := tags.cleaned_exif(data, (70000, 3)):
        assert tags.cleaned_exif(exif, (70000, 3)) == exif
    file = io.BytesIO(b"II*\0\x08\0\0\0\0\0\0\0\0\0")
    tags.add_to_tiff(file, exif, {}, True)
    assert list(tags.Tags(file).chain())


if __name__ == "__main__":
    atheris.Setup(sys.argv, one_input)
    atheris.Fuzz()
