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
from liif_fast.cli import upscale as upscale_command
from liif_fast.images import files, upscaling, writing
from liif_fast.images.picture import Picture
from liif_fast.images.upscaling import upscale
from liif_fast.models import make_model, registry
from liif_fast.training import config
from liif_fast.utils import memory
from tests.cli.conftest import H, W, sentence


@pytest.mark.parametrize(
    ("options", "size"),
    [(["--scale", "2"], (12, 18)), (["--scale", "3x2"], (12, 27)), (["--scale", "3.7"], (22, 33)),
     (["--scale", "0.5"], (3, 4)), (["--size", "15X10"], (10, 15)), (["--size", "15x"], (10, 15)),
     (["--size", "15"], (10, 15)), (["--size", "x10"], (10, 15)), (["--size", "1x"], (1, 1))],
)  # fmt: skip
def test_one_file(run, photo, weights, tmp_path, options, size):
    out = tmp_path / "out.png"
    code, printed, error = run(photo, "-o", out, *options)
    assert (code, error) == (0, "")
    assert re.fullmatch(rf"{photo} \(9x6\) -> {out} \({size[1]}x{size[0]}\) in \d+\.\d s\n", printed)
    expected = upscale(np.asarray(Image.open(photo)), size=size, model=weights)
    np.testing.assert_array_equal(np.asarray(Image.open(out)), expected)


@pytest.mark.parametrize(("size", "changes"), [("18x11", False), ("18x14", True), ("6x9", True)])
def test_a_size_that_changes_the_shape_says_so(run, photo, tmp_path, size, changes):
    code, _, error = run(photo, "-o", tmp_path / "out.png", "--size", size)
    assert (code, "changes its shape" in error) == (0, changes)
    width = size.split("x")[0]
    assert not changes or f"photo.png (9x6) becomes {size}, which changes its shape: --size {width}x keeps it" in error


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
NO_SIZE = "is not WIDTHxHEIGHT such as 1920x1080, 1920x or x1080"


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        *(("scale", v, NO_SCALE) for v in ("0", "-1", "nan", "inf", "two", "", "2x", "2x3x4", "2x0", "1e999")),
        *(("size", v, NO_SIZE) for v in ("0x5", "", "x", "-5x5", "5x5x5", "5.5x5", "axb")),
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
        (["--scale", "2", "--threads", "9999999999"], 2, "'9999999999' is not a whole number from 1 to"),
        (["--scale", "2", "-o", ""], 2, "the name is empty, so give a file or folder"),
        (["--scale", "2", "--suffix", "a/b"], 2, "'a/b' cannot be part of a file's name"),
        (["--scale", "2", "--suffix", "_x2"], 1, "--suffix is for files in a folder"),
        (["--scale", "2", "--format", "webp"], 1, "is a PNG by its name, but --format is webp"),
        (["--scale", "2", "--max-pixels", "53"], 1, "pixels"),
        (["--scale", "2", "--imports", "nothere.py"], 1, "nothere.py', which does not exist"),
        (["--ensembel"], 2, "unrecognized arguments: --ensembel; see liif-fast upscale --help"),
        *(
            (["--scale", "2", "--device", name], 1, f"device '{name}' cannot be used here: ")
            for name in ("hpu", "privateuseone", "meta")
        ),
        (["--scale", "2", "--memory", "lots"], 2, "'lots' is not a whole number from 1"),
        (["--scale", "2", "--quality", "101"], 2, "'101' is not a whole number from 1 to 100"),
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
        r"9000000x6000000 .* needs? [a-z ]+ \d+ .B of (memory|the disk), but [\d.]+ .B are (available|free)",
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
    assert "out.png exists already: name another output or add --overwrite or --skip-existing" in sentence(error)
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
    for name in ("upscale", "upscale_rows"):
        monkeypatch.setattr(upscaling, name, None, raising=False)
    code, _, error = run(tmp_path / "a.png", "-o", tmp_path / "a.jpg", "--scale", "2")
    assert code == 1
    assert "JPEG has no alpha channel; use PNG, WebP or TIFF" in sentence(error)


def test_quality_of_a_lossless_format(run, photo, tmp_path):
    code, _, error = run(photo, "-o", tmp_path / "out.tif", "--scale", "2", "--quality", "90")
    assert code == 0
    assert sentence(error) == "liif-fast: warning: --quality has no effect on TIFF: nothing is lost there.\n"
    assert run(photo, "-o", tmp_path / "out.webp", "--scale", "2", "--quality", "90")[2] == ""


OWN_ENCODER = """
import torch, liif_fast
@liif_fast.register("own-encoder")
class Own(torch.nn.Conv2d):
    out_dim = 4
    def __init__(self): super().__init__(3, 4, 3, padding=1)
"""


def test_encoders_of_ones_own(run, photo, tmp_path, monkeypatch):
    imnet = {"name": "mlp", "args": {"out_dim": 3, "hidden_list": [8]}}
    spec = {"name": "liif", "args": {"encoder_spec": {"name": "own-encoder"}, "imnet_spec": imnet}}
    monkeypatch.setattr(registry._models, "_factories", registry.registered())
    with monkeypatch.context() as patch:
        patch.setattr(registry._models, "_factories", registry.registered())
        (tmp_path / "own.py").write_text(OWN_ENCODER)
        config.import_code(str(tmp_path / "own.py"))
        torch.save({"model": {**spec, "sd": make_model(spec).state_dict()}}, tmp_path / "own.pth")
    arguments = [photo, "-o", tmp_path / "out.png", "--scale", "2", "--model", tmp_path / "own.pth"]
    code, _, error = run(*arguments)
    assert code == 1
    how = "or import the Python file that registers it (--imports FILE, `imports` in a configuration)"
    assert "no model is registered as 'own-encoder': choose one of" in error and how in sentence(error)
    (tmp_path / "broken.py").write_text("import torch\n\ntorch.nothing\n")
    code, _, error = run(*arguments, "--imports", tmp_path / "broken.py")
    assert (
        code == 1
        and "cannot be imported (line 3: AttributeError: module 'torch' has no attribute 'nothing'" in sentence(error)
    )
    (tmp_path / "own2.py").write_text(OWN_ENCODER)
    assert run(*arguments, "--imports", tmp_path / "own2.py")[0] == 0


def test_warnings_are_sentences(run, photo, tmp_path):
    first = Image.open(photo)
    first.save(tmp_path / "two.gif", save_all=True, append_images=[Image.new("RGB", first.size)])
    code, _, error = run(tmp_path / "two.gif", "-o", tmp_path / "out.png", "--scale", "2")
    assert code == 0
    assert "liif-fast: warning: " in error and "only the first is used" in sentence(error)


def test_options_reach_the_upscaling(run, photo, tmp_path, monkeypatch):
    seen = {}

    def spy(source, target, **options):
        seen.update(options, threads=torch.get_num_threads())
        return upscale_file(source, target, **{**options, "ensemble": False})

    upscale_file = upscale_command.upscale_file
    monkeypatch.setattr(upscale_command, "upscale_file", spy)
    options = ["--backend", "reference", "--dtype", "bfloat16", "--threads", "1", "--memory", "3", "--device", "cpu"]
    options += ["--ensemble", "--max-pixels", "54", "--quality", "90", "--overwrite"]
    assert run(photo, "-o", tmp_path / "out.jpg", "--scale", "2x3", *options)[0] == 0
    expected = {"backend": "reference", "dtype": "bfloat16", "threads": 1, "working_memory": 3 << 20, "ensemble": True}
    expected |= {"max_pixels": 54, "quality": 90, "overwrite": True, "kind": "JPEG", "scale": (3.0, 2.0), "size": None}
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
    shutil.copy(photo, tmp_path / "c.png")
    shown = run(tmp_path / "c.png", photo, "-o", tmp_path / "out", "--scale", "2")[2]
    assert "1 of 2: c.png" in shown and "2 of 2: photo.png" in shown


def test_version_help_and_doctor(run, capsys):
    assert run(command="--version") == (0, f"liif-fast {liif_fast.__version__}\n", "")
    code, printed, _ = run("--help")
    assert code == 0
    assert all(option in printed for option in ("--scale", "--size", "--model", "--threads", "INPUT"))
    assert " -o OUTPUT (--scale SCALE | --size SIZE)" in " ".join(printed.split()), "shown as required"
    assert "--ensemble" in printed and "100 makes WebP lossless" in " ".join(printed.split())
    assert (main.main([]), capsys.readouterr().out) == (2, run(command="--help")[1]), "alone it lists its commands"
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
    assert re.search(r"x2\.7: 432x324 pixels in \d+\.\d\d s", printed)


def test_the_photo_has_its_provenance():
    text = Path(demo.PHOTO).with_name("demo.PROVENANCE.txt").read_text()
    assert "public domain" in text
