"""Random pictures through `upscale_file`, byte mutations of valid files, and a picture of 30,000 x 30,000 pixels."""

import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import hypothesis
import numpy as np
import pytest
import tifffile
from hypothesis import strategies as st
from PIL import Image

from liif_fast.images import files, upscaling
from liif_fast.images.jobs import upscale_file
from tests.images.test_image import GRAY_PROFILE, SRGB, exif_of, png_of
from tests.images.test_jobs import nearest

TURNS = {
    1: lambda a: a, 2: lambda a: a[:, ::-1], 3: lambda a: a[::-1, ::-1], 4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1), 6: lambda a: np.rot90(a, -1), 7: lambda a: np.rot90(a, 2).swapaxes(0, 1),
    8: lambda a: np.rot90(a),
}  # fmt: skip
COLOR_TYPES = {1: 0, 2: 4, 3: 2, 4: 6}  # of a PNG

PICTURES = st.fixed_dictionaries(
    {
        "source": st.sampled_from([".png", ".tif", ".jpg", ".webp", ".gif", ".bmp"]),
        "target": st.sampled_from([".png", ".tif", ".jpg", ".webp"]),
        "dtype": st.sampled_from(["uint8", "uint16", "float32"]),
        "channels": st.integers(1, 4),
        "palette": st.booleans(),
        "height": st.integers(1, 70),
        "width": st.integers(1, 70),
        "profile": st.booleans(),
        "density": st.none() | st.integers(1, 1200),
        "orientation": st.integers(1, 8),
        "scale": st.sampled_from([1, 2, 0.5, 1.7]),
        "seed": st.integers(0, 2**32 - 1),
    }
)


def write_source(path, values, case):
    """Write values [H, W, C] without liif_fast; returns [H, W, C'] as a viewer shows them, not turned yet."""
    channels, suffix = values.shape[2], path.suffix
    exif = exif_of({0x0112: case["orientation"], 0x010F: "Maker"})
    profile = (SRGB if channels > 2 else GRAY_PROFILE) if case["profile"] else None
    if values.dtype != np.uint8 and suffix == ".png":
        raw = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
        extra = [(b"eXIf", exif.removeprefix(b"Exif\0\0"))]
        if case["density"]:
            extra.append((b"pHYs", round(case["density"] / 0.0254).to_bytes(4, "big") * 2 + b"\1"))
        path.write_bytes(png_of(raw, values.shape[1], values.shape[0], COLOR_TYPES[channels], extra=extra))
        return values
    if values.dtype != np.uint8:
        tags = [(274, 3, 1, case["orientation"], True), (271, 2, 0, "Maker", True)]
        density = {"resolution": (case["density"],) * 2, "resolutionunit": "inch"} if case["density"] else {}
        kind = "minisblack" if channels < 3 else "rgb"
        alpha = ["unassalpha"] if channels in (2, 4) else None
        stored = values[..., 0] if channels == 1 else values
        options = {"iccprofile": profile, "extratags": tags, "planarconfig": None if channels == 1 else "contig"}
        tifffile.imwrite(path, stored, photometric=kind, extrasamples=alpha, **options, **density)
        return values
    image = Image.fromarray(
        values[..., 0] if channels == 1 else values, {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}[channels]
    )
    image = image.quantize(16) if case["palette"] and channels == 3 and suffix in (".png", ".gif", ".tif") else image
    options = {"dpi": (case["density"],) * 2} if case["density"] and suffix in (".png", ".jpg", ".tif") else {}
    options |= {} if suffix in (".gif", ".bmp") else {"exif": exif, "icc_profile": profile}
    image.save(path, **options, **({"lossless": True, "exact": True} if suffix == ".webp" else {}))
    with Image.open(path) as stored:
        shown = stored.convert("RGBA" if "transparency" in stored.info else "RGB") if stored.mode == "P" else stored
        pixels = np.asarray(shown)
    return pixels[..., None] if pixels.ndim == 2 else pixels


def check(folder, case):
    """One random picture through `upscale_file`: right values, or one sentence where the format cannot hold them."""
    suffix, target = case["source"], folder / f"out{case['target']}"
    deep = suffix in (".png", ".tif")
    dtype = np.dtype(case["dtype"] if deep else "uint8")
    dtype = np.dtype("uint16") if suffix == ".png" and dtype.kind == "f" else dtype
    channels = case["channels"]
    channels = {".jpg": 1 if channels < 3 else 3, ".bmp": 1 if channels < 3 else 3, ".gif": 3}.get(suffix, channels)
    random = np.random.default_rng(case["seed"])
    size = (case["height"], case["width"], channels)
    values = (
        random.random(size).astype(dtype)
        if dtype.kind == "f"
        else random.integers(0, np.iinfo(dtype).max + 1, size, dtype)
    )
    path = folder / f"in{suffix}"
    shown = write_source(path, values, case)
    orientation = case["orientation"] if suffix not in (".gif", ".bmp") else 1
    upright = TURNS[orientation](shown)
    transparent = (
        upright.shape[2] in (2, 4)
        and (upright[..., -1] != upright.dtype.type(files.to_depth(np.ones((1, 1), np.float32), dtype)[0, 0])).any()
    )
    if target.suffix == ".jpg" and transparent:
        with pytest.raises(files.ImageError, match="JPEG has no alpha"):
            upscale_file(path, target, scale=case["scale"], overwrite=True)
        return
    done = upscale_file(path, target, scale=case["scale"], overwrite=True)
    assert done.input_size == upright.shape[:2]
    rows, columns = (np.arange(n) * m // n for n, m in zip(done.output_size, upright.shape[:2], strict=True))
    expected = upright[rows][:, columns]
    stored = {".jpg": np.uint8, ".webp": np.uint8}.get(target.suffix, dtype)
    stored = np.uint16 if target.suffix == ".png" and dtype.kind == "f" else stored
    expected = files.to_depth(expected, stored)
    read = files.read(target)
    if target.suffix in (".png", ".tif"):
        off = np.abs(read.samples().astype(float) - expected).max()
        assert off <= (3 if suffix == ".jpg" else 0), off  # two decoders of JPEG may round differently
    assert (read.height, read.width) == done.output_size
    if suffix not in (".gif", ".bmp"):
        if target.suffix == ".tif":  # Pillow cannot open every kind of them
            with tifffile.TiffFile(target) as tiff:
                found = {tag.code: tag.value for tag in tiff.pages.first.tags}
            dpi = found[282][0] / found[282][1] if 282 in found else None
        else:
            with Image.open(target) as image:
                found, dpi = dict(image.getexif()), image.info.get("dpi", (None,))[0]
        assert found.get(0x0112, 1) == 1
        assert found[0x010F] == "Maker"
        if case["density"] and ".webp" not in (suffix, target.suffix):
            assert dpi == pytest.approx(case["density"], abs=0.02)
        gray = upright.shape[2] < 3
        if (
            case["profile"]
            and not (suffix == ".png" and dtype.itemsize > 1)
            and not (gray and ".webp" in (suffix, target.suffix))
        ):
            assert read.description.icc_profile is not None or shown.shape[2] != channels or gray


@pytest.mark.parametrize("number", [40, pytest.param(300, marks=pytest.mark.prove)])
def test_random_pictures(tmp_path, monkeypatch, number):
    monkeypatch.setattr(upscaling, "upscale_rows", nearest, raising=False)

    @hypothesis.settings(max_examples=number, deadline=None, derandomize=True, database=None)
    @hypothesis.given(PICTURES)
    def run(case):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            check(tmp_path, case)

    run()


def child(*arguments, timeout):
    """Run a module of this folder in a process of its own; returns what it prints, as JSON."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", *map(str, arguments)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout)
    assert done.returncode == 0, f"exit code {done.returncode}: {done.stdout[-2000:]} {done.stderr[-4000:]}"
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize(
    "seconds", [pytest.param(2, marks=pytest.mark.prove), pytest.param(600, marks=pytest.mark.exhaustive)]
)
def test_mutated_files_get_one_sentence(tmp_path, seconds):
    counts = child("tests.images.mutations", seconds, tmp_path, timeout=seconds + 120)
    assert counts["files"] > 10
    assert counts["refused"] > 0


@pytest.mark.exhaustive
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_peak_memory_of_a_large_job(tmp_path, suffix):
    result = child("tests.images.large_job", tmp_path, 27272, 1.1, suffix, timeout=7200)
    assert result["size"] == [29999, 29999]
    assert result["peak_bytes"] < 1.5e9, result
    assert not [name for name in os.listdir(tmp_path) if name not in ("in.tif", f"out{suffix}")]
    assert Path(tmp_path, f"out{suffix}").stat().st_size > 0
