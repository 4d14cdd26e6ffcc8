"""The pictures in a folder: one list of suffixes, hidden files in no list, everything else named."""

import os
from pathlib import Path

import pytest

from liif_fast.images import folders

PICTURES = ["a.PNG", "b.jfif", "c.tiff", "d.avif", "e.J2K", "f.ppm"]
OTHERS = ["g.cr2", "h.jxl", "i.pdf", "j.svg", "notes.txt", "png"]
HIDDEN = [".k.png", "._a.PNG", "Thumbs.db", "__MACOSX/a.PNG", ".cache/l.png"]
DEEP = ["sub.png/m.jpg", "sub.png/notes.md", "sub.png/deeper/n.webp", "out/o.png"]


@pytest.fixture
def tree(tmp_path):
    for name in (*PICTURES, *OTHERS, *HIDDEN, *DEEP):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    return tmp_path


def names(paths, root):
    return [path.relative_to(root).as_posix() for path in paths]


def test_one_folder(tree):
    listing = folders.list_pictures(tree)
    assert names(listing.pictures, tree) == PICTURES
    assert names(listing.left_out, tree) == sorted([*OTHERS, "sub.png", "out"])


def test_all_folders_but_one(tree):
    (tree / "sub.png" / "loop").symlink_to(tree, target_is_directory=True)
    listing = folders.list_pictures(str(tree), recursive=True, exclude=tree / "sub.png" / ".." / "out")
    assert names(listing.pictures, tree) == [*PICTURES, "sub.png/deeper/n.webp", "sub.png/m.jpg"]
    assert names(listing.left_out, tree) == sorted([*OTHERS, "sub.png/loop", "sub.png/notes.md"])
    assert "out" not in names(folders.list_pictures(tree, exclude=tree / "out").left_out, tree)


def test_links_and_pipes(tmp_path):
    (tmp_path / "broken.png").symlink_to("nothere.png")
    os.mkfifo(tmp_path / "pipe.png")
    assert folders.list_pictures(tmp_path) == ([tmp_path / "broken.png"], [tmp_path / "pipe.png"])


def test_folders_that_cannot_be_read(tree, monkeypatch):
    listed = Path.iterdir

    def refused(path):
        if path.name == "deeper":
            raise PermissionError(13, "Permission denied", str(path))
        return listed(path)

    monkeypatch.setattr(Path, "iterdir", refused)  # instead of permissions, which do not restrict root
    assert tree / "sub.png" / "deeper" in folders.list_pictures(tree, recursive=True).left_out
    with pytest.raises(PermissionError):
        folders.list_pictures(tree / "sub.png" / "deeper")
    with pytest.raises(FileNotFoundError):
        folders.list_pictures(tree / "nothere")
