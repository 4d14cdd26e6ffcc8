"""Arrays of any range and number of channels as data: their files, the shrinking with masks, items, caches."""

import io
import pickle

import numpy as np
import pytest
import pyvips
import tifffile
import torch
from PIL import Image

from liif_fast.data import (
    ImageFolder,
    PairedImageFolders,
    SRImplicitDownsampled,
    SRImplicitPaired,
    SRImplicitUniformVaried,
    gradient_energy,
    read_array,
    resize_bicubic,
)

DTYPES = ["uint8", "uint16", "int16", "float32"]


def values(dtype="float32", height=40, width=36, channels=5):
    """Smooth values from -3000 to 3000, or as far as the dtype reaches."""
    rows, columns, bands = np.mgrid[:height, :width, :channels]
    wave = np.sin(rows / 5 + bands) * np.cos(columns / 7)
    return (100 * wave + 120 if dtype == "uint8" else 3000 * wave + (3000 if dtype[0] == "u" else 0)).astype(dtype)


def write(path, array):
    """An array [H, W, C] as a file of that suffix; 'pages' in its name: one page for each channel."""
    if path.suffix == ".npy":
        np.save(path, array if array.shape[2] > 1 else array[..., 0])
    elif "pages" in path.name:
        tifffile.imwrite(path, np.moveaxis(array, 2, 0), photometric="minisblack")
    else:
        pyvips.Image.new_from_array(np.ascontiguousarray(array)).write_to_file(str(path), compression="deflate")


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "data").mkdir()
    return tmp_path / "data"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("name", "channels"), [("a.npy", 1), ("a.npy", 5), ("a.tif", 2), ("a.tif", 5), ("pages.tif", 5)]
)
def test_files_keep_their_dtype_in_every_cache(folder, name, channels, dtype):
    array = values(dtype, channels=channels)
    write(folder / name, array)
    for cache in ("none", "bin", "in_memory"):
        images = ImageFolder(folder, n_colors=channels, cache=cache)
        found = images.array(0)
        assert found.dtype == dtype and np.array_equal(found, array)
        span = {"uint8": 255, "uint16": 65535}.get(dtype, 1)
        assert torch.allclose(images[0], torch.tensor(array / span).float().permute(2, 0, 1), rtol=1e-6)


def test_a_replaced_file_is_read_again_and_gray_pictures_become_data_by_a_range(folder):
    for value in (7, 4000):
        Image.fromarray(np.full((9, 8), value, np.uint16)).save(folder / "depth.png")
        images = ImageFolder(folder, n_colors=1, data_range=[0, 8000])
        assert (images.array(0) == value).all() and float(images[0].max()) == pytest.approx(value / 8000)


def object_file():
    data = io.BytesIO()
    np.save(data, np.array([[print]], dtype=object))
    return data.getvalue()


def saved(array):
    data = io.BytesIO()
    np.save(data, array)
    return data.getvalue()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.npy", object_file(), "Python objects"),
        ("a.npy", pickle.dumps([1, 2]), "cannot be read as an array"),
        ("a.npy", saved(np.zeros((4, 4), np.complex64)), r"complex64 \[4, 4\], not numbers"),
        ("a.npy", saved(np.zeros(4)), r"float64 \[4\], not numbers \[H, W\] or"),
        ("a.npy", saved(np.zeros((4, 4, 3))), "has 3 channels, but n_colors is 5"),
        ("a.npy", saved(values())[:900], "cannot be read as an array"),
        ("a.npy", b"", "cannot be read as an array"),
        ("a.tif", b"II*\0 no more", "cannot be read as an array"),
    ],
)
def test_unusable_files_are_named(folder, name, content, message):
    (folder / name).write_bytes(content)
    with pytest.raises(ValueError, match=rf"a\.\w+'.*{message}") as caught:
        ImageFolder(folder, n_colors=5)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"data_range": [3, 3]}, r"data_range is \[3, 3\]"),
        ({"data_range": [0, float("inf")]}, "data_range is"),
        ({"data_range": [1]}, "data_range is"),
        ({"n_colors": 0}, "n_colors is 0"),
    ],
)
def test_bad_arguments_get_a_sentence(folder, arguments, message):
    np.save(folder / "a.npy", values())
    with pytest.raises(ValueError, match=message):
        ImageFolder(folder, **{"n_colors": 5, **arguments})


def test_infinite_values_and_mixed_dtypes_are_refused_by_name(folder):
    np.save(folder / "a.npy", values("uint16"))
    np.save(folder / "b.npy", np.full((40, 36, 5), np.inf))
    images = SRImplicitDownsampled(ImageFolder(folder, n_colors=5), 8, 2)
    with pytest.raises(ValueError, match=r"b\.npy holds float64, but a\.npy uint16: give data_range"):
        images[1]
    ranged = SRImplicitDownsampled(ImageFolder(folder, n_colors=5, data_range=[0, 9]), 8, 2)
    with pytest.raises(ValueError, match=r"b\.npy: infinite values"):
        ranged[1]


def bicubic(size, target):
    """Pillow's antialiased bicubic of one axis as a matrix [target, size], in float64."""
    scale = size / target
    stretch = max(1.0, scale)
    center = (np.arange(target)[:, None] + 0.5) * scale
    x = np.abs((np.arange(size) + 0.5 - center) / stretch)
    a = -0.5
    inner, outer = ((a + 2) * x - (a + 3)) * x * x + 1, ((x - 5) * x + 8) * x * a - 4 * a
    weights = np.where(x < 1, inner, np.where(x < 2, outer, 0))
    return weights / weights.sum(1, keepdims=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [(13, 9), (10, 12), (55, 61)])
def test_data_are_shrunk_by_the_filter_of_8_bits_without_its_rounding(dtype, size):
    array = values(dtype)
    expected = np.einsum("yh,hwc,xw->yxc", bicubic(40, size[0]), array.astype(np.float64), bicubic(36, size[1]))
    found = resize_bicubic(array, size)
    if dtype == "uint8":
        assert found.dtype == np.uint8 and np.abs(found - expected).max() < 1.5  # rounded twice
    else:
        assert found.dtype == np.float32 and np.abs(found - expected).max() < 1e-6 * 6000
        assert np.abs(found - np.rint(found)).max() > 0.1


def test_masks_are_left_out_of_means():
    array = np.full((24, 24, 2), 7.0, np.float32)
    array[..., 1] = values(height=24, width=24, channels=1)[..., 0]
    whole = resize_bicubic(array, (8, 8))
    array[6:18, 6:18, 0] = np.nan
    array[3, 4, 1] = np.nan
    shrunk = resize_bicubic(array, (8, 8))
    hole = np.isnan(shrunk[..., 0])
    assert hole[3:5, 3:5].all() and not hole[:2].any() and not hole[:, 6:].any()
    assert shrunk[..., 0][~hole] == pytest.approx(7, rel=1e-6)  # no weight of the pixels without a value
    assert not np.isnan(shrunk[..., 1]).any()
    assert np.array_equal(shrunk[4:, 4:, 1], whole[4:, 4:, 1])  # the filter does not reach the missing pixel
    near = array[2:6, 2:6, 1]
    assert np.nanmin(near) <= shrunk[1, 1, 1] <= np.nanmax(near)


@pytest.mark.parametrize("energy", [0.0, 1.0])
def test_items_hold_data_in_their_range_with_masks_in_gt_only(folder, energy):
    array = values()
    array[10:30, 12:24] = np.nan
    array[25, 30, 2] = np.nan
    np.save(folder / "a.npy", array)
    images = SRImplicitDownsampled(
        ImageFolder(folder, n_colors=5, data_range=[-1000, 1000]), scale_min=4, energy=energy, augment=False
    )
    item = images[0]
    unit = (array + 1000) / 2000
    assert item["gt"].view(40, 36, 5).numpy() == pytest.approx(unit, nan_ok=True, abs=1e-6)
    assert float(item["gt"].nan_to_num().min()) < -0.9  # nothing is clipped
    low = resize_bicubic(unit.astype(np.float32), (10, 9))
    hole = np.isnan(low)
    assert hole.any() and not item["inp"].isnan().any()
    inp = item["inp"].permute(1, 2, 0).numpy()
    assert inp[~hole] == pytest.approx(low[~hole], abs=1e-6)
    row, column, channel = np.argwhere(hole)[0]
    valid = np.argwhere(~hole[..., channel])
    nearest = valid[np.square(valid - (row, column)).sum(1).argmin()]
    assert inp[row, column, channel] == pytest.approx(low[nearest[0], nearest[1], channel], abs=1e-6)
    crop = SRImplicitDownsampled(images.dataset, 6, 2, 3, augment=True, sample_q=50, energy=energy)
    assert crop[0]["inp"].shape == (5, 6, 6) and crop[0]["gt"].shape == (50, 5) and not crop[0]["inp"].isnan().any()


def test_pairs_of_arrays(folder):
    high = values()
    for name, array in (("low", high[::2, ::2]), ("high", high)):
        (folder / name).mkdir()
        np.save(folder / name / "a.npy", array)
    roots = {"root_path_1": folder / "low", "root_path_2": folder / "high"}
    pairs = PairedImageFolders(**roots, n_colors=5, data_range=[-3000, 3000])
    item = SRImplicitPaired(pairs)[0]
    unit = torch.tensor(high / 6000 + 0.5)
    assert torch.allclose(item["inp"], unit[::2, ::2].permute(2, 0, 1)) and torch.allclose(item["gt"], unit.view(-1, 5))
    varied = SRImplicitUniformVaried(pairs, 20)[0]
    assert varied["gt"].numpy().ravel() == pytest.approx(resize_bicubic(unit.numpy(), (22, 20)).ravel(), abs=1e-6)
    np.save(folder / "low" / "a.npy", high[::2, ::2].astype(np.uint8))
    with pytest.raises(ValueError, match="hold different data: give data_range"):
        PairedImageFolders(**roots, n_colors=5)


def test_a_float_image_of_ones_own_dataset_needs_a_range_beyond_0_to_1():
    class Own(list):
        data_range = None

    own = Own([torch.full((2, 12, 12), 3.0)])
    with pytest.raises(ValueError, match=r"item 0: a float image must hold \[0, 1\], not 3 to 3; give its dataset"):
        SRImplicitDownsampled(own, 4, 2)[0]
    own.data_range = (2, 4)
    assert float(SRImplicitDownsampled(own, 4, 2)[0]["inp"].mean()) == pytest.approx(0.5)


def test_energy_of_floats_is_that_of_their_bytes():
    image = np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8)
    assert gradient_energy((image / 255).astype(np.float32)) == pytest.approx(gradient_energy(image), rel=1e-5)
    hole = np.full((40, 50, 3), np.nan, np.float32)
    assert (gradient_energy(hole) == 0).all()


def test_read_array_maps_npy_files(folder):
    np.save(folder / "a.npy", values())
    assert isinstance(read_array(folder / "a.npy", 5), np.memmap)
