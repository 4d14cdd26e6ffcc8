"""Picture files as rows: decoded by libvips from top to bottom, or by Pillow where libvips has no decoder.

libvips decodes in the calling thread here: its own threads would not exist in a forked loader worker.
"""

from __future__ import annotations

import atexit
import contextlib
import dataclasses
import math
import mmap
import os
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pyvips
from PIL import Image

from liif_fast.images import headers
from liif_fast.images.picture import Description, ImageError, Picture, fitting_profile, from_pil, largest, unit_range
from liif_fast.utils import memory

pyvips.cache_set_max(0)  # otherwise a file that has changed is read as it was before
pyvips.block_untrusted_set(True)
# Errors say what the log would print; pyvips cannot decode the log's lines about some broken files.
_discard = pyvips.ffi.callback("GLogFunc", lambda *_: None)
for _domain in (b"VIPS", b"GLib-GObject"):
    _handler = pyvips.glib_lib.g_log_set_handler(_domain, -1, _discard, pyvips.ffi.NULL)
    atexit.register(pyvips.glib_lib.g_log_remove_handler, _domain, _handler)

Source = str | os.PathLike[str] | BinaryIO

# WebP is left to Pillow: libvips decodes it in threads of its own.
_LOADERS = {"PNG": "png", "JPEG": "jpeg", "TIFF": "tiff", "GIF": "gif", "AVIF": "heif"}
# Pillow's decoders that start no other program and need no plugin.
_PILLOW = ["BMP", "DIB", "DDS", "ICNS", "ICO", "JPEG2000", "PCX", "PPM", "PSD", "QOI", "SGI", "TGA", "XBM", "XPM"]
_DTYPES = {"uchar": np.uint8, "ushort": np.uint16, "float": np.float32}
_MIN_IS_WHITE, _CIELAB = 0, 8  # TIFF's photometric interpretations
_LZMA, _ZSTD = 34925, 50000  # compressions of TIFF that libvips' wheel leaves out and Pillow's has
_BAND, _BAND_BYTES = 256, 1 << 24  # rows decoded at once; fewer, if they are wide
_LARGEST_BUFFER = 1 << 28  # bytes of a turned picture; larger ones lie in a temporary file


class PictureFile:
    """A picture file, read from top to bottom as `Rows`; it is shown as a viewer shows it, orientation applied.

    Attributes: those of `Rows`, and
        path: the file.
        description: color profile, EXIF, texts, density.
    """

    def __init__(self, path: Path, name: str, rows: Any, description: Description) -> None:
        self.path, self.description, self._name, self._rows = path, description, name, rows
        self.height, self.width, self.channels = rows.height, rows.width, rows.channels
        self.has_alpha, self.dtype = bool(rows.has_alpha), np.dtype(rows.dtype)
        self._top = 0
        self._kept = np.empty((0, self.width, self.channels), self.dtype)

    def read(self, top: int, bottom: int) -> np.ndarray:
        """Rows [bottom - top, width, channels]; neither end may decrease from one call to the next."""
        end = self._top + len(self._kept)
        if bottom > end or top > self._top:
            kept = self._kept[max(0, top - self._top) :]
            step = max(1, min(_BAND, _BAND_BYTES // (self.width * self.channels * self.dtype.itemsize)))
            with failing(self._name):
                steps = range(max(end, top), bottom, step)
                fresh = [self._rows.read(first, min(first + step, bottom)) for first in steps]
            self._kept = np.concatenate([kept, *fresh])
            self._top = top
        return self._kept[: bottom - self._top]

    @property
    def is_opaque(self) -> bool:
        """Whether no pixel is transparent: the file is decoded once more to find out."""
        if not self.has_alpha:
            return True
        with warnings.catch_warnings(), opened(self.path) as again:
            warnings.simplefilter("ignore")
            bands = (again.read(top, min(top + _BAND, self.height)) for top in range(0, self.height, _BAND))
            return all(bool((band[..., -1] == largest(self.dtype)).all()) for band in bands)

    def picture(self) -> Picture:
        """All rows in memory."""
        samples = np.empty((self.height, self.width, self.channels), self.dtype)
        for top in range(0, self.height, _BAND):
            bottom = min(top + _BAND, self.height)
            samples[top:bottom] = self.read(top, bottom)
        return Picture.from_samples(samples, self.has_alpha, self.description)


@contextlib.contextmanager
def opened(
    source: Source, *, folder: str | os.PathLike[str] | None = None, max_pixels: int | None = None, whole: bool = False
) -> Iterator[PictureFile]:
    """Open a picture file.

    Args:
        source: a path, or a binary file that is read to its end, such as a pipe.
        folder: for temporary files: the content of a pipe, and a large picture that must be turned. None: the system's
            folder for the pipe, memory for the picture.
        max_pixels: refuse larger pictures; None leaves the limit to the memory.
        whole: require the memory for all pixels.

    Only the first frame of an animation or page of a file is read, with a warning.

    Raises: ImageError for a file that is missing, broken, no picture, or of an unsupported kind; NotEnoughMemory. Rows
        that are broken raise ImageError when they are read.
    """
    if isinstance(source, str | os.PathLike) and not Path(source).is_fifo():
        yield _open(Path(source), str(source), folder, max_pixels, whole)
        return
    name = str(source) if isinstance(source, str | os.PathLike) else str(getattr(source, "name", "the input"))
    with contextlib.ExitStack() as stack:
        with failing(name):
            spool = stack.enter_context(tempfile.NamedTemporaryFile(dir=folder, prefix=".", suffix=".tmp"))
            stream: Any = stack.enter_context(open(source, "rb")) if isinstance(source, str | os.PathLike) else source
            shutil.copyfileobj(stream, spool)
            spool.flush()
        yield _open(Path(spool.name), name, folder, max_pixels, whole)


@contextlib.contextmanager
def failing(name: str) -> Iterator[None]:
    """Whatever is raised inside becomes one sentence with the file's name."""
    try:
        yield
    except memory.NotEnoughMemory:
        raise
    except ImageError as error:
        raise error if name in str(error) else ImageError(f"{name}: {error}") from error
    except FileNotFoundError as error:
        raise ImageError(f"{name} does not exist.") from error
    except PermissionError as error:
        raise ImageError(f"{name} cannot be opened: permission denied.") from error
    except Image.UnidentifiedImageError as error:
        raise ImageError(f"{name} is not an image in a format that can be read.") from error
    except Image.DecompressionBombError as error:
        raise ImageError(f"{name} is larger than Pillow allows ({error}); raise PIL.Image.MAX_IMAGE_PIXELS.") from error
    except Exception as error:  # a broken file can make a decoder raise anything
        reason = reason_of(error)
        raise ImageError(f"{name} is broken or of a kind that is not supported ({reason}).") from error


def reason_of(error: Exception) -> str:
    """The last line of libvips' report, the first of any other error, without a period."""
    report = error.detail if isinstance(error, pyvips.Error) else (getattr(error, "strerror", None) or str(error))
    lines = [line for line in str(report).strip().splitlines() if line.strip()]
    return (lines[-1 if isinstance(error, pyvips.Error) else 0].rstrip(".") if lines else "") or type(error).__name__


def _open(path: Path, name: str, folder: Any, max_pixels: int | None, whole: bool) -> PictureFile:
    with failing(name):
        if path.is_dir():
            raise ImageError(f"{name} is a folder, not an image file.")
        header = headers.inspect(path)
        by_pillow = (header.photometric, header.bits) == (_CIELAB, 8) or header.compression in (_LZMA, _ZSTD)
        if header.kind not in _LOADERS or by_pillow:
            return _open_with_pillow(path, name, header, max_pixels)
        options = {"page": header.page, "subifd": header.subifd} if header.kind == "TIFF" else {}
        load = getattr(pyvips.Image, f"{_LOADERS[header.kind]}load")
        image = load(os.fsencode(path), access="sequential", fail_on="error", **options)
        fields = set(image.get_fields())
        _warn_about_frames(name, header.pages if header.kind == "TIFF" else image.get_n_pages())
        itemsize = 1 if image.format == "uchar" else 2 if image.format == "ushort" else 4
        # Formats that cannot be decoded row by row: the decoder holds the whole picture.
        held = header.kind in ("GIF", "AVIF") or "interlaced" in fields or _field(image, "jpeg-multiscan") == 1
        _require_size(name, image.height, image.width, itemsize, max_pixels, whole or held)
        plain, colors, has_alpha, profile = _plain(image, header)
        description = _description(image, header, fitting_profile(profile, colors))
        rows: Any = _Decoded(plain, has_alpha)
        orientation = _field(image, "orientation") or 1
        if orientation in range(2, 9) and header.kind != "AVIF":  # libheif has turned it already
            rows = _Turned(rows, orientation, folder)
        return PictureFile(path, name, rows, description)


def _open_with_pillow(path: Path, name: str, header: headers.Header, max_pixels: int | None) -> PictureFile:
    formats = {"TIFF": ["TIFF"], "HEIC": ["HEIF"], "WebP": ["WEBP"]}.get(header.kind, _PILLOW)
    common = header.kind in ("TIFF", "WebP")
    if header.kind == "HEIC":
        try:
            from pillow_heif import register_heif_opener  # an optional package
        except ImportError as error:
            install = "pip install pillow-heif"
            raise ImageError(f"{name} is a HEIC picture, which needs a decoder of its own: {install}.") from error
        register_heif_opener()
    with Image.open(path, formats=formats) as image:
        _warn_about_frames(name, getattr(image, "n_frames", 1) if common else 1)
        _require_size(name, image.height, image.width, 1, max_pixels, True)
        exif, xmp = image.info.get("exif"), image.info.get("xmp")
        density = image.info.get("dpi")
        orientation = image.getexif().get(0x0112, 1) if common else 1
        picture = from_pil(image)
        # Some versions of Pillow turn a TIFF while loading it and remove the tag; the others do neither.
        turn = orientation in range(2, 9) and 0x0112 in image.getexif()
    description = dataclasses.replace(
        picture.description,
        exif=header.description.exif or _clean(exif),
        xmp=headers.upright_xmp(xmp) if isinstance(xmp, bytes) else None,
        density=(float(density[0]) / 25.4, float(density[1]) / 25.4) if density and all(density) else None,
    )
    return PictureFile(path, name, _Turned(picture, orientation, None) if turn else picture, description)


def _warn_about_frames(name: str, frames: int) -> None:
    if frames > 1:
        warnings.warn(f"{name} has {frames} frames or pages; only the first is used.", stacklevel=6)


def _require_size(name: str, height: int, width: int, itemsize: int, max_pixels: int | None, whole: bool) -> None:
    """Check the size in a file's header. Decoding needs about three copies of up to four samples per pixel."""
    if max_pixels is not None and height * width > max_pixels:
        raise ImageError(f"{name} has {width}x{height} pixels, more than the limit of {max_pixels}: raise the limit.")
    if whole:
        memory.require(3 * 4 * height * width * itemsize, f"{name} ({width}x{height} pixels)", "use a smaller image")


def _field(image: Any, name: str) -> Any:
    return image.get(name) if image.get_typeof(name) else None


def _plain(image: Any, header: headers.Header) -> tuple[Any, int, bool, bytes | None]:
    """The image as gray or RGB with at most an alpha channel: (image, color channels, has alpha, profile)."""
    profile = _field(image, "icc-profile-data")
    if image.interpretation in ("cmyk", "lab", "labs", "labq", "lch", "xyz", "yxy"):
        deep = image.format not in ("uchar",)
        try:
            if profile is None or image.interpretation != "cmyk":
                raise pyvips.Error("no profile")
            image = image.icc_transform("srgb", embedded=True, depth=16 if deep else 8)
        except pyvips.Error:  # there is no profile that fits the image
            image = image.colourspace("rgb16" if deep else "srgb")
        profile = None
    if image.format not in _DTYPES:
        raise ImageError(f"its samples are of the kind {image.format}, but must have 8 bits, 16 bits or be float32.")
    if header.photometric == _MIN_IS_WHITE and image.format == "float":
        image = (1 - image).cast("float")  # libvips does this for whole numbers
    colors = 1 if header.photometric in (0, 1) or image.bands < 3 else 3
    has_alpha = image.bands > colors and header.extra_samples[:1] != (0,)
    if image.bands > colors + has_alpha:
        image = image.extract_band(0, n=colors + has_alpha)
    return image, colors, has_alpha, profile


def _clean(exif: bytes | None) -> bytes | None:
    return headers.tags.cleaned_exif(exif) if isinstance(exif, bytes) and exif else None


def _description(image: Any, header: headers.Header, profile: bytes | None) -> Description:
    xmp, photoshop, iptc = (_field(image, f"{name}-data") for name in ("xmp", "photoshop", "iptc"))
    if iptc is not None:
        start = b"Photoshop 3.0\0"
        wrapped = b"8BIM\x04\x04\0\0" + len(iptc).to_bytes(4, "big") + iptc + b"\0" * (len(iptc) % 2)
        photoshop = iptc[len(start) :] if iptc.startswith(start) else photoshop or wrapped
    density = (image.xres, image.yres)
    # libvips replaces a missing density by 72 dpi: in a PNG by 2834 pixels per meter, in others without a unit.
    known = density != (2.834, 2.834) if header.kind == "PNG" else _field(image, "resolution-unit") is not None
    known = known and all(math.isfinite(each) and 0 < each < 1e6 for each in density)
    return dataclasses.replace(
        header.description,
        icc_profile=profile,
        exif=header.description.exif or _clean(_field(image, "exif-data")),
        xmp=headers.upright_xmp(xmp) if xmp else None,
        photoshop=photoshop,
        density=density if known else None,
    )


class _Decoded:
    """Rows of a libvips image, decoded in this thread as they are asked for."""

    def __init__(self, image: Any, has_alpha: bool) -> None:
        self.height, self.width, self.channels = image.height, image.width, image.bands
        self.has_alpha, self.dtype = has_alpha, np.dtype(_DTYPES[image.format])
        self._region = pyvips.Region.new(image)

    def read(self, top: int, bottom: int) -> np.ndarray:
        data = self._region.fetch(0, top, self.width, bottom - top)
        rows = np.frombuffer(data, self.dtype).reshape(bottom - top, self.width, self.channels)
        return unit_range(rows) if self.dtype.kind == "f" else rows


class _Turned:
    """Rows of a picture after its EXIF orientation 2..8 (EXIF 2.32, section 4.6.4.A) was applied.

    A large picture lies in a temporary file in `folder`, which has no name and disappears with the process.
    """

    def __init__(self, rows: Any, orientation: int, folder: str | os.PathLike[str] | None) -> None:
        swapped = orientation in (5, 6, 7, 8)
        self.height, self.width = (rows.width, rows.height) if swapped else (rows.height, rows.width)
        self.channels, self.has_alpha, self.dtype = rows.channels, rows.has_alpha, rows.dtype
        shape = (self.height, self.width, self.channels)
        self._release: Callable[[], None] = lambda: None
        size = math.prod(shape) * self.dtype.itemsize
        if folder is None or size <= _LARGEST_BUFFER:
            self._samples = np.empty(shape, self.dtype)
        else:
            self._samples = self._in_a_file(shape, size, folder)
        stored = self._samples[:: -1 if orientation in (3, 4, 7, 8) else 1, :: -1 if orientation in (2, 3, 6, 7) else 1]
        stored = stored.swapaxes(0, 1) if swapped else stored
        for top in range(0, rows.height, _BAND):
            bottom = min(top + _BAND, rows.height)
            stored[top:bottom] = rows.read(top, bottom)
            self._release()

    def _in_a_file(self, shape: tuple[int, ...], size: int, folder: str | os.PathLike[str]) -> np.ndarray:
        with tempfile.TemporaryFile(dir=folder) as file:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, size)  # a full disk is an error now instead of a signal later
            else:
                file.truncate(size)
            mapped = mmap.mmap(file.fileno(), size)
        if hasattr(mmap, "MADV_DONTNEED"):
            self._release = lambda: mapped.madvise(mmap.MADV_DONTNEED)
        return np.frombuffer(mapped, self.dtype).reshape(shape)

    def read(self, top: int, bottom: int) -> np.ndarray:
        rows = self._samples[top:bottom].copy()
        self._release()
        return rows
