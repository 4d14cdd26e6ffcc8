"""PNG files with 16 bits a sample, which Pillow reads and writes only for grey.

Layout, filters and interlacing follow the PNG specification (W3C, third edition, sections 7, 9 and 11). Undoing a
filter, a byte waits for its left, upper and upper-left neighbours; everything on one anti-diagonal is independent, and
one numpy operation handles it. That keeps a 16-megapixel file at seconds.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from typing import BinaryIO

import numpy as np

SIGNATURE = b"\x89PNG\r\n\x1a\n"

# Colour type of IHDR -> samples a pixel, and back.
_SAMPLES = {0: 1, 2: 3, 4: 2, 6: 4}
_COLOUR_TYPE = {samples: kind for kind, samples in _SAMPLES.items()}

# Adam7: first row, first column, row step, column step of the seven passes.
_PASSES = ((0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1))

_PAETH = 4
_IDAT_BYTES = 1 << 20
_COMPRESSION_LEVEL = 4


def is_png16(head: bytes) -> bool:
    """Whether the first 33 bytes of a file announce a PNG with 16 bits a sample."""
    return head[:8] == SIGNATURE and head[12:16] == b"IHDR" and head[24:25] == b"\x10"


def decode(file: BinaryIO) -> np.ndarray:
    """Read the pixels of a 16-bit PNG.

    A tRNS colour becomes an alpha channel: 0 where the pixel has that colour, 65535 elsewhere.

    Returns: uint16 [H, W, samples], samples = 1 (grey), 2 (grey, alpha), 3 (RGB) or 4 (RGB, alpha).
    Raises: ValueError with the reason when the file is broken.
    """
    header = b""
    transparent: tuple[int, ...] | None = None
    packed = []
    for kind, data in _chunks(file):
        if kind == b"IHDR":
            header = data
        elif kind == b"tRNS":
            transparent = struct.unpack(f">{len(data) // 2}H", data)
        elif kind == b"IDAT":
            packed.append(data)
    width, height, depth, colour_type, _, _, interlaced = struct.unpack(">IIBBBBB", header)
    if depth != 16 or colour_type not in _SAMPLES or interlaced not in (0, 1) or 0 in (width, height):
        raise ValueError("its header is not that of a 16-bit PNG")
    samples = _SAMPLES[colour_type]
    try:
        raw = zlib.decompress(b"".join(packed))
    except zlib.error as error:
        raise ValueError(f"its compressed pixels are broken ({error})") from error
    pixels = np.empty((height, width, samples), np.uint16)
    start = 0
    for top, left, down, right in _PASSES if interlaced else ((0, 0, 1, 1),):
        part = pixels[top::down, left::right]
        if part.size:
            rows, stride = part.shape[0], 1 + part.shape[1] * samples * 2
            if start + rows * stride > len(raw):
                raise ValueError("its pixels end too early")
            filtered = np.frombuffer(raw, np.uint8, rows * stride, start).reshape(rows, stride)
            part[:] = _unfilter(filtered, samples * 2).view(">u2").reshape(part.shape)
            start += rows * stride
    if transparent is not None and len(transparent) == samples and samples in (1, 3):
        opaque = (pixels != np.array(transparent, np.uint16)).any(-1, keepdims=True)
        pixels = np.concatenate([pixels, opaque * np.uint16(65535)], -1)
    return pixels


def encode(file: BinaryIO, pixels: np.ndarray, *, icc_profile: bytes | None = None, exif: bytes | None = None) -> None:
    """Write a 16-bit PNG, row band by row band.

    Args:
        file: open for writing in binary mode.
        pixels: uint16 [H, W, samples], samples as in `decode`.
        icc_profile: kept in an iCCP chunk.
        exif: kept in an eXIf chunk, without a leading ``Exif\\0\\0``.
    """
    height, width, samples = pixels.shape
    file.write(SIGNATURE)
    _write_chunk(file, b"IHDR", struct.pack(">IIBBBBB", width, height, 16, _COLOUR_TYPE[samples], 0, 0, 0))
    if icc_profile:
        _write_chunk(file, b"iCCP", b"ICC Profile\0\0" + zlib.compress(icc_profile))
    if exif:
        _write_chunk(file, b"eXIf", exif.removeprefix(b"Exif\0\0"))
    compressor = zlib.compressobj(_COMPRESSION_LEVEL)
    previous = np.zeros(width * samples * 2, np.uint8)
    rows = max(1, _IDAT_BYTES // previous.size)
    for top in range(0, height, rows):
        band = pixels[top : top + rows].astype(">u2").view(np.uint8).reshape(-1, previous.size)
        _write_chunk(file, b"IDAT", compressor.compress(_filter(band, previous, samples * 2)))
        previous = band[-1]
    _write_chunk(file, b"IDAT", compressor.flush())
    _write_chunk(file, b"IEND", b"")


def _chunks(file: BinaryIO) -> Iterator[tuple[bytes, bytes]]:
    if file.read(8) != SIGNATURE:
        raise ValueError("it does not begin like a PNG")
    kind = b""
    while kind != b"IEND":
        head = file.read(8)
        if len(head) < 8:
            raise ValueError("the file ends too early")
        length, kind = struct.unpack(">I4s", head)
        data, checksum = file.read(length), file.read(4)
        if len(data) < length or len(checksum) < 4:
            raise ValueError("the file ends too early")
        if zlib.crc32(kind + data) != struct.unpack(">I", checksum)[0]:
            raise ValueError(f"the checksum of its {kind.decode('latin-1')} chunk is wrong")
        yield kind, data


def _write_chunk(file: BinaryIO, kind: bytes, data: bytes) -> None:
    if data or kind != b"IDAT":
        file.write(struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)))


def _paeth(left: np.ndarray, up: np.ndarray, upper_left: np.ndarray) -> np.ndarray:
    """The Paeth predictor (section 9.4) of three int16 arrays."""
    rise, run = up - upper_left, left - upper_left
    to_left, to_up, to_upper_left = np.abs(rise), np.abs(run), np.abs(rise + run)
    nearest_is_left = (to_left <= to_up) & (to_left <= to_upper_left)
    return np.where(nearest_is_left, left, np.where(to_up <= to_upper_left, up, upper_left))


def _filter(band: np.ndarray, previous: np.ndarray, pixel_bytes: int) -> bytes:
    """Paeth-filter rows [rows, bytes] that follow the row `previous`, each led by its filter's number."""
    rows, length = band.shape
    padded = np.zeros((rows + 1, pixel_bytes + length), np.int16)
    padded[0, pixel_bytes:] = previous
    padded[1:, pixel_bytes:] = band
    guess = _paeth(padded[1:, :length], padded[:-1, pixel_bytes:], padded[:-1, :length])
    out = np.full((rows, 1 + length), _PAETH, np.uint8)
    out[:, 1:] = (band - guess).astype(np.uint8)
    return out.tobytes()


def _unfilter(filtered: np.ndarray, pixel_bytes: int) -> np.ndarray:
    """Undo the row filters of [rows, 1 + bytes], the first byte of a row being its filter's number -> [rows, bytes]."""
    kinds, rows, columns = filtered[:, 0], filtered.shape[0], (filtered.shape[1] - 1) // pixel_bytes
    if kinds.max() > _PAETH:
        raise ValueError(f"it uses the unknown row filter {kinds.max()}")
    # One row and one column of zeros around the picture stand for the neighbours outside it.
    out = np.zeros((rows + 1, columns + 1, pixel_bytes), np.uint8)
    out[1:, 1:] = filtered[:, 1:].reshape(rows, columns, pixel_bytes)
    # Neighbours on an anti-diagonal (row + 1, column - 1) lie `columns` pixels apart, so a diagonal is a slice.
    flat = out.reshape(-1, pixel_bytes)
    for diagonal in range(rows + columns - 1):
        first = max(0, diagonal - columns + 1)
        last = min(rows - 1, diagonal)
        start = (first + 1) * (columns + 1) + diagonal - first + 1
        here, left, up, upper_left = (
            flat[start + offset :: columns][: last - first + 1] for offset in (0, -1, -columns - 1, -columns - 2)
        )
        left, up, upper_left = (neighbour.astype(np.int16) for neighbour in (left, up, upper_left))
        kind = kinds[first : last + 1, None]
        guess = np.select(
            [kind == 1, kind == 2, kind == 3, kind == _PAETH],
            [left, up, (left + up) >> 1, _paeth(left, up, upper_left)],
            default=np.int16(0),
        )
        here += guess.astype(np.uint8)
    return np.ascontiguousarray(out[1:, 1:]).reshape(rows, -1)
