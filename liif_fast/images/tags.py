"""The tags of TIFF files and of EXIF blocks, which have the same layout (TIFF 6.0, section 2; BigTIFF).

Values are read only when they are asked for and never beyond a limit, because a hostile file can claim any size.
"""

from __future__ import annotations

import io
import struct
from collections.abc import Iterator
from typing import Any, BinaryIO, NamedTuple

SIGNATURES = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
ORIENTATION, NEW_SUBFILE_TYPE, PHOTOMETRIC, BITS, EXTRA_SAMPLES, SUB_IFDS, DNG_VERSION = (
    274,
    254,
    262,
    258,
    338,
    330,
    50706,
)
XMP, PHOTOSHOP, RESOLUTION = 700, 34377, (282, 283, 296)
_POINTERS = (0x8769, 0x8825, 0xA005)  # the directories of EXIF, GPS and interoperability
_PIXEL_DIMENSIONS = (0xA003, 0xA002)  # rows, columns
_THUMBNAIL = (0x0201, 0x0202)  # offset, length

# Tags of a TIFF file that are still true of an enlarged picture: texts, ratings, and EXIF's own directories.
_DESCRIPTIVE = frozenset(
    (0x010D, 0x010E, 0x010F, 0x0110, 0x011D, 0x0131, 0x0132, 0x013B, 0x013C, 0x4746, 0x4749, 0x8298, *_POINTERS)
) | frozenset(range(0x9C9B, 0x9CA0))
# Tags that describe how a file stores its pixels.
_STRUCTURAL = frozenset((*range(254, 267), 273, 274, *range(277, 282), 284, *range(317, 331), *range(338, 348)))
_STRUCTURAL |= frozenset((*range(512, 522), *range(529, 533), 700, 33723, 34377, 34675))

_SIZES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4, 16: 8, 17: 8, 18: 8}
_UNITS = {**_SIZES, 5: 4, 10: 4}  # the bytes whose order depends on the file
_NUMBERS = {1: "B", 3: "H", 4: "I", 13: "I", 16: "Q", 18: "Q"}
_MOST_BYTES = 1 << 26  # of all values that are read from a file: tags can point to the same bytes
_MOST_TAGS = 1 << 18  # of all pages

Values = dict[int, Any]  # tag -> (type, bytes), or the Values of another directory


class Entry(NamedTuple):
    """Where a value lies."""

    kind: int
    number: int
    position: int


class Tags:
    """The directories of a TIFF file or an EXIF block.

    Raises: ValueError for a file of another kind; struct.error where a file ends too early.
    """

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.unread = _MOST_BYTES
        head = self._bytes(0, 16)
        if head[:4] not in SIGNATURES:
            raise ValueError("it does not begin as a TIFF")
        self.order = "<" if head[:2] == b"II" else ">"
        self.big = b"+" in head[:4]
        self.first_position = 8 if self.big else 4
        (self.first,) = self._unpack("Q" if self.big else "I", self.first_position)

    def chain(self) -> Iterator[dict[int, Entry]]:
        """The directories that follow each other, without an endless loop; ValueError for too many tags."""
        offset, seen, tags = self.first, set[int](), 0
        while offset and offset not in seen:
            seen.add(offset)
            entries, following = self.directory(offset)
            tags += 1 + (following - offset) // 12
            if tags > _MOST_TAGS:
                raise ValueError(f"it has more than {_MOST_TAGS} tags")
            yield entries
            (offset,) = self._unpack("Q" if self.big else "I", following)

    def directory(self, offset: int) -> tuple[dict[int, Entry], int]:
        """The entries at an offset, and the position of the next directory's offset."""
        count_format, entry_size, inline = ("Q", 20, 8) if self.big else ("H", 12, 4)
        (count,) = self._unpack(count_format, offset)
        start = offset + struct.calcsize(count_format)
        if count > 65535:
            raise ValueError(f"a directory claims {count} tags")
        entries: dict[int, Entry] = {}
        table = self._bytes(start, count * entry_size)
        for index in range(len(table) // entry_size):
            tag, kind, number = struct.unpack_from(
                self.order + ("HHQ" if self.big else "HHI"), table, index * entry_size
            )
            position = start + (index + 1) * entry_size - inline
            if number * _SIZES.get(kind, 1) > inline:
                (position,) = self._unpack("Q" if self.big else "I", position)
            entries.setdefault(tag, Entry(kind, number, position))
        return entries, start + count * entry_size

    def value(self, entry: Entry) -> bytes:
        """The bytes of a value, in the file's order; raises ValueError for an unknown type or an unlikely size."""
        size = entry.number * _SIZES.get(entry.kind, 0)
        self.unread -= size
        data = self._bytes(entry.position, size) if self.unread >= 0 else b""
        if not size or len(data) < size:
            raise ValueError(f"a tag of type {entry.kind} claims {entry.number} values")
        return data

    def numbers(self, entry: Entry | None) -> tuple[int, ...]:
        """The whole numbers of a value; () if there are none."""
        if entry is None or entry.kind not in _NUMBERS or not 0 < entry.number <= 1000:
            return ()
        return struct.unpack(f"{self.order}{entry.number}{_NUMBERS[entry.kind]}", self.value(entry))

    def values(self, entries: dict[int, Entry], order: str, depth: int = 0) -> Values:
        """The values of entries in another byte order, with the directories that they point to."""
        found: Values = {}
        for tag, entry in sorted(entries.items()):
            try:
                if tag in _POINTERS and depth < 3:
                    found[tag] = self.values(self.directory(self.numbers(entry)[0])[0], order, depth + 1)
                else:
                    found[tag] = entry.kind, self._ordered(self.value(entry), _UNITS[entry.kind], order)
            except (ValueError, IndexError, struct.error):
                continue  # one broken tag must not cost the others
        return found

    def _ordered(self, data: bytes, unit: int, order: str) -> bytes:
        if order == self.order or unit == 1:
            return data
        return b"".join(data[i : i + unit][::-1] for i in range(0, len(data), unit))

    def _bytes(self, position: int, size: int) -> bytes:
        if position >= 1 << 62:
            raise ValueError("a tag lies beyond the end of the file")
        self.file.seek(position)
        return self.file.read(size)

    def _unpack(self, layout: str, position: int) -> tuple[int, ...]:
        layout = self.order + layout
        return struct.unpack(layout, self._bytes(position, struct.calcsize(layout)))


def descriptive_exif(tags: Tags, entries: dict[int, Entry]) -> bytes | None:
    """The descriptive tags of a TIFF's page as an EXIF block."""
    kept = tags.values({tag: entry for tag, entry in entries.items() if tag in _DESCRIPTIVE}, "<")
    return b"II*\0\x08\0\0\0" + _packed(kept, "<", False, 8) if kept else None


def cleaned_exif(exif: bytes, size: tuple[int, int] | None = None) -> bytes | None:
    """An EXIF block with the orientation 1 and without a thumbnail, otherwise byte for byte; None for a broken block.

    size: rows and columns of the picture, for the tags that repeat them.
    """
    data = bytearray(exif.removeprefix(b"Exif\0\0"))
    try:
        tags = Tags(io.BytesIO(bytes(data)))
        entries, following = tags.directory(tags.first)
        (thumbnail,) = tags._unpack("I", following)
        changes: list[tuple[Entry | None, int]] = [(entries.get(ORIENTATION), 1)]
        if size and (pointer := tags.numbers(entries.get(_POINTERS[0]))):
            details, _ = tags.directory(pointer[0])
            changes += [(details.get(tag), side) for tag, side in zip(_PIXEL_DIMENSIONS, size, strict=True)]
        for entry, number in changes:
            if entry and entry.number == 1 and entry.kind in (3, 4) and number < 1 << (8 * _SIZES[entry.kind]):
                struct.pack_into(tags.order + _NUMBERS[entry.kind], data, entry.position, number)
        if thumbnail:
            struct.pack_into(tags.order + "I", data, following, 0)
            place = [tags.numbers(tags.directory(thumbnail)[0].get(tag)) for tag in _THUMBNAIL]
            if all(place) and place[0][0] + place[1][0] >= len(data) > place[0][0] >= following + 4:
                del data[place[0][0] :]
    except (ValueError, struct.error):
        return None
    return bytes(data)


def add_to_tiff(file: BinaryIO, exif: bytes | None, own: Values, density: bool) -> None:
    """Give the first page of a TIFF file the tags of an EXIF block and `own` ones; without `density` it loses that.

    The page's directory is written again at the end of the file.
    """
    tags = Tags(file)
    page = tags.values(tags.directory(tags.first)[0], tags.order)
    described: Values = {}
    if exif:
        block = Tags(io.BytesIO(exif))
        described = block.values(block.directory(block.first)[0], tags.order)
    kept = {tag: value for tag, value in described.items() if tag not in _STRUCTURAL}
    merged = {**kept, **page, **own}
    for tag in () if density else RESOLUTION:
        del merged[tag]
    end = file.seek(0, io.SEEK_END)
    start = end + end % 2
    file.write(b"\0" * (end % 2) + _packed(merged, tags.order, tags.big, start))
    file.seek(tags.first_position)
    file.write(struct.pack(tags.order + ("Q" if tags.big else "I"), start))


def _packed(values: Values, order: str, big: bool, start: int) -> bytes:
    """A directory that will lie at `start`, followed by its values and by other directories."""
    count_format, entry_format, word = ("Q", "HHQ", "Q") if big else ("H", "HHI", "I")
    inline = struct.calcsize(word)
    table = struct.pack(order + count_format, len(values))
    behind = start + len(table) + len(values) * (4 + 2 * inline) + inline
    rest = b""
    for tag, value in sorted(values.items()):
        if isinstance(value, dict):
            kind, count, data = 4, 1, b""
            field = struct.pack(order + "I", behind + len(rest)).ljust(inline, b"\0")
            data = _packed(value, order, big, behind + len(rest))
        else:
            kind, data = value
            count = len(data) // _SIZES[kind]
            field = data.ljust(inline, b"\0")
            if len(data) > inline:
                field = struct.pack(order + word, behind + len(rest))
            else:
                data = b""
        table += struct.pack(order + entry_format, tag, kind, count) + field
        rest += data + b"\0" * (len(data) % 2)
    return table + b"\0" * inline + rest
