"""Items of every dataset and wrapper, compared with an independent computation of the paper's data pipeline."""

import json
import os

import numpy as np
import pytest
import torch
from PIL import Image

from liif_fast.data import (
    ENERGY_BLOCK,
    ImageFolder,
    PairedImageFolders,
    SRImplicitDownsampled,
    SRImplicitPaired,
    SRImplicitUniformVaried,
    gradient_energy,
    make_dataset,
    read_pixels,
    register,
    resize_bicubic,
    shrink_whole,
)
from liif_fast.utils import memory


@pytest.fixture
def folder(tmp_path):
    """Three images of noise, 70x90, 80x64 and 61x300 pixels, and a file that is not an image."""
    rng = np.random.default_rng(0)
    images = tmp_path / "images"
    images.mkdir()
    for name, (height, width) in {"a.png": (70, 90), "b.png": (80, 64), "c.png": (61, 300)}.items():
        Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(images / name)
    (images / "notes.txt").write_text("not an image")
    return images


def wrapper(folder, **arguments):
    return SRImplicitDownsampled(ImageFolder(folder, cache="in_memory"), **arguments)


def halves(folder):
    """A folder next to the images with every second pixel of each; the arguments of PairedImageFolders."""
    small = folder.parent / "small"
    small.mkdir()
    for path in sorted(folder.glob("*.png")):
        Image.fromarray(np.array(Image.open(path))[: Image.open(path).height // 2 * 2 : 2, ::2]).save(small / path.name)
    return {"root_path_1": small, "root_path_2": folder}


def pairs(folder, **arguments):
    return SRImplicitPaired(PairedImageFolders(**halves(folder)), **arguments)


def uniform(folder, **arguments):
    return SRImplicitUniformVaried(PairedImageFolders(**halves(folder), repeat=2), **arguments)


def test_folder_repeats_its_images(folder):
    images = ImageFolder(folder, repeat=2)
    assert len(images) == 6 and images.image_count == 3 and images.name(4) == "b.png"
    expected = torch.from_numpy(np.array(Image.open(folder / "b.png"))).permute(2, 0, 1).float() / 255
    assert torch.equal(images[1], expected) and torch.equal(images[4], expected)


def test_folder_takes_a_split_and_the_first_k(folder):
    (folder / "split.json").write_text(json.dumps({"val": ["c.png", "a.png"], "gone": ["a.png", "d.png"]}))
    images = ImageFolder(folder, split_file=folder / "split.json", split_key="val")
    assert [images.name(index) for index in range(len(images))] == ["c.png", "a.png"]
    assert [path.name for path in ImageFolder(folder, first_k=2).paths] == ["a.png", "b.png"]
    for key, message in (("test", "'test'.*'val', 'gone'"), ("gone", r"'d\.png'.*1 of 2")):
        with pytest.raises(ValueError, match=message):
            ImageFolder(folder, split_file=folder / "split.json", split_key=key)


def test_disk_cache_is_made_once_and_anew_for_a_newer_image(folder):
    images = ImageFolder(folder, cache="bin")
    copy = folder.parent / f"_bin_{folder.name}" / "b.png.3.npy"
    made = copy.stat().st_mtime_ns
    assert np.array_equal(np.load(copy), np.array(Image.open(folder / "b.png")))
    assert isinstance(images.array(1), np.memmap)
    ImageFolder(folder, cache="bin")
    assert copy.stat().st_mtime_ns == made
    Image.fromarray(np.full((20, 30, 3), 7, np.uint8)).save(folder / "b.png")
    os.utime(folder / "b.png", (made / 1e9 + 10,) * 2)
    assert ImageFolder(folder, cache="bin")[1].shape == (3, 20, 30)


@pytest.mark.parametrize(("n_colors", "mode"), [(1, "L"), (3, "RGB"), (4, "RGBA")])
@pytest.mark.parametrize("cache", ["none", "in_memory", "bin"])
def test_folder_decodes_to_the_number_of_colors_in_every_cache(tmp_path, n_colors, mode, cache):
    (tmp_path / "images").mkdir()
    rgba = np.random.default_rng(0).integers(0, 256, (20, 24, 4), dtype=np.uint8)
    Image.fromarray(rgba).save(tmp_path / "images" / "a.png")
    images = ImageFolder(tmp_path / "images", n_colors=n_colors, cache=cache)
    expected = np.asarray(Image.fromarray(rgba).convert(mode)).reshape(20, 24, n_colors)
    assert np.array_equal(images.array(0), expected) and images[0].shape == (n_colors, 20, 24)
    item = SRImplicitDownsampled(images, 8, 2, sample_q=10)[0]
    assert item["inp"].shape == (n_colors, 8, 8) and item["gt"].shape == (10, n_colors)


def test_a_fourth_channel_does_not_change_the_others():
    """Pillow's own resize of RGBA multiplies by the opacity first."""
    image = np.random.default_rng(0).integers(0, 256, (16, 16, 4), dtype=np.uint8)
    planes = [Image.fromarray(image[..., each]).resize((5, 6), Image.Resampling.BICUBIC) for each in range(4)]
    assert np.array_equal(resize_bicubic(image, (6, 5)), np.stack([np.asarray(plane) for plane in planes], axis=-1))


def test_16_bit_gray_files_are_scaled_not_clipped(tmp_path):
    deep = np.arange(0, 65536, 257, dtype=np.uint16).reshape(16, 16)
    Image.fromarray(deep).save(tmp_path / "deep.png")
    assert np.array_equal(read_pixels(tmp_path / "deep.png", 1)[..., 0], deep // 257)
    assert np.array_equal(read_pixels(tmp_path / "deep.png")[..., 2], deep // 257)


def test_shrunken_copies_follow_the_images_and_small_ones_are_left_out(folder):
    Image.fromarray(np.full((600, 520, 3), 99, dtype=np.uint8)).save(folder / "large.png")
    images = ImageFolder(folder, shrink=(1, 2))
    shapes = [images.array(index).shape[:2] for index in range(len(images))]
    assert shapes == [(70, 90), (80, 64), (61, 300), (600, 520), (300, 260)]
    assert (images.array(4) == 99).all()


@pytest.mark.parametrize("scale", [2, 3, 2.5, 7.3])
def test_whole_image_pair(folder, scale):
    image = np.array(Image.open(folder / "a.png"))
    low, high = shrink_whole(image, scale)
    height, width = int(70 / scale + 1e-9), int(90 / scale + 1e-9)
    assert low.shape == (height, width, 3)
    assert np.array_equal(high, image[: round(height * scale), : round(width * scale)])
    expected = Image.fromarray(high).resize((width, height), Image.Resampling.BICUBIC)
    assert np.array_equal(low, np.array(expected))


def test_whole_image_item_has_every_pixel_once_in_order(folder):
    item = wrapper(folder, scale_min=2)[1]
    assert item["inp"].shape == (3, 40, 32) and item["gt"].shape == (80 * 64, 3)
    image = torch.from_numpy(np.array(Image.open(folder / "b.png"))).float() / 255
    assert torch.equal(item["gt"].view(80, 64, 3), image)
    coord = item["coord"].view(80, 64, 2)
    assert torch.allclose(coord[5, 7], torch.tensor([-1 + 11 / 80, -1 + 15 / 64]), atol=1e-7)
    assert torch.equal(item["cell"], torch.tensor([2 / 80, 2 / 64]).expand(80 * 64, 2))


@pytest.mark.parametrize("energy", [0.0, 1.0])
@pytest.mark.parametrize("augment", [False, True])
def test_crop_item_is_a_shrunken_crop_and_samples_of_it(folder, energy, augment):
    """The item's coordinates, mapped back to pixels, must name the crop's colors, and shrinking it must give inp."""
    images = wrapper(folder, inp_size=12, scale_min=1, scale_max=4, augment=augment, sample_q=144, energy=energy)
    for index in range(6):
        item = images[index]
        side = round(float(2 / item["cell"][0, 0]))
        assert 12 <= side <= 48 and torch.equal(item["cell"][:, 0], item["cell"][:, 1])
        pixel = torch.round(((item["coord"] + 1) * side - 1) / 2).long()
        assert len({tuple(place) for place in pixel.tolist()}) == 144  # without replacement
        image = np.array(Image.open(images.dataset.paths[index % 3]))
        low = find_crop_and_shrink(image, item, pixel.numpy(), side, augment)
        assert np.array_equal(np.rint(item["inp"].permute(1, 2, 0).numpy() * 255), low)


def test_pairs_whole(folder):
    """The large image is cut to twice the small one: 61 rows to 60."""
    item = pairs(folder)[2]
    image = np.array(Image.open(folder / "c.png"))
    assert torch.equal(item["inp"], torch.from_numpy(image[:60:2, ::2].copy()).permute(2, 0, 1) / 255)
    assert torch.equal(item["gt"].view(60, 300, 3), torch.from_numpy(image[:60]) / 255)


@pytest.mark.parametrize("augment", [False, True])
def test_pairs_cut_at_the_same_place(folder, augment):
    images = pairs(folder, inp_size=10, augment=augment)
    turned = []
    for index in range(9):
        item = images[index]
        inp = np.rint(item["inp"].permute(1, 2, 0).numpy() * 255)
        gt = np.rint(item["gt"].view(20, 20, 3).numpy() * 255)
        # Every second pixel of the large crop, from a corner that the flips decide, is the small crop.
        starts = [at for at in ((0, 0), (0, 1), (1, 0), (1, 1)) if np.array_equal(gt[at[0] :: 2, at[1] :: 2], inp)]
        turned += starts
        assert len(starts) == 1
    assert len(set(turned)) > 1 if augment else set(turned) == {(0, 0)}


def test_pairs_of_wrong_sizes_or_numbers_are_refused(folder, tmp_path):
    roots = halves(folder)
    swapped = PairedImageFolders(roots["root_path_2"], roots["root_path_1"])
    with pytest.raises(ValueError, match=r"a\.png: its 70x90 pixels and .* differ by no whole factor"):
        SRImplicitPaired(swapped)[0]
    (roots["root_path_1"] / "a.png").unlink()
    with pytest.raises(ValueError, match=r"holds 2 images and .* 3"):
        PairedImageFolders(**roots)


def test_uniform_varied_grows_with_the_items_number(folder):
    images = uniform(folder, size_min=20, size_max=40, sample_q=100)
    for index, side in enumerate([20, 24, 28, 32, 36, 40]):
        item = images[index]
        path = sorted(folder.glob("*.png"))[index % 3]
        height, width = np.array(Image.open(path)).shape[:2]
        size = (side, int(side * width / height)) if height <= width else (int(side * height / width), side)
        assert torch.allclose(item["cell"][0], torch.tensor([2 / size[0], 2 / size[1]]))
        large = np.asarray(Image.open(path).resize((size[1], size[0]), Image.Resampling.BICUBIC))
        row, col = (torch.round(((item["coord"][:, a] + 1) * size[a] - 1) / 2).long().numpy() for a in (0, 1))
        assert np.array_equal(np.rint(item["gt"].numpy() * 255), large[row, col])


def test_uniform_varied_resizes_again_and_flips_columns_only(folder):
    images = uniform(folder, size_min=20, size_max=40, gt_resize=16, augment=True)
    plain = SRImplicitUniformVaried(images.dataset, images.size_min, images.size_max, gt_resize=images.gt_resize)
    flipped = 0
    for index in range(6):
        item, other = images[index], plain[index]
        assert item["gt"].shape == other["gt"].shape and min(item["inp"].shape[1:]) >= 30
        width = round(float(2 / item["cell"][0, 1]))
        gt, straight = (each["gt"].view(-1, width, 3) for each in (item, other))
        assert gt.shape[0] == 16 or width == 16
        if not torch.equal(item["inp"], other["inp"]):
            flipped += 1
            item["inp"], gt = item["inp"].flip(-1), gt.flip(1)
        assert torch.equal(item["inp"], other["inp"]) and (gt - straight).abs().max() < 2 / 255
    assert 0 < flipped < 6


def find_crop_and_shrink(image, item, pixel, side, augment):
    """Find the only crop, in any allowed orientation, whose pixels are the item's samples; return it shrunk."""
    colors = np.rint(item["gt"].numpy() * 255).astype(np.uint8)
    found = []
    for flips in range(8 if augment else 1):

        def turn(picture, flips=flips):
            picture = picture[::-1] if flips & 1 else picture
            picture = picture[:, ::-1] if flips & 2 else picture
            return picture.swapaxes(0, 1) if flips & 4 else picture

        rows, cols = np.divmod(turn(np.arange(side * side).reshape(side, side))[pixel[:, 0], pixel[:, 1]], side)
        corners = np.argwhere((image == colors[0]).all(axis=2)) - (rows[0], cols[0])
        for top, left in corners[(corners >= 0).all(axis=1) & (corners + side <= image.shape[:2]).all(axis=1)]:
            if np.array_equal(image[top + rows, left + cols], colors):
                crop = Image.fromarray(image[top : top + side, left : left + side])
                found.append(turn(np.array(crop.resize((12, 12), Image.Resampling.BICUBIC))))
    assert len(found) == 1
    return found[0]


def test_items_are_reproducible_and_differ_between_seeds_and_numbers(folder):
    arguments = {"inp_size": 12, "scale_max": 4, "augment": True, "sample_q": 20}
    first, again = wrapper(folder, **arguments), wrapper(folder, **arguments)
    other = wrapper(folder, **arguments, seed=1)
    for key in ("inp", "coord", "cell", "gt"):
        assert torch.equal(first[3][key], again[3][key])
    assert not torch.equal(first[3]["gt"], other[3]["gt"])
    assert not torch.equal(first[0]["gt"], first[3]["gt"])  # the same image, another draw


def test_scales_are_uniform_between_their_limits(folder):
    images = wrapper(folder, inp_size=15, scale_min=2, scale_max=4, sample_q=1)
    rng = np.random.default_rng(0)
    sides = np.array([float(2 / images.item(0, rng)["cell"][0, 0]) for _ in range(400)])
    assert sides.min() >= 30 - 0.5 and sides.max() <= 60 + 0.5
    counts = np.histogram(sides, bins=4, range=(30, 60))[0]
    assert counts.min() > 60  # 100 expected, standard deviation 9


def test_gradient_energy_by_hand():
    image = np.zeros((ENERGY_BLOCK, 2 * ENERGY_BLOCK + 3, 3), dtype=np.uint8)
    image[:, ENERGY_BLOCK + 5 :] = 30  # one edge of 30 levels inside the second block
    energy = gradient_energy(image)
    assert energy.shape == (1, 3)
    assert np.allclose(energy, [[0, 30 / ENERGY_BLOCK, 0]])


def test_energy_draws_crops_where_the_detail_is(tmp_path):
    half = np.full((128, 128, 3), 128, dtype=np.uint8)
    half[:, 64:] = np.random.default_rng(0).integers(0, 256, (128, 64, 3))
    Image.fromarray(half).save(tmp_path / "half.png")
    rng = np.random.default_rng(1)

    def share_of_detail(energy):
        images = wrapper(tmp_path, inp_size=16, sample_q=256, energy=energy)
        return np.mean([float(images.item(0, rng)["gt"].std()) > 0.05 for _ in range(200)])

    assert share_of_detail(0.0) < 0.7  # 64 of 113 crops touch the right half
    assert share_of_detail(1.0) > 0.95


def test_registry_builds_by_name_and_leaves_the_spec_alone(folder):
    spec = {"name": "image-folder", "args": {"root_path": str(folder), "first_k": 1}}
    images = make_dataset(spec, {"repeat": 3})
    assert len(images) == 3 and spec["args"] == {"root_path": str(folder), "first_k": 1}
    pairs = make_dataset({"name": "sr-implicit-downsampled", "args": {"scale_min": 2}}, {"dataset": images})
    assert pairs[0]["inp"].shape == (3, 35, 45)

    @register("test-constant")
    class Constant:
        def __init__(self, value):
            self.value = value

    assert make_dataset({"name": "test-constant", "args": {"value": 3}}).value == 3


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda folder: ImageFolder(folder / "none"), "does not exist"),
        (lambda folder: ImageFolder(folder, cache="disk"), "'disk'"),
        (lambda folder: ImageFolder(folder, repeat=0), "repeat"),
        (lambda folder: ImageFolder(folder, first_k=0), "first_k is 0"),
        (lambda folder: ImageFolder(folder, n_colors=2), "n_colors is 2"),
        (lambda folder: ImageFolder(folder, cache="bin", shrink=(2,)), "in_memory"),
        (lambda folder: ImageFolder(folder, split_file=folder / "none.json"), r"none\.json"),
        (lambda folder: ImageFolder(folder, split_file=folder / "notes.txt"), "not JSON"),
        (lambda folder: uniform(folder, size_min=9, size_max=8), "9 to 8"),
        (lambda folder: pairs(folder, sample_q=0), "sample_q is 0"),
        (lambda folder: pairs(folder, inp_size=60)[0], r"a\.png: 35x45 pixels are less than a crop of 60x60"),
        (lambda folder: make_dataset({"name": "image-folder", "args": {"root": "."}}), "'image-folder'.*root"),
        (lambda folder: wrapper(folder, scale_min=3, scale_max=2), "3 to 2"),
        (lambda folder: wrapper(folder, inp_size=0), "inp_size is 0"),
        (lambda folder: wrapper(folder, inp_size=8, sample_q=65), "sample_q is 65"),
        (lambda folder: wrapper(folder, inp_size=48, scale_min=2)[0], r"a\.png: 70x90"),
        (lambda folder: wrapper(folder, scale_min=100)[0], r"a\.png: .*cannot be shrunk by 100"),
        (lambda folder: make_dataset({"name": "image-foler"}), "image-folder"),
    ],
)
def test_bad_arguments_get_a_sentence(folder, act, message):
    with pytest.raises(ValueError, match=message):
        act(folder)


def test_a_cache_that_does_not_fit_is_refused_before_it_is_filled(folder, monkeypatch):
    monkeypatch.setattr(memory, "available", lambda: 10_000)
    with pytest.raises(memory.NotEnoughMemory, match=r"89.2 kB of memory, but 10 kB are available: use cache 'bin'"):
        ImageFolder(folder, cache="in_memory")
    needed = (70 * 90 + 80 * 64 + 61 * 300) * 3
    monkeypatch.setattr(memory, "available", lambda: needed)
    assert sum(image.nbytes for image in ImageFolder(folder, cache="in_memory")._cache) == needed  # bytes, not floats


def test_a_broken_copy_on_disk_is_made_again(folder):
    ImageFolder(folder, cache="bin")
    copy = folder.parent / f"_bin_{folder.name}" / "b.png.3.npy"
    whole = copy.read_bytes()
    for content in (b"", whole[:500], b"no array at all", whole[:8]):
        copy.write_bytes(content)
        images = ImageFolder(folder, cache="bin")
        assert copy.read_bytes() == whole and images[1].shape == (3, 80, 64)
    copy.write_bytes(b"damaged during a run")
    with pytest.raises(ValueError, match=r"b\.png\.3\.npy' cannot be read as an array"):
        images[1]


def test_folders_and_hidden_files_are_no_images_and_the_rest_is_told_once(folder, caplog):
    (folder / "more.png").mkdir()
    for name in ("._a.png", ".b.png"):
        (folder / name).write_bytes(b"a resource fork")
    np.save(folder / "extra.npy", np.zeros((9, 9)))
    caplog.set_level("INFO", logger="liif_fast")
    for _ in range(2):
        assert [path.name for path in ImageFolder(folder).paths] == ["a.png", "b.png", "c.png"]
    told = [record.message for record in caplog.records]
    assert told == [f"{folder} holds 3 images; left out: extra.npy, more.png, notes.txt"]


def test_an_empty_folder_and_a_broken_image_are_named(tmp_path):
    with pytest.raises(ValueError, match="holds no image"):
        ImageFolder(tmp_path)
    (tmp_path / "broken.png").write_bytes(b"\x89PNG but no more")
    with pytest.raises(ValueError, match=r"broken\.png"):
        ImageFolder(tmp_path, cache="in_memory")
