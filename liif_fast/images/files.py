"""Reading and writing picture files: one small class between Pillow, tifffile and the models.

Every picture ends up as grey or RGB samples of 8, 16 or 32 (float) bits, an alpha channel beside them, and the ICC
profile and the descriptive EXIF tags of the file. Palettes, CMYK, YCbCr, Lab and 1-bit pictures are converted.
"""

from __future__ import annotations

import io
import os
import struct
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import tifffile
from PIL import ExifTags, Image, ImageCms

from liif_fast.images import png16, tiff16
from liif_fast.utils import memory

# What a file may be called to be written, and the largest side its format can hold.
FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WebP", ".tif": "TIFF", ".tiff": "TIFF"}
_LARGEST_SIDE = {"JPEG": 65500, "WebP": 16383, "PNG": 2**31 - 1, "TIFF": 2**31 - 1}
_DEFAULT_QUALITY = 95

# Tags that still hold after the picture was enlarged. Structure, thumbnails, maker notes and sizes do not.
_KEPT_EXIF = (0x010E, 0x010F, 0x0110, 0x0131, 0x0132, 0x013B, 0x8298)
_KEPT_EXIF_IFDS = (ExifTags.IFD.Exif, ExifTags.IFD.GPSInfo)
_DROPPED_EXIF = (0x927C, 0xA002, 0xA003, 0xA005)
_ORIENTATION = 0x0112
_LARGEST_EXIF = 65533  # what one JPEG marker holds

_ROWS_AT_ONCE = 256  # conversions go by bands of rows, so that they need no second picture in float


class ImageError(ValueError):
    """A file that cannot be read or written; the message is one sentence for the person who named it."""


@dataclass
class Picture:
    """A decoded picture.

    Attributes:
        colour: [H, W, 1] (grey) or [H, W, 3] (RGB); uint8, uint16, or float32 in [0, 1].
        alpha: [H, W] of the same dtype, not premultiplied, or None.
        icc_profile: for the colour samples as they are.
        exif: descriptive tags in TIFF layout, without an orientation.
    """

    colour: np.ndarray
    alpha: np.ndarray | None = None
    icc_profile: bytes | None = None
    exif: bytes | None = None

    @property
    def height(self) -> int:
        """Rows."""
        return int(self.colour.shape[0])

    @property
    def width(self) -> int:
        """Columns."""
        return int(self.colour.shape[1])

    @property
    def channels(self) -> int:
        """Samples a pixel, alpha included."""
        return int(self.colour.shape[2]) + (self.alpha is not None)

    @property
    def bit_depth(self) -> int:
        """8, 16 or 32."""
        return self.colour.dtype.itemsize * 8


def read(path: str | os.PathLike[str]) -> Picture:
    """Read a picture file, the way a viewer would show it (EXIF orientation applied).

    Of an animation or a file with several pages only the first is read, with a warning.

    Raises: ImageError for a missing, broken or non-image file, or one of a kind that is not supported.
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
    except Exception as error:  # decoders raise whatever a broken file leads them to
        raise ImageError(f"{path} is broken or of a kind that is not supported ({_first_line(error)}).") from error


def write(picture: Picture, path: str | os.PathLike[str], *, quality: int | None = None) -> None:
    """Write a picture under a temporary name beside `path`, then rename it: a reader never meets half a file.

    PNG keeps 16 bits (float samples become 16 bits), TIFF keeps 16 bits and float, JPEG and WebP have 8. The ICC
    profile is kept everywhere; of EXIF, TIFF keeps the texts (camera, artist, date, ...) and the others everything.
    WebP has no grey: it stores equal RGB.

    Args:
        picture: what to write.
        path: its suffix decides the format (`FORMATS`).
        quality: 1..100 for JPEG and WebP, 95 by default; 100 makes a lossless WebP. Ignored by PNG and TIFF.

    Raises: ImageError as `check_target` does, or when the file system refuses.
    """
    path = Path(path)
    check_target(path, picture.height, picture.width, alpha=picture.alpha, quality=quality)
    kind = FORMATS[path.suffix.lower()]
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "xb") as file:
            _WRITERS[kind](picture, file, quality or _DEFAULT_QUALITY)
        os.replace(temporary, path)
    except OSError as error:
        raise ImageError(f"{path} cannot be written: {error.strerror or _first_line(error)}.") from error
    finally:
        temporary.unlink(missing_ok=True)


def check_target(
    path: str | os.PathLike[str],
    height: int,
    width: int,
    *,
    alpha: np.ndarray | None = None,
    quality: int | None = None,
) -> None:
    """Say before the long work what would make `write` fail after it.

    Args:
        path: the file to be written.
        height, width: of the picture to be written, in pixels.
        alpha: its alpha channel (that of the small picture will do: only opaque or not matters).
        quality: as for `write`.

    Raises: ImageError for an unknown suffix, a missing or unwritable folder, a size the format cannot hold, an alpha
        channel that is not opaque in a JPEG, a quality outside 1..100.
    """
    path = Path(path)
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
    if kind == "JPEG" and alpha is not None and not _is_opaque(alpha):
        raise ImageError(f"{path} cannot be written: JPEG has no alpha channel; use PNG, WebP or TIFF.")


def from_pil(image: Image.Image) -> Picture:
    """Take a Pillow image of any mode apart.

    1-bit becomes grey, palettes and other colour spaces RGB; transparency of any kind an alpha channel. 32-bit integers
    are taken as 16-bit samples, floats as numbers in [0, 1]. The orientation tag is not looked at (`read` does).

    Raises: ImageError when samples lie outside those ranges.
    """
    image.load()
    profile = image.info.get("icc_profile") or None
    if image.mode.startswith("I;16"):
        samples = np.asarray(image.convert("I") if image.mode != "I;16" else image).astype(np.uint16)
    elif image.mode == "I":
        wide = np.asarray(image)
        if wide.size and (wide.min() < 0 or wide.max() > 65535):
            raise ImageError(f"A 32-bit integer image must hold 0..65535, but holds {wide.min()}..{wide.max()}.")
        samples = wide.astype(np.uint16)
    elif image.mode == "F":
        samples = unit_range(np.asarray(image))
    else:
        image, profile = _to_plain_mode(image, profile)
        samples = np.asarray(image)
    if samples.ndim == 2:
        samples = samples[..., None]
    return _assemble(samples, samples.shape[2] in (2, 4), profile)


def to_pil(picture: Picture) -> Image.Image:
    """The picture as a Pillow image: L, LA, RGB or RGBA of 8 bits, I;16 for 16-bit grey, F for float grey.

    Pillow has no other deep modes: 16-bit and float colour is rounded to 8 bits.
    """
    if picture.channels == 1 and picture.bit_depth > 8:
        return Image.fromarray(picture.colour[..., 0])
    colour = to_depth(picture.colour, np.uint8)
    image = Image.fromarray(colour[..., 0] if colour.shape[2] == 1 else colour)
    if picture.alpha is not None:
        image.putalpha(Image.fromarray(to_depth(picture.alpha, np.uint8)))
    return image


def to_depth(samples: np.ndarray, dtype: Any) -> np.ndarray:
    """Samples [H, W, ...] of any of the three depths as another: 0 stays 0 and the largest value the largest."""
    dtype = np.dtype(dtype)
    if samples.dtype == dtype:
        return samples
    out = np.empty(samples.shape, dtype)
    factor = _largest(dtype) / _largest(samples.dtype)
    for top in range(0, samples.shape[0], _ROWS_AT_ONCE):
        rows = slice(top, top + _ROWS_AT_ONCE)
        scaled = samples[rows].astype(np.float32) * np.float32(factor)
        out[rows] = scaled if dtype.kind == "f" else np.rint(np.clip(scaled, 0, _largest(dtype)))
    return out


def unit_range(samples: np.ndarray) -> np.ndarray:
    """Float samples as float32 after a check that they are numbers in [0, 1] (up to 1e-3, which is clipped away).

    Raises: ImageError naming the range found.
    """
    if samples.size == 0:
        return samples.astype(np.float32)
    low, high = float(samples.min()), float(samples.max())
    if not (low >= -1e-3 and high <= 1 + 1e-3):  # also refuses NaN
        raise ImageError(f"A float image must hold numbers in [0, 1], but holds {low:g}..{high:g}: rescale it first.")
    return np.clip(samples, 0, 1, dtype=np.float32, casting="same_kind")


def _largest(dtype: np.dtype) -> float:
    return 1.0 if dtype.kind == "f" else float(np.iinfo(dtype).max)


def _is_opaque(alpha: np.ndarray) -> bool:
    return bool((alpha == alpha.dtype.type(_largest(alpha.dtype))).all())


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return (lines[0].rstrip(".") if lines else "") or type(error).__name__


def _warn_about_frames(path: Path, frames: int) -> None:
    if frames > 1:
        warnings.warn(f"{path} has {frames} frames or pages; only the first is used.", stacklevel=3)


def _require_memory(path: Path, height: int, width: int, sample_bytes: int) -> None:
    """A small file may announce a huge picture. Decoding holds about three copies of up to four samples a pixel."""
    memory.require(3 * 4 * height * width * sample_bytes, f"{path} ({height}x{width} pixels)", "use a smaller image")


def _assemble(samples: np.ndarray, has_alpha: bool, icc_profile: bytes | None) -> Picture:
    """Split [H, W, samples] into colour and alpha; keep a profile only if it is one for this kind of colour."""
    alpha = np.ascontiguousarray(samples[..., -1]) if has_alpha else None
    colour = np.ascontiguousarray(samples[..., :-1] if has_alpha else samples)
    space = b"GRAY" if colour.shape[2] == 1 else b"RGB "
    if icc_profile is not None and icc_profile[16:20] != space:
        icc_profile = None
    return Picture(colour, alpha, icc_profile)


def _to_plain_mode(image: Image.Image, profile: bytes | None) -> tuple[Image.Image, bytes | None]:
    """Convert any 8-bit Pillow image to L, LA, RGB or RGBA."""
    transparent = "transparency" in image.info or image.mode in ("LA", "La", "PA", "RGBA", "RGBa")
    if image.mode in ("1", "L", "LA", "La"):
        if image.mode == "1":
            image = image.convert("L")
        return image.convert("LA" if transparent else "L"), profile
    if profile is not None and image.mode in ("CMYK", "LAB"):
        try:
            source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
            converted = ImageCms.profileToProfile(image, source, ImageCms.createProfile("sRGB"), outputMode="RGB")
        except (ImageCms.PyCMSError, OSError):
            converted = None  # a profile that does not fit: convert as if there were none
        if converted is not None:
            return converted, None
    return image.convert("RGBA" if transparent else "RGB"), profile


def _from_file(image: Image.Image) -> Picture:
    exif = _descriptive_exif(image.getexif())  # before the pixels: loading a TIFF closes it
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
        return None  # tags that break their own types are not worth the picture
    return data if len(data) <= _LARGEST_EXIF else None


def _raw_text(value: Any) -> Any:
    """EXIF texts name no encoding: Pillow reads the bytes as Latin-1, but would write what is not ASCII as '?'."""
    return value.encode("latin-1", "replace") if isinstance(value, str) and not value.isascii() else value


def _oriented(picture: Picture, image: Image.Image) -> Picture:
    return _turn(picture, image.getexif().get(_ORIENTATION, 1))


def _turn(picture: Picture, orientation: int) -> Picture:
    """Apply an EXIF orientation 1..8 (EXIF 2.32, section 4.6.4.A); other values mean nothing and change nothing."""

    def turned(samples: np.ndarray) -> np.ndarray:
        if orientation in (5, 6, 7, 8):
            samples = samples.swapaxes(0, 1)
        if orientation in (3, 4, 7, 8):
            samples = samples[::-1]
        if orientation in (2, 3, 6, 7):
            samples = samples[:, ::-1]
        return np.ascontiguousarray(samples)

    picture.colour = turned(picture.colour)
    if picture.alpha is not None:
        picture.alpha = turned(picture.alpha)
    return picture


def _read_png16(path: Path) -> Picture:
    with Image.open(path) as image, open(path, "rb") as file:
        _require_memory(path, image.height, image.width, 2)
        samples = png16.decode(file)
        picture = _assemble(samples, samples.shape[2] in (2, 4), image.info.get("icc_profile"))
        picture.exif = _descriptive_exif(image.getexif())
        return _oriented(picture, image)


def _read_tiff(path: Path) -> Picture:
    """8-bit TIFF goes through Pillow, which knows its many colour spaces; deeper samples through tifffile."""
    with tifffile.TiffFile(path) as tiff:
        page = cast(tifffile.TiffPage, tiff.pages.first)
        _require_memory(path, page.imagelength, page.imagewidth, max(1, page.bitspersample // 8))
        _warn_about_frames(path, len(tiff.pages))
        if page.bitspersample > 8:
            deep = tiff16.decode(page)
            samples = unit_range(deep.samples) if deep.samples.dtype.kind == "f" else deep.samples
            return _turn(_assemble(samples, deep.has_alpha, deep.icc_profile), deep.orientation)
    with Image.open(path) as image:
        orientation = image.getexif().get(_ORIENTATION, 1)
        picture = _from_file(image)
        # Pillow turns a TIFF while loading it and removes the tag; other versions leave both to us.
        return _turn(picture, orientation) if _ORIENTATION in image.getexif() else picture


def _metadata(picture: Picture) -> dict[str, Any]:
    named = {"icc_profile": picture.icc_profile, "exif": picture.exif}
    return {name: value for name, value in named.items() if value}


def _write_png(picture: Picture, file: Any, quality: int) -> None:
    if picture.bit_depth == 8:
        to_pil(picture).save(file, "PNG", **_metadata(picture))
    else:
        samples = to_depth(_interleaved(picture), np.uint16)
        png16.encode(file, samples, icc_profile=picture.icc_profile, exif=picture.exif)


def _write_jpeg(picture: Picture, file: Any, quality: int) -> None:
    flat = Picture(to_depth(picture.colour, np.uint8))
    to_pil(flat).save(file, "JPEG", quality=quality, subsampling=0, optimize=True, **_metadata(picture))


def _write_webp(picture: Picture, file: Any, quality: int) -> None:
    image = to_pil(Picture(to_depth(picture.colour, np.uint8), picture.alpha))
    image = image.convert("RGBA" if picture.alpha is not None else "RGB")
    metadata = _metadata(picture)
    if picture.colour.shape[2] == 1:
        metadata.pop("icc_profile", None)  # a profile for grey says nothing about RGB
    image.save(file, "WEBP", quality=quality, lossless=quality == 100, exact=True, **metadata)


def _write_tiff(picture: Picture, file: Any, quality: int) -> None:
    tiff16.encode(file, _interleaved(picture), has_alpha=picture.alpha is not None, **_metadata(picture))


def _interleaved(picture: Picture) -> np.ndarray:
    if picture.alpha is None:
        return picture.colour
    return np.concatenate([picture.colour, picture.alpha[..., None]], -1)


_WRITERS = {"PNG": _write_png, "JPEG": _write_jpeg, "WebP": _write_webp, "TIFF": _write_tiff}
