"""The pictures in a folder: one list of what is a picture, for upscaling, training and evaluation."""

from __future__ import annotations

import os
from importlib import util
from pathlib import Path
from typing import NamedTuple

_LIBVIPS = "png apng jpg jpeg jpe jfif mpo webp tif tiff gif avif"
_PILLOW = "bmp dib ppm pgm pbm pnm pfm tga icb vda vst jp2 j2k j2c jpc jpf jpx ico icns pcx psd qoi sgi dds xbm xpm"
_PILLOW_HEIF = "heic heif hif" if util.find_spec("pillow_heif") else ""  # the extra `heic`

# The suffixes of pictures, in lower case. Contents decide how a file is read; camera raw, PDF and SVG are no pictures.
SUFFIXES = frozenset(f".{each}" for each in f"{_LIBVIPS} {_PILLOW} {_PILLOW_HEIF}".split())
_HIDDEN = ("__macosx", "thumbs.db", "desktop.ini")  # in lower case; other systems hide these names


class Listing(NamedTuple):
    """The contents of a folder.

    pictures: files with a suffix of `SUFFIXES`, in order of name.
    left_out: files of other kinds, and folders that were not entered, in order of name.
    Hidden files and folders, such as macOS's `._photo.jpg` and `__MACOSX`, are in neither list.
    """

    pictures: list[Path]
    left_out: list[Path]


def list_pictures(
    folder: str | os.PathLike[str], recursive: bool = False, exclude: str | os.PathLike[str] | None = None
) -> Listing:
    """The pictures of a folder; a folder whose name ends like a picture's is a folder.

    recursive: enter subfolders too, but not through symbolic links, which may lead back.
    exclude: a subfolder that is in neither list, such as the one that results are written to.
    Raises OSError for a folder that cannot be read. A subfolder that cannot be read is left out.
    """
    top = Path(folder)
    excluded = None if exclude is None else Path(exclude).resolve()
    pictures: list[Path] = []
    left_out: list[Path] = []
    folders = [top]
    for place in folders:  # the loop adds to it
        try:
            entries = [path for path in place.iterdir() if not is_hidden(path)]
        except PermissionError:
            if place == top:
                raise
            left_out.append(place)
            continue
        for path in entries:
            if path.is_dir():
                enter = recursive and not path.is_symlink()
                if path.resolve() != excluded:
                    (folders if enter else left_out).append(path)
            else:
                # A broken link counts as a picture, so that reading it reports it. Reading a named pipe would wait.
                readable = path.is_file() or not path.exists()
                (pictures if readable and path.suffix.lower() in SUFFIXES else left_out).append(path)
    return Listing(sorted(pictures), sorted(left_out))


def is_hidden(path: Path) -> bool:
    """Whether Unix, macOS or Windows hides a file or folder of this name."""
    return path.name.startswith(".") or path.name.lower() in _HIDDEN
