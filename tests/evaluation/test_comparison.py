"""Comparisons of methods over scales: scores, tables, resuming, several processes, pictures, ablations."""

import math
import os
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from liif_fast import data
from liif_fast.cli import main as cli
from liif_fast.evaluation import comparison, figures, predict, psnr, tables
from liif_fast.evaluation.comparison import ComparisonConfig, ScoreRecord, resolve_methods
from liif_fast.models import checkpoints, make_model
from tests.utils.test_distributed import torchrun

ENCODER = {"name": "edsr-baseline", "args": {"n_resblocks": 1, "n_feats": 8, "no_upsampling": True}}
UPSAMPLING = {"name": "edsr-baseline", "args": {"n_resblocks": 1, "n_feats": 8, "scale": 2}}


def imnet(*widths):
    return {"name": "mlp", "args": {"out_dim": 3, "hidden_list": list(widths)}}


SPECS = {
    "liif": ("liif", {"encoder_spec": ENCODER, "imnet_spec": imnet(16, 16)}),
    "liif-c": ("liif", {"encoder_spec": ENCODER, "imnet_spec": imnet(16, 16), "cell_decode": False}),
    "liif-u": ("liif", {"encoder_spec": ENCODER, "imnet_spec": imnet(16, 16), "feat_unfold": False}),
    "liif-e": ("liif", {"encoder_spec": ENCODER, "imnet_spec": imnet(16, 16), "local_ensemble": False}),
    "liif-d": ("liif", {"encoder_spec": ENCODER, "imnet_spec": imnet(16)}),
    "metasr": ("metasr", {"encoder_spec": ENCODER}),
    "edsr": ("liif", {"encoder_spec": UPSAMPLING}),
}


def checkpoint(folder, name):
    """A model with random weights in the original's format."""
    torch.manual_seed(len(name))
    kind, args = SPECS[name]
    model = make_model({"name": kind, "args": args})
    path = folder / f"{name}.pth"
    torch.save({"model": {"name": kind, "args": args, "sd": model.state_dict()}, "epoch": 3}, path)
    return path


@pytest.fixture
def images(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for index, size in enumerate([(64, 80), (72, 66), (70, 70)]):
        small = Image.fromarray(rng.integers(0, 256, (size[0] // 8, size[1] // 8, 3), dtype=np.uint8))
        small.resize((size[1], size[0]), Image.Resampling.BICUBIC).save(folder / f"{index}.png")
    return folder


def config(tmp_path, names, **arguments):
    models = [f"{name}={checkpoint(tmp_path, name)}" for name in names if name != "bicubic"]
    return ComparisonConfig(methods=resolve_methods(names, models), **{"scales": (2, 3.5), **arguments})


def by_key(rows):
    return {row[:4]: row for row in rows}


def test_scores_are_psnr_of_predictions(images, tmp_path):
    """Every model family and ablation, from checkpoints in the original's format."""
    names = ["bicubic", *SPECS]
    rows = by_key(comparison.run(images, config(tmp_path, names, metrics=("psnr", "ssim")), tmp_path / "out"))
    assert len(rows) == (len(names) - 1) * 2 * 3 + 3  # edsr enlarges by 2 only
    for name in names:
        low, high = data.shrink_whole(data.read_rgb(images / "1.png"), 2)
        size = (high.shape[0], high.shape[1])
        if name == "bicubic":
            pred = data.to_tensor(data.resize_bicubic(low, size))
        else:
            pred = predict(checkpoints.load(tmp_path / f"{name}.pth"), low, size)
        row = rows[name, "1/s", 2, "1.png"]
        assert row.psnr == pytest.approx(psnr(pred, data.to_tensor(high), "div2k-2"), abs=1e-4)
        assert -1 <= row.ssim <= 1
    saved = comparison.read_records(tmp_path / "out" / "scores.csv")
    assert len(saved) == len(rows) and by_key(saved)["liif", "1/s", 3.5, "0.png"].psnr == pytest.approx(
        rows["liif", "1/s", 3.5, "0.png"].psnr, abs=1e-5
    )


def test_edsr_upsamples_by_itself(images, tmp_path):
    """Without an imnet the output is the encoder's output, pixel for pixel."""
    model = checkpoints.load(checkpoint(tmp_path, "edsr"))
    low, _ = data.shrink_whole(data.read_rgb(images / "0.png"), 2)
    with torch.no_grad():
        own = model.encoder((data.to_tensor(low)[None] - 0.5) / 0.5)[0] * 0.5 + 0.5
    assert torch.allclose(predict(model, low, (64, 80)), own.clamp(0, 1), atol=1e-6)


def test_a_cell_is_that_of_a_smaller_scale(images, tmp_path):
    names = ["bicubic", "liif", "liif-c", "metasr"]
    rows = by_key(
        comparison.run(images, config(tmp_path, names, scales=(2, 6), cells=("1/s", "1/3")), tmp_path / "out")
    )
    # Only at scales above the cell's, and only for models that decode with cells.
    assert {key[:3] for key in rows if key[1] == "1/3"} == {("liif", "1/3", 6)}
    low, high = data.shrink_whole(data.read_rgb(images / "2.png"), 6)
    model = checkpoints.load(tmp_path / "liif.pth")
    pred = predict(model, low, (66, 66), (2 / 33, 2 / 33))
    assert not torch.allclose(pred, predict(model, low, (66, 66)))
    assert rows["liif", "1/3", 6, "2.png"].psnr == pytest.approx(psnr(pred, data.to_tensor(high), "div2k-6"), abs=1e-4)
    assert rows["liif", "1/3", 6, "2.png"].label == "liif, cell 1/3"


def count_calls(monkeypatch, fail_after=math.inf):
    """Count the calls of comparison.enlarge, and interrupt it after `fail_after` calls."""
    calls = []
    enlarge = comparison.enlarge

    def counted(*arguments):
        if len(calls) >= fail_after:
            raise KeyboardInterrupt
        calls.append(arguments)
        return enlarge(*arguments)

    monkeypatch.setattr(comparison, "enlarge", counted)
    return calls


def test_a_run_computes_only_what_is_new(images, tmp_path, monkeypatch):
    out = tmp_path / "out"
    first = comparison.run(images, config(tmp_path, ["bicubic", "liif"]), out)
    calls = count_calls(monkeypatch)
    again = comparison.run(images, config(tmp_path, ["bicubic", "liif"]), out)
    assert not calls and [row[:4] for row in again] == [row[:4] for row in first]
    comparison.run(images, config(tmp_path, ["bicubic", "liif"], scales=(2, 3.5, 4)), out)
    assert len(calls) == 2 * 3  # one more scale
    calls.clear()
    changed = data.read_rgb(images / "0.png").copy()
    changed[:4] = 0
    Image.fromarray(changed).save(images / "0.png")
    comparison.run(images, config(tmp_path, ["bicubic", "liif"]), out)
    assert len(calls) == 2 * 2  # one image, two methods, two scales
    calls.clear()
    later = config(tmp_path, ["bicubic", "liif"])
    model = torch.load(tmp_path / "liif.pth")
    model["model"]["sd"]["imnet.layers.4.bias"] += 0.1
    torch.save(model, tmp_path / "liif.pth")
    rows = comparison.run(images, later, out)
    assert len(calls) == 3 * 2  # the model's, not bicubic's
    assert rows[-1].psnr != first[-1].psnr
    saved = {row[:4] for row in comparison.read_records(out / "scores.csv")}
    assert len(saved) == 2 * 3 * 3  # the scores at x4 are still there


def test_an_interrupted_run_continues(images, tmp_path, monkeypatch):
    expected = comparison.run(images, config(tmp_path, ["bicubic", "liif"]), tmp_path / "whole")
    with monkeypatch.context() as patch:
        count_calls(patch, fail_after=7)
        with pytest.raises(KeyboardInterrupt):
            comparison.run(images, config(tmp_path, ["bicubic", "liif"]), tmp_path / "out")
    with monkeypatch.context() as patch:  # an interrupted second run of other scores keeps those of the first
        count_calls(patch, fail_after=1)
        with pytest.raises(KeyboardInterrupt):
            comparison.run(images, config(tmp_path, ["liif"], scales=(4,)), tmp_path / "out")
    assert len(comparison.read_records(tmp_path / "out" / "scores.rank0.csv")) == 8
    calls = count_calls(monkeypatch)
    rows = comparison.run(images, config(tmp_path, ["bicubic", "liif"]), tmp_path / "out")
    assert len(calls) == 12 - 7 and [row[:4] for row in rows] == [row[:4] for row in expected]
    assert os.listdir(tmp_path / "out") == ["scores.csv"]


@pytest.mark.prove  # test_distributed runs two processes by default
def test_two_processes_write_what_one_writes(images, tmp_path):
    model = checkpoint(tmp_path, "liif")
    common = ["evaluate", "--images", str(images), "--model", f"liif={model}", "--methods", "bicubic", "liif"]
    common += ["--scales", "2", "4", "--threads", "1", "--device", "cpu"]
    assert cli.main([*common, "--out", str(tmp_path / "one")]) == 0
    printed = torchrun(tmp_path, *common, "--out", str(tmp_path / "two"))
    torch.set_num_threads(2)  # --threads above also changed this process
    one, two = (by_key(comparison.read_records(tmp_path / name / "scores.csv")) for name in ("one", "two"))
    assert one.keys() == two.keys() and len(one) == 12
    assert all(one[key].psnr == pytest.approx(two[key].psnr, abs=1e-3) for key in one)
    assert (tmp_path / "one" / "table.md").read_text() == (tmp_path / "two" / "table.md").read_text()
    assert printed.count("| bicubic |") == 1  # only the first process prints
    assert not list((tmp_path / "two").glob("scores.rank*"))


def rows_of(table):
    """Scores of two images from {(label, cell): {scale: (psnr, psnr)}}."""
    return [
        ScoreRecord(name, cell, scale, f"{index}.png", value, 0.9, "")
        for (name, cell), found in table.items()
        for scale, values in found.items()
        for index, value in enumerate(values)
    ]


TABLE = {
    ("bicubic", "1/s"): {2: (30.0, 32.0), 6: (25.0, 25.5)},
    ("liif", "1/s"): {2: (33.0, 34.0), 6: (26.0, 26.0)},
    ("edsr", "1/s"): {2: (33.0, 34.0)},
    ("liif", "1/4"): {6: (26.5, 26.0)},
    ("part", "1/s"): {2: (99.0,)},
}


def test_tables(tmp_path):
    rows = rows_of(TABLE)
    lines = tables.markdown(rows, protocol="div2k").splitlines()
    assert lines[0] == (
        "PSNR in dB, mean over 2 images (RGB without a border of scale + 6 pixels). "
        "Columns with * lie beyond the scales trained on (up to x4)."
    )
    assert lines[2:] == [
        "| method | x2 | x6* |",
        "| --- | ---: | ---: |",
        "| bicubic | 31.00 | 25.25 |",
        "| liif | **33.50** | 26.00 |",
        "| edsr | **33.50** | - |",
        "| liif, cell 1/4 | - | **26.25** |",
        "| part | - | - |",  # a mean over other images would mislead
    ]
    tables.write_means(rows, tmp_path / "table.csv", ["psnr", "ssim"])
    written = (tmp_path / "table.csv").read_text().splitlines()
    assert written[:3] == ["metric,method,model,x2,x6", "psnr,bicubic,,31.0000,25.2500", "psnr,liif,,33.5000,26.0000"]
    assert written[6] == "ssim,bicubic,,0.9000,0.9000"
    assert tables.gains(tables.average(rows))["liif"] == {2: 2.5, 6: 0.75}
    assert not tables.gains(tables.average(rows[4:8]))


def test_several_models_of_one_method_are_all_in_the_table(tmp_path):
    rows = [ScoreRecord("edsr", "1/s", scale, "0.png", 30.0, 0.9, "", f"{scale}" * 16) for scale in (2, 3, 2)]
    text = tables.markdown(rows, protocol="div2k")
    assert text.endswith(f"\nModels, as the first digits of their files' sha256: edsr `{'2' * 16} {'3' * 16}`.\n")
    assert "Models" not in tables.markdown(rows_of(TABLE), protocol="div2k")


def test_scores_without_the_models_hash_are_read_and_completed(images, tmp_path, monkeypatch):
    out = tmp_path / "out"
    first = comparison.run(images, config(tmp_path, ["bicubic", "liif"]), out)
    lines = (out / "scores.csv").read_text().splitlines()
    (out / "scores.csv").write_text("".join(f"{line.rpartition(',')[0]}\n" for line in lines))
    assert all(record.model == "" for record in comparison.read_records(out / "scores.csv"))
    calls = count_calls(monkeypatch)
    again = comparison.run(images, config(tmp_path, ["bicubic", "liif"]), out)
    assert not calls and [record.model for record in again] == [record.model for record in first]
    assert {len(record.model) for record in again} == {0, 16}


def test_command_writes_tables_plot_and_comparison(images, tmp_path, capsys):
    models = [f"--model={name}={checkpoint(tmp_path, name)}" for name in ("liif", "metasr")]
    models.append(f"--model=edsr@2={checkpoint(tmp_path, 'edsr')}")
    out = tmp_path / "out"
    arguments = ["evaluate", "--images", str(images), *models, "--scales", "2", "3", "8", "--out", str(out)]
    assert cli.main([*arguments, "--cells", "1/4", "--protocol", "benchmark", "--compare", "1"]) == 0
    printed = capsys.readouterr().out
    names = ["comparison-x8.png", "psnr.png", "scores.csv", "table.csv", "table.md"]
    assert sorted(os.listdir(out)) == names
    assert (out / "table.md").read_text() in printed and "luma without a border" in printed
    table = [line for line in (out / "table.md").read_text().splitlines() if line.startswith("| ")][2:]
    assert [line.split("|")[1].strip() for line in table] == ["bicubic", "liif", "liif, cell 1/4", "metasr", "edsr"]
    assert table[-1].count(" - ") == 2  # x3 and x8
    # Six panels of the 72x64 picture in two rows of three: input, bicubic, liif, its other cell, metasr, original.
    with Image.open(out / "comparison-x8.png") as picture:
        assert picture.size == (3 * 64 + 2 * 8, 2 * (72 + 20) + 8)
        original = np.asarray(picture)[-72:, -64:]
    assert np.array_equal(original, data.read_rgb(images / "1.png")[:72, :64])
    with Image.open(out / "psnr.png") as picture:
        assert picture.width > 800 and np.asarray(picture.convert("L")).std() > 5


def test_without_matplotlib_the_tables_are_still_written(images, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    arguments = ["evaluate", "--images", str(images), "--methods", "bicubic", "--scales", "2", "--out"]
    assert cli.main([*arguments, str(tmp_path / "out")]) == 1
    assert "pip install matplotlib" in capsys.readouterr().err
    assert sorted(os.listdir(tmp_path / "out")) == ["comparison-x2.png", "scores.csv", "table.csv", "table.md"]


def test_the_comparison_shows_the_busiest_part():
    image = np.zeros((96, 128, 3), np.uint8)
    image[40:60, 70:100] = np.random.default_rng(0).integers(0, 256, (20, 30, 3))
    top, left, height, width = figures.busiest_window(image, 48, 48)
    assert (height, width) == (48, 48) and 12 <= top <= 40 and 52 <= left <= 70
    assert figures.busiest_window(image, 96, 128) == (0, 0, 96, 128)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--methods", "bicubic", "rdn"], "method 'rdn' needs a model: add --model rdn=FILE"),
        (["--model", "some.pth"], "'some.pth' is not NAME=FILE"),
        (["--model", "edsr@two=some.pth"], "'two', which is not a number"),
        (["--model", "bicubic=tiny"], "give the model another name"),
        (["--methods", "bicubic", "--model", "liif=tiny"], "--methods does not list"),
        (["--model", "liif=some.pth"], "some.pth does not exist"),
        (["--scales", "0.5"], "scale 0.5 cannot be evaluated"),
        (["--cells", "4"], "cell '4' is not known"),
        (["--metrics", "lpips"], "'lpips'"),
        (["--protocol", "set5"], "'set5'"),
        (["--methods", "bicubic", "--scales", "2", "--compare", "x.png"], "holds no image 'x.png'"),
        (["--methods", "bicubic", "--scales", "30"], "0.png at x30: the image has 60x60 pixels, but"),
    ],
)
def test_bad_options_get_a_sentence(images, tmp_path, capsys, options, message):
    assert cli.main(["evaluate", "--images", str(images), "--out", str(tmp_path / "out"), *options]) == 1
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_files_of_other_programs_are_not_overwritten(images, tmp_path, capsys):
    (tmp_path / "scores.csv").write_text("name,score\nme,10\n")
    arguments = ["evaluate", "--images", str(images), "--methods", "bicubic", "--scales", "2"]
    assert cli.main([*arguments, "--out", str(tmp_path)]) == 1
    assert "is not a table of scores" in capsys.readouterr().err
    assert (tmp_path / "scores.csv").read_text() == "name,score\nme,10\n"


def test_errors_name_the_image_and_the_scale(images, tmp_path):
    with pytest.raises(ValueError, match=r"0\.png at x90: an image of .* pixels cannot be shrunk by 90"):
        comparison.run(images, config(tmp_path, ["bicubic"], scales=[90]), tmp_path / "out")
    with pytest.raises(ValueError, match="rmse needs a test configuration"):
        config(tmp_path, ["bicubic"], metrics=("psnr", "rmse"))
