"""Rows to picture files: compressed by libvips in a thread while the rows are computed, with their descriptions.

libvips writes pixels, color profile and density. The other descriptions go into the file here, byte for byte: libvips
would drop the EXIF tags that it does not know.
"""

from __future__ import annotations

import contextlib
import io
import os
import queue
import struct
import threading
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, BinaryIO

import numpy as np
import pyvips
import torch

from liif_fast.images import headers, tags
from liif_fast.images.picture import Description, to_depth
from liif_fast.images.reading import reason_of

DEFAULT_QUALITY = 95
LARGEST_ROW = 10**8  # bytes: libvips' limit of a side
_LARGEST_SEGMENT = 65533  # bytes of data in a JPEG marker
_LARGEST_OPTIMIZED = 1 << 24  # pixels: to optimize a JPEG's codes, the whole picture has to be in memory
_QUEUED = 4  # bands of rows that wait for the compression
_FORMATS = {1: ("uchar", "b-w", "srgb"), 2: ("ushort", "grey16", "rgb16"), 4: ("float", "b-w", "scrgb")}


@dataclass(frozen=True)
class Layout:
    """The size of a picture to be written, its samples of a pixel, whether the last one is alpha, and their dtype."""

    height: int
    width: int
    channels: int
    has_alpha: bool
    dtype: np.dtype


def lost(kind: str, about: Description) -> list[str]:
    """The names of descriptions that a format cannot hold."""
    exif, xmp, photoshop = (len(data or b"") for data in (about.exif, about.xmp, about.photoshop))
    limited = _LARGEST_SEGMENT - 50 if kind == "JPEG" else 1 << 31
    colors = any(name in about.png_chunks for name in (b"gAMA", b"cHRM", b"cICP")) and b"sRGB" not in about.png_chunks
    missing = {
        "EXIF tags": exif > limited,
        "XMP": xmp > limited,
        "IPTC texts": photoshop > limited or (photoshop > 0 and kind in ("PNG", "WebP")),
        "density": about.density is not None and kind == "WebP" and not exif,
        "comment": about.comment is not None and kind in ("WebP", "TIFF"),
        "PNG texts": kind != "PNG" and any(name in about.png_chunks for name in (b"tEXt", b"zTXt", b"iTXt")),
        "gamma and primaries": kind != "PNG" and colors,
    }
    return [name for name, is_lost in missing.items() if is_lost]


@contextlib.contextmanager
def writing(
    file: BinaryIO, kind: str, layout: Layout, about: Description, quality: int | None
) -> Iterator[Callable[[np.ndarray], None]]:
    """A function that takes the next rows [n, width, channels] of a picture; the block's end completes the file.

    Args:
        file: open for reading and writing, empty.
        kind: PNG, JPEG, TIFF or WebP. PNG stores float samples with 16 bits, JPEG and WebP everything with 8.
        layout: of the rows. JPEG loses their alpha channel.
        about: goes into the file.
        quality: 1..100 for JPEG and WebP.

    Raises: OSError for what the file system and libvips report.
    """
    stored = np.dtype(np.uint8) if kind in ("JPEG", "WebP") else layout.dtype
    stored = np.dtype(np.uint16) if kind == "PNG" and layout.dtype.kind == "f" else stored
    has_alpha = layout.has_alpha and kind != "JPEG"
    channels = layout.channels - (layout.has_alpha and not has_alpha)
    layout = replace(layout, channels=channels, has_alpha=has_alpha, dtype=stored)
    if kind == "WebP" and channels < 3:  # WebP has no gray
        about = about_without_profile(about)
    saver = _Saver(file, kind, layout, about, quality or DEFAULT_QUALITY)
    try:
        saver.start()
        yield lambda rows: saver.put(to_depth(rows[..., :channels], stored))
    except BaseException:
        saver.stop()
        raise
    saver.finish()
    _complete(file, kind, layout, about)


def about_without_profile(about: Description) -> Description:
    """The description without a color profile, which would not apply."""
    return Description(**{**vars(about), "icc_profile": None})


class _Saver:
    """libvips' saver in a thread. It reads the rows as a gray PNG without compression; the bytes come from a queue."""

    _user: int | None = None  # the process that has libvips' threads

    def __init__(self, file: BinaryIO, kind: str, layout: Layout, about: Description, quality: int) -> None:
        if _Saver._user not in (None, os.getpid()):
            raise OSError("files cannot be written in a process forked after the first file was written: spawn it.")
        _Saver._user = os.getpid()
        self._file, self._kind, self._layout, self._about, self._quality = file, kind, layout, about, quality
        self._queue: queue.Queue[bytes] = queue.Queue(_QUEUED)
        self._rest, self._stopped = memoryview(b""), False
        self._error: BaseException | None = None
        self._head: bytes | None = b""
        self._deflate = zlib.compressobj(0)
        self._row_bytes = layout.width * layout.channels * layout.dtype.itemsize
        self._thread = threading.Thread(target=self._save, name="liif_fast-saver", daemon=True)

    def start(self) -> None:
        """Start libvips, with as many threads as PyTorch uses."""
        pyvips.concurrency_set(torch.get_num_threads())
        self._thread.start()
        header = struct.pack(">IIBBBBB", self._row_bytes, self._layout.height, 8, 0, 0, 0, 0)
        self._push(headers.PNG_SIGNATURE + headers.png_chunk(b"IHDR", header))

    def put(self, rows: np.ndarray) -> None:
        """Hand over rows of the layout; waits while too many are not compressed yet."""
        for top in range(0, len(rows), step := max(1, (1 << 24) // self._row_bytes)):
            part = np.ascontiguousarray(rows[top : top + step])
            filtered = np.pad(part.view(np.uint8).reshape(len(part), self._row_bytes), ((0, 0), (1, 0)))
            if data := self._deflate.compress(filtered.data):
                self._push(headers.png_chunk(b"IDAT", data))

    def finish(self) -> None:
        """Wait until everything is written."""
        self._push(headers.png_chunk(b"IDAT", self._deflate.flush()) + headers.png_chunk(b"IEND", b"") + b"\0" * 8)
        self._push(b"")
        try:
            self._thread.join()
        except BaseException:
            self.stop()
            raise
        self._raise()

    def stop(self) -> None:
        """End the thread, whatever it waits for."""
        self._stopped = True
        while self._thread.is_alive():
            with contextlib.suppress(queue.Empty):
                self._queue.get_nowait()
            with contextlib.suppress(queue.Full):
                self._queue.put_nowait(b"")
            self._thread.join(0.05)

    def _push(self, data: bytes) -> None:
        while self._thread.is_alive():
            with contextlib.suppress(queue.Full):
                self._queue.put(data, timeout=0.2)
                return
        self._raise()

    def _raise(self) -> None:
        if isinstance(self._error, pyvips.Error):
            raise OSError(f"libvips reports: {reason_of(self._error)}") from self._error
        if self._error is not None:
            raise self._error

    def _read(self, size: int) -> memoryview | None:
        if not self._rest:
            self._rest = memoryview(b"" if self._stopped else self._queue.get())
        data, self._rest = self._rest[:size], self._rest[size:]
        return data or None

    def _write(self, data: Any) -> int:
        try:
            return self._edited(bytes(data))
        except BaseException as error:  # libvips would only say that a write failed
            self._error = error
            return -1

    def _edited(self, data: bytes) -> int:
        """Write `data`; the beginning is held back until it is complete and can get the descriptions."""
        if self._head is None or self._kind not in _EDITORS:
            self._file.write(data)
            return len(data)
        self._head += data
        if (edited := _EDITORS[self._kind](self._head, self._about, self._layout)) is not None:
            self._file.write(edited)
            self._head = None
        return len(data)

    def _save(self) -> None:
        try:
            source = pyvips.SourceCustom()
            source.on_read(self._read)
            target = pyvips.TargetCustom()
            target.on_write(self._write)
            if self._kind == "TIFF":
                target.on_read(self._file.read)
                target.on_seek(self._file.seek)
            self._saved(source, target)
        except BaseException as error:
            self._error = self._error or error

    def _saved(self, source: Any, target: Any) -> None:
        layout = self._layout
        item = layout.dtype.itemsize
        name, gray, rgb = _FORMATS[item]
        raw = pyvips.Image.pngload_source(source, access="sequential", unlimited=True, fail_on="error")
        x, y = self._about.density or (1.0, 1.0)
        image = raw.bandfold(factor=layout.channels * item).copy(
            format=name, bands=layout.channels, interpretation=gray if layout.channels < 3 else rgb, xres=x, yres=y
        )
        image.set_type(pyvips.GValue.gstr_type, "resolution-unit", "in")
        if self._about.icc_profile:
            image.set_type(pyvips.GValue.blob_type, "icc-profile-data", self._about.icc_profile)
        if self._kind == "PNG":
            image.pngsave_target(target, compression=4, filter="all", keep="icc")
        elif self._kind == "JPEG":
            small = layout.height * layout.width <= _LARGEST_OPTIMIZED
            image.jpegsave_target(target, Q=self._quality, subsample_mode="off", optimize_coding=small, keep="icc")
        elif self._kind == "WebP":
            image.webpsave_target(target, Q=self._quality, lossless=self._quality == 100, exact=True, keep="icc")
        else:
            image.tiffsave_target(
                target,
                compression="deflate",
                predictor="float" if layout.dtype.kind == "f" else "horizontal",
                tile_height=max(1, (1 << 18) // self._row_bytes),
                bigtiff=layout.height * self._row_bytes >= 2**32 - 2**25,  # classic TIFF addresses 4 GiB
                keep="icc",
            )


def _exif(about: Description, layout: Layout) -> bytes | None:
    return tags.cleaned_exif(about.exif, (layout.height, layout.width)) if about.exif else None


def _edit_png(head: bytes, about: Description, layout: Layout) -> bytes | None:
    """The chunks before the pixels, with those of the description; None while they are not complete."""
    chunks, position = [], 8
    while head[position + 4 : position + 8] != b"IDAT":
        if len(head) < position + 8:
            return None
        end = position + 12 + int.from_bytes(head[position : position + 4], "big")
        if about.density or head[position + 4 : position + 8] != b"pHYs":
            chunks.append(head[position:end])
        position = end
    extra = about.png_chunks
    if about.comment:
        extra += headers.png_chunk(b"tEXt", b"Comment\0" + about.comment.replace(b"\0", b" "))
    if about.xmp:
        extra += headers.png_chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + about.xmp)
    if exif := _exif(about, layout):
        extra += headers.png_chunk(b"eXIf", exif)
    return headers.PNG_SIGNATURE + chunks[0] + extra + b"".join(chunks[1:]) + head[position:]


def _edit_jpeg(head: bytes, about: Description, layout: Layout) -> bytes | None:
    """The JFIF segment, those of the description, then what libvips has written after the first marker."""
    density = [round(each * 25.4) for each in about.density or (0, 0)]
    unit, *density = (1, *density) if all(0 < each < 1 << 16 for each in density) else (0, 1, 1)
    jfif = b"\xff\xd8\xff\xe0\0\x10JFIF\0\1\1" + struct.pack(">BHHBB", unit, *density, 0, 0)
    exif = _exif(about, layout)
    segments = (
        (0xE1, exif and b"Exif\0\0" + exif),
        (0xE1, about.xmp and b"http://ns.adobe.com/xap/1.0/\0" + about.xmp),
        (0xED, about.photoshop and b"Photoshop 3.0\0" + about.photoshop),
        (0xFE, about.comment),
    )
    fitting = [(marker, data) for marker, data in segments if data and len(data) <= _LARGEST_SEGMENT]
    packed = b"".join(struct.pack(">BBH", 0xFF, marker, len(data) + 2) + data for marker, data in fitting)
    return jfif + packed + head[2:]


_EDITORS = {"PNG": _edit_png, "JPEG": _edit_jpeg}


def _complete(file: BinaryIO, kind: str, layout: Layout, about: Description) -> None:
    """Add the descriptions of TIFF and WebP to the written file."""
    if kind == "TIFF":
        own: tags.Values = {tags.XMP: (1, about.xmp)} if about.xmp else {}
        own |= {tags.PHOTOSHOP: (1, about.photoshop)} if about.photoshop else {}
        tags.add_to_tiff(file, _exif(about, layout), own, about.density is not None)
    exif = _exif(about, layout)
    if kind == "WebP" and (exif or about.xmp):
        file.seek(0)
        data = file.read()
        chunks, position = {}, 12
        while position < len(data):
            end = position + 8 + (size := int.from_bytes(data[position + 4 : position + 8], "little")) + size % 2
            chunks[data[position : position + 4]] = data[position:end]
            position = end
        flags = 0x20 * (b"ICCP" in chunks) | 0x10 * layout.has_alpha | 8 * bool(exif) | 4 * bool(about.xmp)
        sides = (layout.width - 1).to_bytes(3, "little") + (layout.height - 1).to_bytes(3, "little")
        chunks[b"VP8X"] = _webp_chunk(b"VP8X", bytes([flags, 0, 0, 0]) + sides)
        chunks |= {name: _webp_chunk(name, each) for name, each in ((b"EXIF", exif), (b"XMP ", about.xmp)) if each}
        order = (b"VP8X", b"ICCP", b"ALPH", b"VP8 ", b"VP8L", b"EXIF", b"XMP ")
        body = b"WEBP" + b"".join(chunks[name] for name in order if name in chunks)
        file.seek(0)
        file.write(b"RIFF" + struct.pack("<I", len(body)) + body)
    file.seek(0, io.SEEK_END)


def _webp_chunk(name: bytes, data: bytes) -> bytes:
    return name + struct.pack("<I", len(data)) + data + b"\0" * (len(data) % 2)
