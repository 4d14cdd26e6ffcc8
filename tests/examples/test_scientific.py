"""The examples for GeoTIFF and NIfTI, on small files: values, masks, and places on the map and in the body."""

import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import liif_fast
from liif_fast.models import make_model
from liif_fast.training.bilinear import start_as_bilinear

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
LOW, HIGH = -500.0, 1500.0

pytestmark = [pytest.mark.prove, pytest.mark.filterwarnings("ignore::DeprecationWarning")]


def save_model(path, channels):
    """A model that interpolates nearly linearly."""
    encoder = {"n_resblocks": 1, "n_feats": 2 * channels + 2, "no_upsampling": True, "n_colors": channels}
    imnet = {"out_dim": channels, "hidden_list": [32]}
    specs = {"encoder_spec": ("edsr-baseline", encoder), "imnet_spec": ("mlp", imnet)}
    torch.manual_seed(0)
    args = {key: {"name": name, "args": arguments} for key, (name, arguments) in specs.items()}
    model = make_model({"name": "liif", "args": args})
    model.data_norm = {side: {"sub": [0.5], "div": [0.5]} for side in ("inp", "gt")}
    start_as_bilinear(model)
    liif_fast.save(model, path)


def run(name, monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")


def test_a_geotiff_keeps_its_place_and_its_missing_values(tmp_path, monkeypatch):
    rasterio = pytest.importorskip("rasterio")
    transform = rasterio.Affine(30, 0, 500_000, 0, -30, 4_600_000)
    rows, columns = np.mgrid[:20, :24]

    def height(row, column):
        """Linear in the place; row, column: in pixels of the small file."""
        return 30 * column + 15 * row

    bands = np.stack([height(rows, columns), 900 - height(rows, columns)]).astype(np.float32)
    bands[:, 5:12, 6:14] = -9999
    profile = {"driver": "GTiff", "height": 20, "width": 24, "count": 2, "dtype": "float32", "nodata": -9999}
    with rasterio.open(tmp_path / "in.tif", "w", crs="EPSG:32632", transform=transform, **profile) as file:
        file.write(bands)
    save_model(tmp_path / "model.safetensors", 2)
    run(
        "geotiff.py",
        monkeypatch,
        tmp_path / "in.tif",
        tmp_path / "out.tif",
        3,
        tmp_path / "model.safetensors",
        LOW,
        HIGH,
    )
    with rasterio.open(tmp_path / "in.tif") as small, rasterio.open(tmp_path / "out.tif") as large:
        assert large.crs == small.crs and large.shape == (60, 72) and large.nodata == -9999
        assert tuple(large.bounds) == pytest.approx(tuple(small.bounds))
        found = large.read(masked=True)
    row, column = ((np.arange(side) + 0.5) / 3 - 0.5 for side in (60, 72))
    nearest = np.rint(row).astype(int)[:, None], np.rint(column).astype(int)[None]
    assert np.array_equal(found.mask[0], (bands[0] == -9999)[nearest])
    expected = height(row[:, None], column)
    inside = ~np.ma.getmaskarray(found)[0]
    inside[12:42, 15:48] = False  # around the hole the filled values have an influence
    inside[:5], inside[-5:], inside[:, :5], inside[:, -5:] = False, False, False, False
    assert inside.sum() > 500
    assert np.abs(found[0] - expected)[inside].max() < 0.02 * (HIGH - LOW)
    assert np.abs(found[1] - (900 - expected))[inside].max() < 0.02 * (HIGH - LOW)


def test_a_nifti_volume_keeps_its_place_in_the_body(tmp_path, monkeypatch):
    nibabel = pytest.importorskip("nibabel")
    affine = np.array([[0, -0.8, 0, 90], [0.8, 0, 0, -126], [0, 0, 3, -72], [0, 0, 0, 1.0]])
    grid = np.stack([*np.mgrid[:16, :18, :3], np.ones((16, 18, 3))])
    place = np.einsum("ij,jxyz->ixyz", affine, grid)
    image = nibabel.Nifti1Image((20 * place[0] - 10 * place[2] - 1000).astype(np.int16), affine)
    nibabel.save(image, tmp_path / "in.nii.gz")
    save_model(tmp_path / "model.safetensors", 1)
    run(
        "nifti.py",
        monkeypatch,
        tmp_path / "in.nii.gz",
        tmp_path / "out.nii.gz",
        2,
        tmp_path / "model.safetensors",
        -1000,
        2000,
    )
    large = nibabel.load(tmp_path / "out.nii.gz")
    assert large.shape == (32, 36, 3)
    assert nibabel.affines.voxel_sizes(large.affine) == pytest.approx([0.4, 0.4, 3])
    grid = np.stack([*np.mgrid[:32, :36, :3], np.ones((32, 36, 3))])
    place = np.einsum("ij,jxyz->ixyz", large.affine, grid)
    error = np.abs(large.get_fdata() - (20 * place[0] - 10 * place[2] - 1000))[4:-4, 4:-4]
    assert error.max() < 0.02 * 3000
