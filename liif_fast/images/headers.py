"""What kind of picture a file holds, and what its header says that libvips does not tell. No pixel is decoded here."""

from __future__ import annotations

import re
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from liif_fast.images import tags
from liif_fast.images.picture import Description, ImageError

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_RAW_NAMES = """3fr arw cr2 cr3 crw dcr dng erf iiq kdc mef mos mrw nef nrw orf pef raf rw2 rwl sr2 srf srw x3f"""
RAW_SUFFIXES = frozenset(f".{name}" for name in _RAW_NAMES.split())
_RAW_SIGNATURES = (b"FUJIFILMCCD-RAW", b"IIRO", b"IIRS", b"MMOR", b"IIU\0", b"\0MRM", b"FOVb", b"II\x1a\0\0\0HEAP")
_CFA, _LINEAR_RAW = 32803, 34892
_REDUCED, _MASK = 1, 4  # bits of NewSubfileType

# The chunks of a PNG that are true of the enlarged picture too, and that no other format has.
_KEPT_CHUNKS = (b"gAMA", b"cHRM", b"sRGB", b"cICP", b"mDCV", b"cLLI", b"tEXt", b"zTXt", b"iTXt")
_LARGEST_TEXTS = 1 << 24
_DEFLATE = 1032  # the most bytes that one byte unpacks to
_TIFF_RATIOS = {1: 1, 5: 1400, 8: _DEFLATE, 32773: 64, 32946: _DEFLATE}  # the same for TIFF's compressions
_COLOR_SAMPLES = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}  # PNG's color type -> samples of a pixel


@dataclass
class Header:
    """kind: PNG, JPEG, TIFF, WebP, GIF, AVIF, HEIC, or "" for a file that only Pillow may know.

    page, subifd: where libvips finds a TIFF's picture. pages: how many pictures a TIFF holds.
    photometric, bits, compression, extra_samples: tags of a TIFF's page.
    """

    kind: str
    page: int = 0
    subifd: int = -1
    pages: int = 1
    photometric: int = -1
    bits: int = 8
    compression: int = 1
    extra_samples: tuple[int, ...] = ()
    description: Description = field(default_factory=Description)


def inspect(path: Path) -> Header:
    """Look at a file's first bytes, tags and chunks.

    Raises: ImageError for camera raw, PDF, EPS and SVG, and for a PNG whose data outgrow its header; ValueError,
        struct.error, OSError for a broken file.
    """
    with open(path, "rb") as file:
        head = file.read(4096)
        kind = _kind(path, head)
        if kind == "PNG":
            return Header(kind, description=Description(png_chunks=_png_chunks(path, file)))
        if kind == "JPEG":
            return Header(kind, description=Description(comment=_jpeg_comment(path, file)))
        return _tiff(path, file) if kind == "TIFF" else Header(kind)


def _kind(path: Path, head: bytes) -> str:
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n")
    if (
        path.suffix.lower() in RAW_SUFFIXES
        or head.startswith(_RAW_SIGNATURES)
        or (head[:2] == b"II" and head[8:10] == b"CR")
    ):
        raise _raw(path)
    if text.startswith((b"%PDF", b"%!PS", b"\xc5\xd0\xd3\xc6")) or (text[:1] == b"<" and b"<svg" in text):
        raise ImageError(f"{path} is a PDF, EPS or SVG drawing, not a picture of pixels: export it as PNG first.")
    if head[4:8] == b"ftyp":
        brands = head[8 : min(len(head), int.from_bytes(head[:4], "big"))]
        if b"crx " in brands:
            raise _raw(path)
        if b"avif" in brands or b"avis" in brands:
            return "AVIF"
        return "HEIC" if any(brand in brands for brand in (b"heic", b"heix", b"hevc", b"mif1", b"msf1")) else ""
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return "WebP"
    starts = {PNG_SIGNATURE: "PNG", b"\xff\xd8\xff": "JPEG", b"GIF87a": "GIF", b"GIF89a": "GIF"}
    starts |= dict.fromkeys(tags.SIGNATURES, "TIFF")
    return next((kind for start, kind in starts.items() if head.startswith(start)), "")


def _raw(path: Path) -> ImageError:
    return ImageError(f"{path} is a camera's raw file: develop it first, and save it as TIFF or PNG.")


def _tiff(path: Path, file: BinaryIO) -> Header:
    """The first page that is neither reduced nor a mask, else the first such directory below the first page."""
    tiff = tags.Tags(file)
    pages = list(tiff.chain())
    if not pages:
        raise ValueError("it has no page")
    below = [tiff.directory(offset)[0] for offset in tiff.numbers(pages[0].get(tags.SUB_IFDS))[:100]]

    def first(entries: dict[int, tags.Entry], tag: int, default: int) -> int:
        return (tiff.numbers(entries.get(tag)) or (default,))[0]

    everywhere = [first(page, tags.PHOTOMETRIC, -1) for page in (*pages, *below)]
    if _CFA in everywhere or _LINEAR_RAW in everywhere or any(tags.DNG_VERSION in page for page in pages):
        raise _raw(path)
    whole, whole_below = (
        [index for index, page in enumerate(some) if not first(page, tags.NEW_SUBFILE_TYPE, 0) & (_REDUCED | _MASK)]
        for some in (pages, below)
    )
    page = whole[0] if whole else 0  # a file of reduced pages only: its first one
    subifd = -1 if whole or not whole_below else whole_below[0]
    used = below[subifd] if subifd >= 0 else pages[page]
    height, width, samples = first(used, 257, 0), first(used, 256, 0), max(1, first(used, 277, 1))
    size = _TIFF_RATIOS.get(first(used, 259, 1), 1 << 20) * file.seek(0, 2)
    _require_data(path, height, width, height * width * samples * first(used, tags.BITS, 1) // 8, size)
    return Header(
        "TIFF",
        page=page,
        subifd=subifd,
        pages=max(1, len(whole)),
        photometric=first(used, tags.PHOTOMETRIC, -1),
        bits=first(used, tags.BITS, 1),
        compression=first(used, 259, 1),
        extra_samples=tiff.numbers(used.get(tags.EXTRA_SAMPLES)),
        description=Description(exif=tags.descriptive_exif(tiff, used)),
    )


def png_chunk(name: bytes, data: bytes) -> bytes:
    """A chunk with its length and checksum."""
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def _png_chunks(path: Path, file: BinaryIO) -> bytes:
    """The chunks to be kept. The sum of the compressed pixels is compared with the size that the header announces."""
    kept, texts, packed, header = [], 0, 0, b""
    file.seek(8)
    while len(start := file.read(8)) == 8 and start[4:] != b"IEND":
        size = int.from_bytes(start[:4], "big")
        if size >= 1 << 31:
            raise ValueError("a chunk claims more than 2 GB")
        if start[4:] == b"IHDR":
            header = file.read(13)
            file.seek(size - len(header) + 4, 1)
            continue
        packed += size * (start[4:] == b"IDAT")
        if start[4:] in _KEPT_CHUNKS and texts + size <= _LARGEST_TEXTS:
            data = file.read(size)
            texts += size
            checksum = file.read(4)
            if not (start[4:] == b"iTXt" and data.startswith(b"XML:com.adobe.xmp\0")):
                chunk = png_chunk(start[4:], data)
                kept += [chunk] if chunk[-4:] == checksum else []
        else:
            file.seek(size + 4, 1)
    width, height, depth, color_type = struct.unpack(">IIBB", header[:10])
    least = height * width * depth * _COLOR_SAMPLES.get(color_type, 1) // 8
    _require_data(path, height, width, least, packed * _DEFLATE + 4096)
    announced = height * (1 + width * depth * _COLOR_SAMPLES.get(color_type, 4) // 8 + 1)
    # Incompressible data grow by five bytes a block of at least 1 kB; seven passes have up to eight times the rows.
    if packed > announced * 1.01 + 8 * height + (1 << 16):
        raise ImageError(f"{path} holds more data than its {width}x{height} pixels can need: it is refused.")
    return b"".join(kept)


def _require_data(path: Path, height: int, width: int, needed: int, most: int) -> None:
    """Refuse a header that announces more than the file can unpack to: buffers for it could exceed the memory."""
    if needed > most:
        raise ImageError(f"{path} is broken: its header announces {width}x{height} pixels, but its data end too early.")


def _jpeg_comment(path: Path, file: BinaryIO) -> bytes | None:
    """The first comment. The size of the file is compared with the size that the header announces."""
    comment = None
    size = file.seek(0, 2)
    for marker, data in _jpeg_segments(file):
        if marker in (0xC0, 0xC1, 0xC2) and len(data) >= 5:  # Huffman codes: a block of 8x8 pixels takes a bit at least
            height, width = struct.unpack_from(">HH", data, 1)
            _require_data(path, height, width, height * width, 8 * 64 * size)
        if marker == 0xFE and comment is None:
            comment = data
    return comment


def _jpeg_segments(file: BinaryIO) -> Iterator[tuple[int, bytes]]:
    """(marker, data) of the segments before the pixels."""
    file.seek(2)
    while len(start := file.read(4)) == 4 and start[0] == 0xFF and start[1] != 0xDA:
        size = int.from_bytes(start[2:], "big") - 2
        if start[1] == 0xFF or size < 0:
            return
        yield start[1], file.read(size)


def upright_xmp(xmp: bytes) -> bytes:
    """XMP that repeats the orientation, with the orientation 1."""
    return re.sub(rb"(tiff:Orientation(?:>|=\s*[\"']))[2-8]", rb"\g<1>1", xmp)
