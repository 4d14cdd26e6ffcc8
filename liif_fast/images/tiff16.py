"""TIFF files through tifffile: those with 16-bit and float samples, which Pillow reads as 8 bits, and all we write."""

from __future__ import annotations

from typing import BinaryIO, NamedTuple

import numpy as np
import tifffile
from PIL import Image

_ASCII = 2  # TIFF's type number for text
_ICC_PROFILE, _ORIENTATION = 34675, 274


class Decoded(NamedTuple):
    """samples [H, W, channels], the last of them not premultiplied alpha if `has_alpha`; uint16 or any float."""

    samples: np.ndarray
    has_alpha: bool
    icc_profile: bytes | None
    orientation: int


def decode(page: tifffile.TiffPage) -> Decoded:
    """Read a page with grey or RGB samples of 16 bits or float.

    Raises: ValueError with the reason for other kinds of samples, and what tifffile raises for a broken page or a
        compression that asks for the imagecodecs package.
    """
    colours = {tifffile.PHOTOMETRIC.MINISBLACK: 1, tifffile.PHOTOMETRIC.MINISWHITE: 1, tifffile.PHOTOMETRIC.RGB: 3}
    dtype = np.dtype(page.dtype)
    wanted = colours.get(page.photometric)  # type: ignore[call-overload]
    if wanted is None or not (dtype.kind == "f" or (dtype == np.uint16 and page.bitspersample == 16)):
        colour_space = getattr(page.photometric, "name", page.photometric)
        raise ValueError(
            f"a TIFF of {page.bitspersample}-bit {dtype.name} {colour_space} samples, but only grey and RGB of 8 bits, "
            "16 bits or float can be read"
        )
    samples = page.asarray()
    samples = np.moveaxis(samples, page.axes.index("S"), -1) if "S" in page.axes else samples[..., None]
    if samples.ndim != 3 or samples.shape[2] < wanted:
        raise ValueError(f"a TIFF with pixels of the shape {page.shape}, which is not a picture")
    if page.photometric == tifffile.PHOTOMETRIC.MINISWHITE:
        samples = (65535 if dtype.kind == "u" else dtype.type(1)) - samples
    extra = page.extrasamples[0] if page.extrasamples else tifffile.EXTRASAMPLE.UNSPECIFIED
    has_alpha = extra != tifffile.EXTRASAMPLE.UNSPECIFIED
    samples = samples[..., : wanted + has_alpha]
    if extra == tifffile.EXTRASAMPLE.ASSOCALPHA:
        samples = _not_premultiplied(samples)
    tags = page.tags
    profile = tags[_ICC_PROFILE].value if _ICC_PROFILE in tags else None
    return Decoded(samples, has_alpha, profile, int(tags[_ORIENTATION].value) if _ORIENTATION in tags else 1)


def encode(
    file: BinaryIO,
    samples: np.ndarray,
    *,
    has_alpha: bool,
    icc_profile: bytes | None = None,
    exif: bytes | None = None,
) -> None:
    """Write samples [H, W, channels] of uint8, uint16 or float32, deflated; of the EXIF only the texts."""
    channels = samples.shape[2]
    tags = Image.Exif()
    tags.load(exif or b"")
    tifffile.imwrite(
        file,
        samples[..., 0] if channels == 1 else samples,
        bigtiff=samples.nbytes >= 2**32 - 2**25,  # classic TIFF addresses 4 GiB
        photometric="minisblack" if channels < 3 else "rgb",
        planarconfig=None if channels == 1 else "contig",
        extrasamples=["unassalpha"] if has_alpha else None,
        compression="zlib",
        predictor=samples.dtype.kind == "u",
        rowsperstrip=max(1, 2**18 // samples[0].nbytes),
        iccprofile=icc_profile,
        metadata=None,
        software=False,
        # Pillow shows texts as Latin-1, whatever their bytes mean.
        extratags=[(tag, _ASCII, 0, text.encode("latin-1"), True) for tag, text in tags.items() if type(text) is str],
    )


def _not_premultiplied(samples: np.ndarray) -> np.ndarray:
    largest = 65535.0 if samples.dtype.kind == "u" else 1.0
    alpha = samples[..., -1:].astype(np.float32)
    colour = np.clip(samples[..., :-1] * (largest / np.maximum(alpha, largest / 65535)), 0, largest)
    colour = np.rint(colour) if samples.dtype.kind == "u" else colour
    return np.concatenate([colour.astype(samples.dtype), samples[..., -1:]], -1)
