"""The measurement of loaders against the training step, on something small."""

import json
import sys

import pytest
from PIL import Image

from bench import loader


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(loader, "SIZE", (40, 48))
    monkeypatch.setattr(loader, "BATCH", 2)
    monkeypatch.setattr(loader, "_WRAPPER", {"inp_size": 8, "scale_max": 2, "sample_q": 20})
    monkeypatch.setattr(
        loader, "_ENCODER", {"name": "edsr-baseline", "args": {"n_resblocks": 1, "n_feats": 4, "no_upsampling": True}}
    )
    monkeypatch.setattr(loader, "_IMNET", {"name": "mlp", "args": {"out_dim": 3, "hidden_list": [8]}})


def test_images_have_the_size_of_div2k(small, tmp_path):
    loader.make_images(tmp_path, 2)
    images = [Image.open(path) for path in sorted(tmp_path.glob("*.png"))]
    assert [image.size for image in images] == [(48, 40), (48, 40)]
    assert images[0].tobytes() != images[1].tobytes()


def test_every_loader_and_step_is_timed_and_saved(small, tmp_path, monkeypatch, capsys):
    options = ["--rounds", "2", "--batches", "1", "--steps", "1", "--workers", "1", "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", ["loader", *options, "--results", str(tmp_path)])
    loader.main()
    (path,) = tmp_path.glob("*/*-loader.json")
    result = json.loads(path.read_text())
    names = [f"cache {cache}, {workers} workers" for cache in ("none", "bin", "in_memory") for workers in (0, 1)]
    assert list(result["entries"]) == [
        *names,
        "loader: device (cpu)",
        "training step, float32",
        "training step, bf16",
    ]
    assert all(0 < entry["seconds"]["low"] <= entry["seconds"]["median"] for entry in result["entries"].values())
    assert loader.table(result) in capsys.readouterr().out
    monkeypatch.setattr(loader.results, "FOLDER", tmp_path)
    later = {**result, "date": "2999-01-01T00:00:00", "commit": "later"}
    (path.parent / "2999-01-01-loader.json").write_text(json.dumps(later))
    assert loader.block([]) == loader.table(later)


def test_the_table_says_which_of_two_limits():
    def entry(kind, milliseconds):
        return {"kind": kind, "seconds": dict.fromkeys(("low", "median", "high"), milliseconds / 1e3)}

    result = {
        "settings": {"batch": 16},
        "entries": {"slow": entry("loader", 80), "quick": entry("loader", 8), "step": entry("step", 40)},
        "machine": {"cpu": "some CPU", "threads": 2, "load_before": 3.5},
        "versions": {"torch": "2"},
        "commit": "abc",
        "date": "2026-01-02T00:00:00",
    }
    assert loader.table(result).splitlines()[2:5] == [
        "| slow | 80.0 (80.0 to 80.0) | 200.0 | yes |",
        "| quick | 8.0 (8.0 to 8.0) | 2000.0 | no |",
        "| step | 40.0 (40.0 to 40.0) | 400.0 |  |",
    ]
    assert "load average 3.5" in loader.table(result)
    result["machine"]["load_before"] = 0.1
    assert "load average" not in loader.table(result)
