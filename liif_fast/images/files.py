"""Reading and writing picture files, with Pillow, with tifffile, and with a PNG codec for 16 bits.

Every picture is read as gray or RGB samples of 8, 16 or 32 (float) bits, with an alpha channel if the file has one, the
ICC profile and the descriptive EXIF tags. Palettes, CMYK, YCbCr, Lab and 1-bit pictures are converted.
"""

from __future__ import annotations

import os
import struct
import warnings
from pathlib import Path
from typing import Any, cast

import numpy as np
import tifffile
from PIL import ExifTags, Image

from liif_fast.images import png16, tiff16
from liif_fast.images.picture import ImageError, Picture, from_pil, to_depth, to_pil, unit_range
from liif_fast.utils import memory
from liif_fast.utils.files import replacing

# The suffixes of files that can be written, and the largest side in each format.
FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WebP", ".tif": "TIFF", ".tiff": "TIFF"}
_LARGEST_SIDE = {"JPEG": 65500, "WebP": 16383, "PNG": 2**31 - 1, "TIFF": 2**31 - 1}
_DEFAULT_QUALITY = 95

# Tags that are still true after the picture was enlarged, unlike structure, thumbnails, maker notes and sizes.
_KEPT_EXIF = (0x010E, 0x010F, 0x0110, 0x0131, 0x0132, 0x013B, 0x8298)
_KEPT_EXIF_IFDS = (ExifTags.IFD.Exif, ExifTags.IFD.GPSInfo)
_DROPPED_EXIF = (0x927C, 0xA002, 0xA003, 0xA005)
_ORIENTATION = 0x0112
_LARGEST_EXIF = 65533  # the capacity of a JPEG marker


def read(path: str | os.PathLike[str]) -> Picture:
    """Read a picture file as a viewer shows it, with its EXIF orientation applied.

    Only the first frame of an animation or page of a file is read, with a warning.

    Raises: ImageError for a file that is missing, broken, no image, or of an unsupported kind; NotEnoughMemory.
    """
    path = Path(path)
    if not path.exists():
        raise ImageError(f"{path} does not exist.")
    if path.is_dir():
        raise ImageError(f"{path} is a folder, not an image file.")
    try:
        with open(path, "rb") as file:
            head = file.read(33)
            if head[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"):
                return _read_tiff(path)
            if png16.is_png16(head):
                return _read_png16(path)
        with Image.open(path) as image:
            _warn_about_frames(path, getattr(image, "n_frames", 1))
            _require_memory(path, image.height, image.width, 1)
            return _oriented(_from_file(image), image)
    except (ImageError, memory.NotEnoughMemory):
        raise
    except PermissionError as error:
        raise ImageError(f"{path} cannot be opened: permission denied.") from error
    except Image.UnidentifiedImageError as error:
        raise ImageError(f"{path} is not an image in a format that Pillow or tifffile can read.") from error
    except Image.DecompressionBombError as error:
        raise ImageError(f"{path} is larger than Pillow allows ({error}); raise PIL.Image.MAX_IMAGE_PIXELS.") from error
    except Exception as error:  # a broken file can make a decoder raise anything
        raise ImageError(f"{path} is broken or of a kind that is not supported ({_first_line(error)}).") from error


def write(picture: Picture, path: str | os.PathLike[str], *, quality: int | None = None) -> None:
    """Write a picture under a temporary name in the folder of `path`, then rename it, so that no file is incomplete.

    PNG keeps 16 bits (float samples become 16 bits), TIFF keeps 16 bits and float, JPEG and WebP have 8. All formats
    keep the ICC profile. TIFF keeps only the texts of EXIF (camera, artist, date, ...), the others keep all of it.
    WebP has no gray, so it stores gray as equal RGB.

    Args:
        picture: the picture.
        path: its suffix selects the format (`FORMATS`).
        quality: 1..100 for JPEG and WebP, 95 by default; 100 makes WebP lossless. Ignored by PNG and TIFF.

    Raises: ImageError like `check_target`, or if the file system reports an error.
    """
    path = Path(path)
    check_target(path, picture, quality=quality)
    kind = FORMATS[path.suffix.lower()]
    try:
        with replacing(path) as file:
            _WRITERS[kind](picture, file, quality or _DEFAULT_QUALITY)
    except OSError as error:
        raise ImageError(f"{path} cannot be written: {error.strerror or _first_line(error)}.") from error


def check_target(
    path: str | os.PathLike[str], picture: Picture, size: tuple[int, int] | None = None, *, quality: int | None = None
) -> None:
    """Raise the errors of `write` before a long computation instead of after it.

    Args:
        path: the file to be written.
        picture: the picture to be written, or the one from which it will be computed.
        size: rows and columns of the picture to be written; None = those of `picture`.
        quality: as for `write`.

    Raises: ImageError for an unknown suffix, a missing or unwritable folder, a size too large for the format, an alpha
        channel in a JPEG that is not opaque, a quality outside 1..100.
    """
    path = Path(path)
    height, width = size or (picture.height, picture.width)
    kind = FORMATS.get(path.suffix.lower())
    if kind is None:
        known = ", ".join(sorted(FORMATS))
        raise ImageError(f"{path} has the unknown extension '{path.suffix}': name the output with one of {known}.")
    if quality is not None and not 1 <= quality <= 100:
        raise ImageError(f"The quality is {quality}, but must be between 1 and 100.")
    if not path.parent.is_dir():
        raise ImageError(f"{path} cannot be written: the folder {path.parent} does not exist.")
    if path.is_dir():
        raise ImageError(f"{path} cannot be written: it is a folder.")
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise ImageError(f"{path} cannot be written: no permission to write in the folder {path.parent}.")
    limit = _LARGEST_SIDE[kind]
    if max(height, width) > limit:
        raise ImageError(f"{path} cannot be written: {kind} holds at most {limit} pixels a side, not {height}x{width}.")
    if kind == "JPEG" and not picture.is_opaque:
        raise ImageError(f"{path} cannot be written: JPEG has no alpha channel; use PNG, WebP or TIFF.")


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return (lines[0].rstrip(".") if lines else "") or type(error).__name__


def _warn_about_frames(path: Path, frames: int) -> None:
    if frames > 1:
        warnings.warn(f"{path} has {frames} frames or pages; only the first is used.", stacklevel=3)


def _require_memory(path: Path, height: int, width: int, sample_bytes: int) -> None:
    """Check the size in a file's header. Decoding needs about three copies of up to four samples per pixel."""
    memory.require(3 * 4 * height * width * sample_bytes, f"{path} ({height}x{width} pixels)", "use a smaller image")


def _from_file(image: Image.Image) -> Picture:
    exif = _descriptive_exif(image.getexif())  # before the pixels, because Pillow closes a TIFF after loading it
    picture = from_pil(image)
    picture.exif = exif
    return picture


def _descriptive_exif(exif: Image.Exif) -> bytes | None:
    kept = Image.Exif()
    for tag in _KEPT_EXIF:
        if tag in exif:
            kept[tag] = _raw_text(exif[tag])
    for ifd in _KEPT_EXIF_IFDS:
        entries = {tag: _raw_text(value) for tag, value in exif.get_ifd(ifd).items() if tag not in _DROPPED_EXIF}
        if entries:
            kept[ifd] = entries
    if not len(kept):
        return None
    try:
        data = kept.tobytes()
    except (ValueError, TypeError, OverflowError, struct.error):
        return None  # tags with values of wrong types must not prevent reading the picture
    return data if len(data) <= _LARGEST_EXIF else None


def _raw_text(value: Any) -> Any:
    """EXIF texts have no encoding: Pillow reads bytes as Latin-1, but writes characters outside of ASCII as '?'."""
    return value.encode("latin-1", "replace") if isinstance(value, str) and not value.isascii() else value


def _oriented(picture: Picture, image: Image.Image) -> Picture:
    return _turn(picture, image.getexif().get(_ORIENTATION, 1))


def _turn(picture: Picture, orientation: int) -> Picture:
    """Apply an EXIF orientation 1..8 (EXIF 2.32, section 4.6.4.A); other values change nothing."""

    def turned(samples: np.ndarray) -> np.ndarray:
        if orientation in (5, 6, 7, 8):
            samples = samples.swapaxes(0, 1)
        if orientation in (3, 4, 7, 8):
            samples = samples[::-1]
        if orientation in (2, 3, 6, 7):
            samples = samples[:, ::-1]
        return np.ascontiguousarray(samples)

    picture.color = turned(picture.color)
    if picture.alpha is not None:
        picture.alpha = turned(picture.alpha)
    return picture


def _read_png16(path: Path) -> Picture:
    with Image.open(path) as image, open(path, "rb") as file:
        _require_memory(path, image.height, image.width, 2)
        samples = png16.decode(file)
        picture = Picture.from_samples(samples, samples.shape[2] in (2, 4), image.info.get("icc_profile"))
        picture.exif = _descriptive_exif(image.getexif())
        return _oriented(picture, image)


def _read_tiff(path: Path) -> Picture:
    """Pillow reads 8-bit TIFF, because it knows many color spaces; tifffile reads samples with more bits."""
    with tifffile.TiffFile(path) as tiff:
        page = cast(tifffile.TiffPage, tiff.pages.first)
        _require_memory(path, page.imagelength, page.imagewidth, max(1, page.bitspersample // 8))
        _warn_about_frames(path, len(tiff.pages))
        if page.bitspersample > 8:
            deep = tiff16.decode(page)
            samples = unit_range(deep.samples) if deep.samples.dtype.kind == "f" else deep.samples
            return _turn(Picture.from_samples(samples, deep.has_alpha, deep.icc_profile), deep.orientation)
    with Image.open(path) as image:
        orientation = image.getexif().get(_ORIENTATION, 1)
        picture = _from_file(image)
        # Some versions of Pillow turn a TIFF while loading it and remove the tag; the others do neither.
        return _turn(picture, orientation) if _ORIENTATION in image.getexif() else picture


def _metadata(picture: Picture) -> dict[str, Any]:
    named = {"icc_profile": picture.icc_profile, "exif": picture.exif}
    return {name: value for name, value in named.items() if value}


def _write_png(picture: Picture, file: Any, quality: int) -> None:
    if picture.bit_depth == 8:
        to_pil(picture).save(file, "PNG", **_metadata(picture))
    else:
        samples = to_depth(picture.samples(), np.uint16)
        png16.encode(file, samples, icc_profile=picture.icc_profile, exif=picture.exif)


def _write_jpeg(picture: Picture, file: Any, quality: int) -> None:
    flat = Picture(to_depth(picture.color, np.uint8))
    to_pil(flat).save(file, "JPEG", quality=quality, subsampling=0, optimize=True, **_metadata(picture))


def _write_webp(picture: Picture, file: Any, quality: int) -> None:
    image = to_pil(Picture(to_depth(picture.color, np.uint8), picture.alpha))
    image = image.convert("RGBA" if picture.alpha is not None else "RGB")
    metadata = _metadata(picture)
    if picture.color.shape[2] == 1:
        metadata.pop("icc_profile", None)  # a profile for gray does not apply to RGB
    image.save(file, "WEBP", quality=quality, lossless=quality == 100, exact=True, **metadata)


def _write_tiff(picture: Picture, file: Any, quality: int) -> None:
    tiff16.encode(file, picture.samples(), has_alpha=picture.alpha is not None, **_metadata(picture))


_WRITERS = {"PNG": _write_png, "JPEG": _write_jpeg, "WebP": _write_webp, "TIFF": _write_tiff}
