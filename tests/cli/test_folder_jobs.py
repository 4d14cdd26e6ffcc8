"""Folder jobs and pipes: what is taken, what it becomes, and how a stopped job goes on."""

import io
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from liif_fast.images import files
from liif_fast.images.upscaling import upscale
from tests.cli.conftest import H, W, sentence


def test_folders(run, photo, tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    shutil.copy(photo, folder / "b.PNG")
    Image.open(photo).save(folder / "a.bmp")
    Image.open(photo).save(folder / ".hidden.png")
    (folder / "notes.txt").write_text("no image")
    (folder / "sub.png").mkdir()
    code, printed, error = run(folder, "-o", tmp_path / "out" / "deep", "--scale", "2")
    assert (code, printed.count("\n")) == (0, 2)
    left_out = "1 file of other kinds (.txt): notes.txt; 1 subfolder (see --recursive): sub.png"
    assert sentence(error) == f"liif-fast: left out of {folder}: {left_out}.\n"
    assert sorted(os.listdir(tmp_path / "out" / "deep")) == ["a.png", "b.PNG"]


@pytest.fixture
def tree(photo, tmp_path):
    """in/a.png, in/sub/b.jpg and in/sub/deeper/c.ppm."""
    for name in ("a.png", "sub/b.jpg", "sub/deeper/c.ppm"):
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.open(photo).save(tmp_path / "in" / name)
    return tmp_path / "in"


def found(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ([], ["a.png", "sub/b.jpg", "sub/deeper/c.png"]),
        (["--format", "webp"], ["a.webp", "sub/b.webp", "sub/deeper/c.webp"]),
        (["--format", "tif", "--suffix", "_x2"], ["a_x2.tif", "sub/b_x2.tif", "sub/deeper/c_x2.tif"]),
    ],
)
def test_subfolders_formats_and_suffixes(run, tree, options, names):
    out = tree / "sub" / "out"  # inside of the input, and not walked by the second run
    for more in ([], ["--skip-existing"]):
        code, printed, error = run(tree, "-o", out, "--recursive", "--scale", "2", *options, *more)
        assert (code, error, found(out)) == (0, "", names)
        for name in names:
            with Image.open(out / name) as image:
                assert image.size == (2 * W, 2 * H)
                assert files.FORMATS[Path(name).suffix].lower() == image.format.lower()
    assert printed == "skipped 3 of 3 images, whose outputs exist\n"


def test_a_stopped_job_goes_on(run, tree):
    assert run(tree, "-o", tree, "--recursive", "--scale", "1", "--suffix", "_x1")[0] == 0
    (tree / "sub" / "b_x1.jpg").unlink()
    code, printed, _ = run(tree, "-o", tree, "--recursive", "--scale", "1", "--suffix", "_x1", "--skip-existing")
    assert (code, printed.splitlines()[0]) == (0, "skipped 2 of 3 images, whose outputs exist")
    assert len(found(tree)) == 6, "results in the same folder are no inputs"
    code, _, error = run(tree, "-o", tree, "--scale", "1", "--suffix", "_x1")
    assert code == 1 and "a_x1.png exists already" in error


def test_many_left_out_files_are_counted(run, tree):
    for number in range(7):
        (tree / f"IMG_{number}.{'CR2' if number % 2 else 'mov'}").touch()
    error = run(tree, "-o", tree / "sub", "--scale", "1")[2]
    names = ", ".join(f"IMG_{number}.{'CR2' if number % 2 else 'mov'}" for number in range(5))
    assert sentence(error).endswith(f"left out of {tree}: 7 files of other kinds (.cr2, .mov): {names} and 2 more.\n")


class Stream(io.BytesIO):
    """A standard stream that is a pipe or a terminal; `buffer` is the bytes, as in sys.stdin."""

    terminal, name = False, "<pipe>"
    buffer = property(lambda self: self)

    def isatty(self):
        return self.terminal


def test_pipes(run, photo, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", Stream(photo.read_bytes()))
    out = Stream()
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", out)
        code, _, error = run("-", "-o", "-", "--scale", "2", "--format", "png", "--model", "tiny")
    assert (code, error.split(" in ")[0]) == (0, "<pipe> (9x6) -> <pipe> (18x12)")
    with Image.open(out) as image:
        np.testing.assert_array_equal(np.asarray(image), upscale(np.asarray(Image.open(photo)), scale=2, model="tiny"))
    for stdin, stdout, arguments, message in (
        (False, False, ["-", "-o", "-"], "add --format, such as --format png: a pipe has no name"),
        (False, True, ["-", "-o", "-", "--format", "png"], "stdout is a terminal, which cannot show a picture"),
        (True, False, ["-", "-o", tmp_path / "o.png"], "stdin is a terminal: pipe a picture into it"),
        (False, False, ["-", photo, "-o", tmp_path], "a pipe (-) holds one picture"),
        (False, False, [tmp_path, "-o", "-", "--format", "png"], "a pipe (-) holds one picture"),
        (False, False, ["-", "-o", tmp_path], "is a folder: a picture from a pipe has no name"),
        (False, False, ["-", "-o", tmp_path / "o.png"], "is not an image"),
    ):
        monkeypatch.setattr(sys, "stdin", Stream(b"no picture"))
        sys.stdin.terminal = stdin
        monkeypatch.setattr(sys.stdout, "isatty", lambda stdout=stdout: stdout)
        code, printed, error = run(*arguments, "--scale", "2")
        assert (code, printed) == (1, "") and message in sentence(error), error


@pytest.mark.parametrize("name", ["r\u00e9sum\u00e9 \u2192.png", "undecodable-\udcff.png"])
@pytest.mark.parametrize("encoding", ["ascii", "utf-8"])
def test_names_that_a_terminal_cannot_show(run, photo, tmp_path, monkeypatch, name, encoding):
    os.mkdir(tmp_path / "in")
    shutil.copy(photo, tmp_path / "in" / name)
    (tmp_path / "in" / f"{name}.txt").touch()
    streams = [io.TextIOWrapper(io.BytesIO(), encoding) for _ in range(2)]
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", streams[0])
        patch.setattr(sys, "stderr", streams[1])
        code = run(tmp_path / "in", "-o", tmp_path / "out", "--scale", "2")[0]
    assert (code, os.listdir(tmp_path / "out")) == (0, [name])
    shown = [stream.buffer.getvalue().decode(encoding) for stream in streams]
    expected = name.encode(encoding, "backslashreplace").decode(encoding)
    assert f"{expected} (9x6) -> " in shown[0] and f"other kinds (.txt): {expected}.txt" in shown[1]


def test_a_file_into_a_folder(run, photo, tmp_path):
    assert run(photo, "-o", f"{tmp_path}/new/", "--scale", "2")[0] == 0
    assert os.listdir(tmp_path / "new") == ["photo.png"]
    (tmp_path / "there").mkdir()
    assert run(photo, "-o", tmp_path / "there", "--scale", "2")[0] == 0
    assert os.listdir(tmp_path / "there") == ["photo.png"]
