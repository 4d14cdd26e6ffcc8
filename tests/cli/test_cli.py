"""`liif-fast`: files in, files out; an error is one sentence and an exit code, and leaves no incomplete file."""

import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import liif_fast
from liif_fast.cli import demo, main
from liif_fast.images import files, upscaling, writing
from liif_fast.images.picture import Picture
from liif_fast.images.upscaling import upscale
from liif_fast.models import checkpoints
from liif_fast.utils import memory
from tests.models import small_models

H, W = 6, 9


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "small.safetensors"
    checkpoints.save(small_models.liif().float(), path)
    return str(path)


@pytest.fixture
def photo(tmp_path):
    values = np.random.default_rng(0).integers(0, 256, (H, W, 3), dtype=np.uint8)
    path = tmp_path / "photo.png"
    Image.fromarray(values).save(path)
    return path


@pytest.fixture
def run(weights, capsys, monkeypatch):
    """Runs `liif-fast upscale` on arguments -> (exit code, stdout, stderr)."""
    threads, largest = torch.get_num_threads(), Image.MAX_IMAGE_PIXELS
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", largest)

    def run(*arguments, model=weights, command="upscale"):
        chosen = ["--model", model] if command == "upscale" and "--model" not in arguments else []
        try:
            code = main.main([command, *map(str, arguments), *chosen])
        except SystemExit as end:
            code = end.code
        finally:
            torch.set_num_threads(threads)
        return (code, *capsys.readouterr())

    return run


def sentence(error):
    """stderr, after a check that it is one sentence and no traceback."""
    assert error.startswith("liif-fast") and error.endswith(".\n"), error
    assert error.count("\n") == 1 and "Traceback" not in error, error
    return error


@pytest.mark.parametrize(
    ("options", "size"),
    [(["--scale", "2"], (12, 18)), (["--scale", "2x3"], (12, 27)), (["--scale", "3.7"], (22, 33)),
     (["--scale", "0.5"], (3, 4)), (["--size", "10x7"], (10, 7))],
)  # fmt: skip
def test_one_file(run, photo, weights, tmp_path, options, size):
    out = tmp_path / "out.png"
    code, printed, error = run(photo, "-o", out, *options)
    assert (code, error) == (0, "")
    assert re.fullmatch(rf"{photo} \(6x9\) -> {out} \({size[0]}x{size[1]}\) in \d+\.\d s\n", printed)
    expected = upscale(np.asarray(Image.open(photo)), size=size, model=weights)
    np.testing.assert_array_equal(np.asarray(Image.open(out)), expected)


def test_without_a_model_the_shipped_one_is_used(photo, tmp_path):
    assert main.main(["upscale", str(photo), "-o", str(tmp_path / "out.png"), "--scale", "2"]) == 0
    np.testing.assert_array_equal(
        np.asarray(Image.open(tmp_path / "out.png")), upscale(np.asarray(Image.open(photo)), scale=2)
    )


@pytest.mark.parametrize(("suffix", "kind"), [(".png", "PNG"), (".jpg", "JPEG"), (".webp", "WEBP"), (".tif", "TIFF")])
def test_formats(run, photo, tmp_path, suffix, kind):
    assert run(photo, "-o", tmp_path / f"out{suffix}", "--scale", "2", "--quality", "80")[0] == 0
    with Image.open(tmp_path / f"out{suffix}") as out:
        assert (out.format, out.size) == (kind, (2 * W, 2 * H))


def test_depth_alpha_and_orientation_arrive(run, tmp_path):
    values = np.random.default_rng(0).integers(0, 65536, (H, W, 4), dtype=np.uint16)
    files.write(Picture(values[..., :3].copy(), values[..., 3].copy()), tmp_path / "deep.png")
    assert run(tmp_path / "deep.png", "-o", tmp_path / "out.tif", "--scale", "2")[0] == 0
    read = files.read(tmp_path / "out.tif")
    assert (read.bit_depth, read.channels, read.height) == (16, 4, 2 * H)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("L", (W, H)).save(tmp_path / "turned.jpg", exif=exif)
    assert run(tmp_path / "turned.jpg", "-o", tmp_path / "out.jpg", "--scale", "2")[0] == 0
    with Image.open(tmp_path / "out.jpg") as out:
        assert (out.mode, out.size) == ("L", (2 * H, 2 * W))
        assert out.getexif().get(0x0112, 1) == 1


def test_folders(run, photo, tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    shutil.copy(photo, folder / "b.PNG")
    Image.open(photo).save(folder / "a.bmp")
    Image.open(photo).save(folder / ".hidden.png")
    (folder / "notes.txt").write_text("no image")
    (folder / "sub.png").mkdir()
    code, printed, error = run(folder, "-o", tmp_path / "out" / "deep", "--scale", "2")
    assert (code, error) == (0, "")
    assert printed.count("\n") == 2
    assert sorted(os.listdir(tmp_path / "out" / "deep")) == ["a.png", "b.PNG"]


def test_a_file_into_a_folder(run, photo, tmp_path):
    assert run(photo, "-o", f"{tmp_path}/new/", "--scale", "2")[0] == 0
    assert os.listdir(tmp_path / "new") == ["photo.png"]
    (tmp_path / "there").mkdir()
    assert run(photo, "-o", tmp_path / "there", "--scale", "2")[0] == 0
    assert os.listdir(tmp_path / "there") == ["photo.png"]


def test_files_that_cannot_be_read_do_not_stop_the_others(run, photo, tmp_path):
    (tmp_path / "text.png").write_text("no image")
    (tmp_path / "cut.png").write_bytes(photo.read_bytes()[:100])
    shutil.copy(photo, tmp_path / "good.png")
    others = [tmp_path / name for name in ("text.png", "nothere.png", "cut.png", "good.png")]
    code, printed, error = run(photo, *others, "-o", tmp_path / "out", "--scale", "2")
    assert (code, printed.count("\n")) == (1, 2)
    assert sorted(os.listdir(tmp_path / "out")) == ["good.png", "photo.png"]
    *reasons, total = error.splitlines()
    messages = ("text.png is not an image", "nothere.png does not exist", "cut.png is broken or of a kind that is not")
    assert all(message in sentence(f"{reason}\n") for message, reason in zip(messages, reasons, strict=True))
    assert total == "liif-fast: 3 of 5 images failed."
    assert run(tmp_path / "cut.png", "-o", tmp_path / "out.png", "--scale", "2") == (1, "", f"{reasons[2]}\n")
    assert not (tmp_path / "out.png").exists()


NO_SCALE = "is not a positive number such as 3.7, nor two such as 2x3"
NO_SIZE = "is not rows x columns such as 1080x1920"


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        *(("scale", v, NO_SCALE) for v in ("0", "-1", "nan", "inf", "two", "", "2x", "2x3x4", "2x0", "1e999")),
        *(("size", v, NO_SIZE) for v in ("0x5", "5", "-5x5", "5x5x5", "5.5x5", "axb")),
    ],
)
def test_scales_and_sizes_that_are_refused(run, photo, tmp_path, option, value, message):
    code, printed, error = run(photo, "-o", tmp_path / "out.png", f"--{option}={value}")
    assert (code, printed) == (2, "")
    assert f"'{value}' {message}" in sentence(error)


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        ([], 2, "one of the arguments --scale --size is required"),
        (["--scale", "2", "--size", "5x5"], 2, "not allowed with argument"),
        (["--scale", "2", "--backend", "abacus"], 2, "invalid choice: 'abacus' (choose from"),
        (["--scale", "2", "--dtype", "int3"], 2, "invalid choice: 'int3' (choose from"),
        (["--scale", "2", "--threads", "0"], 2, "'0' is not a whole number from 1"),
        (["--scale", "2", "--memory", "lots"], 2, "'lots' is not a whole number from 1"),
        (["--scale", "2", "--quality", "101"], 1, "The quality is 101, but must be between 1 and 100"),
        (["--scale", "2", "--device", "abacus"], 1, "device 'abacus' cannot be used here"),
        (["--scale", "2", "--device", "cuda:99"], 1, "device 'cuda:99' cannot be used here"),
        (["--scale", "2", "--model", "nothere.pth"], 1, "nothere.pth does not exist"),
        (["--scale", "2", "--model", demo.PHOTO], 1, "demo.png is not a model"),
        (["--scale", "1e17"], 1, "out.png cannot be"),
    ],
)
def test_options_that_are_refused(run, photo, tmp_path, monkeypatch, options, code, message):
    monkeypatch.setattr(memory, "available", lambda: None)
    found, printed, error = run(photo, "-o", tmp_path / "out.png", *options)
    assert (found, printed) == (code, "")
    assert message in sentence(error)
    assert os.listdir(tmp_path) == ["photo.png"]


def test_results_beyond_memory_are_refused(run, photo, tmp_path):
    code, _, error = run(photo, "-o", tmp_path / "out.png", "--scale", "1e6")
    assert code == 1
    assert re.search(
        r"The 6000000x9000000 result of .*photo\.png needs about 540 TB of memory, but [\d.]+ .B are available: choose",
        sentence(error),
    )


def test_outputs_that_are_refused(run, photo, tmp_path):
    (tmp_path / "file").write_text("x")
    for inputs, out, message in (
        ([photo], tmp_path / "out.xyz", r"unknown extension '\.xyz': name the output with one of .*or a folder"),
        ([photo], tmp_path / "out", r"unknown extension ''"),
        ([photo], tmp_path / "nowhere" / "out.png", "the folder .*nowhere does not exist"),
        ([photo, photo], tmp_path / "file", "is a file, but several inputs need a folder"),
        ([photo], f"{tmp_path}/file/", "file is a file"),
        ([photo, photo], tmp_path / "file" / "sub", "sub cannot be created: Not a directory"),
        ([photo, photo], tmp_path / "both", "would both be written to"),
        ([photo], photo, "is the input itself: name another output"),
    ):
        code, printed, error = run(*inputs, "-o", out, "--scale", "2")
        assert (code, printed) == (1, ""), out
        assert re.search(message, sentence(error)), error
    (tmp_path / "empty").mkdir()
    code, _, error = run(tmp_path / "empty", "-o", tmp_path / "out", "--scale", "2")
    assert code == 1
    assert "empty is a folder without image files" in sentence(error)


def test_existing_files_are_replaced_only_on_request(run, photo, tmp_path):
    out = tmp_path / "out.png"
    out.write_bytes(b"precious")
    code, _, error = run(photo, "-o", out, "--scale", "2")
    assert code == 1
    assert "out.png exists already: name another output or add --overwrite" in sentence(error)
    assert out.read_bytes() == b"precious"
    assert run(photo, "-o", out, "--scale", "2", "--overwrite")[0] == 0
    assert Image.open(out).size == (2 * W, 2 * H)


def test_unwritable_folder(run, photo, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda *_: False)  # instead of permissions, which do not restrict root
    code, _, error = run(photo, "-o", tmp_path / "out.png", "--scale", "2")
    assert code == 1
    assert "no permission to write in the folder" in sentence(error)


def test_jpeg_with_alpha_is_refused_before_the_work(run, tmp_path, monkeypatch):
    Image.new("RGBA", (W, H), (1, 2, 3, 4)).save(tmp_path / "a.png")
    monkeypatch.setattr(upscaling, "upscale", None)
    code, _, error = run(tmp_path / "a.png", "-o", tmp_path / "a.jpg", "--scale", "2")
    assert code == 1
    assert "JPEG has no alpha channel; use PNG, WebP or TIFF" in sentence(error)


def test_warnings_are_sentences(run, photo, tmp_path):
    first = Image.open(photo)
    first.save(tmp_path / "two.gif", save_all=True, append_images=[Image.new("RGB", first.size)])
    code, _, error = run(tmp_path / "two.gif", "-o", tmp_path / "out.png", "--scale", "2")
    assert code == 0
    assert "liif-fast: warning: " in error and "only the first is used" in sentence(error)


def test_options_reach_the_upscaling(run, photo, tmp_path, monkeypatch):
    seen = {}

    def spy(picture, **options):
        seen.update(options, threads=torch.get_num_threads())
        return upscale(picture, **options)

    monkeypatch.setattr(upscaling, "upscale", spy)
    options = ["--backend", "reference", "--dtype", "bfloat16", "--threads", "1", "--memory", "3", "--device", "cpu"]
    assert run(photo, "-o", tmp_path / "out.png", "--scale", "2", *options)[0] == 0
    expected = {"backend": "reference", "dtype": "bfloat16", "threads": 1, "working_memory": 3 << 20}
    assert {name: seen[name] for name in expected} == expected


def test_a_backend_that_cannot_run_here_says_why(run, photo, tmp_path, monkeypatch):
    monkeypatch.setattr("liif_fast.ops.backends.extension.is_available", lambda: False)
    monkeypatch.setattr("liif_fast.ops.backends.extension.reason", lambda: "it is missing")
    code, _, error = run(photo, "-o", tmp_path / "out.png", "--scale", "2", "--backend", "cpu")
    assert code == 1
    assert "backend 'cpu' needs the compiled extension: it is missing" in sentence(error)
    assert run(photo, "-o", tmp_path / "out.png", "--scale", "2")[0] == 0


def test_progress_only_on_a_terminal(run, photo, tmp_path, monkeypatch):
    assert run(photo, "-o", tmp_path / "a.png", "--scale", "2")[2] == ""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert "photo.png" in run(photo, "-o", tmp_path / "b.png", "--scale", "2")[2]


def test_version_help_and_doctor(run):
    assert run(command="--version") == (0, f"liif-fast {liif_fast.__version__}\n", "")
    code, printed, _ = run("--help")
    assert code == 0
    assert all(option in printed for option in ("--scale", "--size", "--model", "--threads", "INPUT"))
    code, printed, error = run(command="doctor")
    assert (code, error) == (0, "")
    assert "torch" in printed
    code, _, error = run(command="dance")
    assert code == 2
    assert "invalid choice: 'dance'" in sentence(error)


@pytest.mark.parametrize(
    ("number", "code", "message"), [(signal.SIGINT, 130, "liif-fast: interrupted.\n"), (signal.SIGTERM, 143, "")]
)
def test_a_signal_while_writing_leaves_nothing(run, tmp_path, monkeypatch, number, code, message):
    complete, present = writing._complete, []

    def interrupted(*arguments, **options):
        complete(*arguments, **options)
        present.extend(os.listdir(tmp_path))
        os.kill(os.getpid(), number)

    files.write(Picture(np.zeros((H, W, 3), np.uint16)), tmp_path / "deep.tif")
    monkeypatch.setattr(writing, "_complete", interrupted)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # processes in the background may ignore it
    try:
        assert run(tmp_path / "deep.tif", "-o", tmp_path / "out.png", "--scale", "1") == (code, "", message)
    finally:
        signal.signal(signal.SIGINT, before)
    assert len(present) == 2  # with the temporary file
    assert os.listdir(tmp_path) == ["deep.tif"]


def test_module_and_exit_code(tmp_path):
    command = [sys.executable, "-W", "ignore", "-m", "liif_fast", "upscale", "nothere.png", "-o", "x.png", "--scale=0"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "2"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (2, "")
    assert "'0' is not a positive number" in sentence(done.stderr)


def test_demo(tmp_path, capsys):
    assert demo.main(["--output", str(tmp_path / "demo")]) == 0
    printed = capsys.readouterr().out
    for scale, size in ((4, (640, 480)), (2.7, (432, 324))):
        photo, sheet = (tmp_path / "demo" / f"{kind}-x{scale}.png" for kind in ("photo", "comparison"))
        assert str(photo) in printed and str(sheet) in printed
        assert Image.open(photo).size == size
        assert Image.open(sheet).size == (2 * size[0] + 8, size[1] + 20)
        bicubic = Image.open(demo.PHOTO).resize(size, Image.Resampling.BICUBIC)
        shown = np.asarray(Image.open(sheet))
        np.testing.assert_array_equal(shown[20:, : size[0]], np.asarray(bicubic))
        np.testing.assert_array_equal(shown[20:, size[0] + 8 :], np.asarray(Image.open(photo)))
    assert re.search(r"x2\.7: 324x432 pixels in \d+\.\d\d s", printed)


def test_the_photo_has_its_provenance():
    text = Path(demo.PHOTO).with_name("demo.PROVENANCE.txt").read_text()
    assert "public domain" in text
