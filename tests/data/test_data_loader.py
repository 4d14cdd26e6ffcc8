"""Loaders: batches that depend on seed and number alone, and the device pipeline against the workers' items."""

import itertools
import random

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import Dataset

from liif_fast.data import make_loader, register
from liif_fast.data.device import DeviceLoader
from liif_fast.data.loader import Numbers
from liif_fast.data.resize import resize_squares

KEYS = ("inp", "coord", "cell", "gt")
NEEDS_GPU = pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here"))


@pytest.fixture
def folder(tmp_path):
    """Five noisy pictures of different sizes under hr/, and their halves under lr/."""
    rng = np.random.default_rng(0)
    for name in ("hr", "lr"):
        (tmp_path / name).mkdir()
    for index in range(5):
        height, width = 70 + 2 * index, 90 - 4 * index
        large = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(large).save(tmp_path / "hr" / f"{index}.png")
        Image.fromarray(large[::2, ::2]).save(tmp_path / "lr" / f"{index}.png")
    return tmp_path


def section(folder, *, batch_size=4, repeat=3, n_colors=3, **wrapper):
    arguments = {"inp_size": 12, "scale_min": 1, "scale_max": 4, "augment": True, "sample_q": 50, **wrapper}
    return {
        "dataset": {
            "name": "image-folder",
            "args": {"root_path": str(folder / "hr"), "repeat": repeat, "cache": "in_memory", "n_colors": n_colors},
        },
        "wrapper": {"name": "sr-implicit-downsampled", "args": arguments},
        "batch_size": batch_size,
    }


def pairs(folder, **wrapper):
    roots = {"root_path_1": str(folder / "lr"), "root_path_2": str(folder / "hr")}
    arguments = {"inp_size": 10, "augment": True, "sample_q": 30, **wrapper}
    return {
        "dataset": {"name": "paired-image-folders", "args": roots},
        "wrapper": {"name": "sr-implicit-paired", "args": arguments},
        "batch_size": 3,
    }


def assert_same(first, second):
    assert len(first) == len(second) > 0
    for one, other in zip(first, second, strict=True):
        for key in KEYS:
            assert torch.equal(one[key], other[key]), key


def flat(batches):
    return list(itertools.chain.from_iterable(batches))


def joined(parts):
    return [{key: torch.cat([part[key] for part in batch]) for key in KEYS} for batch in zip(*parts, strict=True)]


def test_an_epoch_takes_every_item_once_and_epochs_differ():
    numbers = Numbers(10, 4, seed=5, shuffle=True)
    first, second = list(numbers.epoch(0)), list(numbers.epoch(1))
    assert len(numbers) == 3 and [len(batch) for batch in first] == [4, 4, 2]
    assert sorted(flat(first)) == list(range(10)) and sorted(flat(second)) == list(range(10, 20))
    assert [number + 10 for number in flat(first)] != flat(second)
    assert list(numbers.epoch(0, skip=1)) == first[1:]
    assert list(Numbers(10, 4).epoch(2)) == [[20, 21, 22, 23], [24, 25, 26, 27], [28, 29]]


def test_ranks_share_every_batch_equally():
    whole = list(Numbers(11, 4, seed=1, shuffle=True).epoch(3))
    ranks = [list(Numbers(11, 4, seed=1, shuffle=True, rank=rank, world=2).epoch(3)) for rank in range(2)]
    shares = [first + second for first, second in zip(*ranks, strict=True)]
    assert shares == [whole[0], whole[1], whole[2][:2]]  # three items are left, and two ranks can share two of them
    evaluation = [flat(Numbers(7, 2, rank=rank, world=3, split="items").epoch(0)) for rank in range(3)]
    assert evaluation == [[0, 3, 6], [1, 4], [2, 5]]
    for rank in range(3):
        numbers = Numbers(7, 2, rank=rank, world=3, split="items")
        assert len(numbers) == len(list(numbers.epoch(0)))


@pytest.mark.parametrize("kind", ["workers", "device"])
def test_batches_do_not_depend_on_ranks_or_on_where_an_epoch_is_entered(folder, kind):
    spec = {**section(folder), "loader": kind}
    whole = list(make_loader(spec, seed=3, shuffle=True).epoch(2))
    assert_same(list(make_loader(spec, seed=3, shuffle=True).epoch(2, skip=2)), whole[2:])
    ranks = [list(make_loader(spec, seed=3, shuffle=True, rank=rank, world=2).epoch(2)) for rank in range(2)]
    assert_same(joined(ranks)[:3], whole[:3])
    other = list(make_loader(spec, seed=4, shuffle=True).epoch(2))
    assert not torch.equal(other[0]["inp"], whole[0]["inp"])


def test_batches_do_not_depend_on_the_number_of_workers(folder):
    spec = section(folder)
    here = make_loader(spec, seed=3, shuffle=True)
    elsewhere = make_loader({**spec, "num_workers": 2}, seed=3, shuffle=True)
    for epoch in range(2):  # the workers live on into the second
        assert_same(list(elsewhere.epoch(epoch)), list(here.epoch(epoch)))
        next(elsewhere.epoch(5))  # left after its first batch, with others on their way


@register("test-global-draws")
class GlobalDraws(Dataset):
    """A user's own class, which draws from every global generator."""

    def __len__(self):
        return 6

    def __getitem__(self, index):
        draws = [random.random(), np.random.random(), float(torch.rand(()))]  # noqa: NPY002
        return torch.tensor(draws).view(3, 1, 1).expand(3, 16, 16) * (index + 1) / 6


def test_users_own_datasets_are_reproducible_and_leave_the_generators_alone():
    spec = {
        "dataset": {"name": "test-global-draws"},
        "wrapper": {"name": "sr-implicit-downsampled", "args": {"inp_size": 4, "scale_max": 2, "sample_q": 5}},
        "batch_size": 2,
    }
    state = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    here = list(make_loader(spec, seed=1).epoch(1))
    assert torch.equal(torch.get_rng_state(), state[0])
    assert np.array_equal(np.random.get_state()[1], state[1])  # noqa: NPY002
    assert_same(list(make_loader({**spec, "num_workers": 2}, seed=1).epoch(1)), here)
    assert not torch.equal(next(make_loader(spec, seed=1).epoch(2))["gt"], here[0]["gt"])
    assert torch.allclose(here[0]["gt"][0], here[0]["gt"][0, :1].expand(5, 3))  # floats stay what they are
    assert (here[0]["gt"] * 255 - (here[0]["gt"] * 255).round()).abs().max() > 1e-3


def test_resizing_squares_equals_pillow_at_every_size():
    """Sizes that are fractional multiples from x1 to x4, several in one batch, at noise and at hard edges."""
    rng = np.random.default_rng(0)
    squares = rng.integers(0, 256, (9, 3, 96, 96), dtype=np.uint8)
    squares[4:] = np.where(squares[4:] > 127, 255, 0)
    sides = [24, 25, 31, 40, 48, 61, 77, 95, 96]
    result = resize_squares(torch.from_numpy(squares), torch.tensor(sides), 24)
    for square, side, mine in zip(squares, sides, result, strict=True):
        for plane, out in zip(square, mine, strict=True):
            pillow = Image.fromarray(plane[:side, :side]).resize((24, 24), Image.Resampling.BICUBIC)
            assert np.array_equal(out.numpy(), np.asarray(pillow).astype(float))


def worker_items_with_every_pixel(spec, epoch):
    """The workers' items of the same numbers, with all pixels of the crop instead of a sample."""
    spec = {**spec, "wrapper": {**spec["wrapper"], "args": {**spec["wrapper"]["args"], "sample_q": None}}}
    spec["batch_size"] = 1
    return list(make_loader(spec, seed=7, shuffle=True).epoch(epoch))


@pytest.mark.parametrize(
    "make",
    [
        section,
        pairs,
        lambda f: section(f, n_colors=1),
        lambda f: section(f, n_colors=4, energy=1.0),
        lambda f: pairs(f, sample_q=None),
        lambda f: section(f, scale_min=2.5, scale_max=2.5, sample_q=None),
    ],
)
@pytest.mark.parametrize("device", ["cpu", NEEDS_GPU])
def test_device_items_are_the_workers(folder, make, device):
    spec = make(folder)
    loader = make_loader({**spec, "loader": "device"}, seed=7, shuffle=True, device=device)
    batches = [{key: value.cpu() for key, value in batch.items()} for batch in loader.epoch(1)]
    assert isinstance(loader, DeviceLoader) and len(batches) == len(loader)
    items = [{key: batch[key][each] for key in KEYS} for batch in batches for each in range(len(batch["inp"]))]
    expected = worker_items_with_every_pixel(spec, 1)
    count = spec["wrapper"]["args"]["sample_q"]
    turned = set()
    for item, full in zip(items, expected, strict=True):
        assert torch.equal(item["inp"], full["inp"][0])
        side = round(float(2 / full["cell"][0, 0, 0]))
        assert torch.equal(item["cell"], full["cell"][0, :count])
        row, col = (torch.round(((item["coord"][:, axis] + 1) * side - 1) / 2).long() for axis in (0, 1))
        assert len(set((row * side + col).tolist())) == (count or side**2)
        assert torch.equal(item["coord"], full["coord"][0, row * side + col])
        assert torch.equal(item["gt"], full["gt"][0, row * side + col])
        turned.add(int(row[0] * side + col[0]))
    assert count is None or len(turned) > len(items) // 2  # every item its own sample


@pytest.mark.parametrize("device", [NEEDS_GPU])
def test_the_host_never_waits_for_the_device(folder, device):
    loader = make_loader({**section(folder), "loader": "device"}, shuffle=True, device=device)
    batches = loader.epoch()
    next(batches)  # what is set up once may wait
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in batches:
            pass
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_device_samples_are_uniform_over_the_crop(folder):
    spec = section(folder, repeat=40, scale_max=1, sample_q=36)  # 12x12 pixels, a quarter of them
    counts = torch.zeros(144)
    for batch in make_loader({**spec, "loader": "device"}).epoch():
        place = torch.round(((batch["coord"] + 1) * 12 - 1) / 2).long()
        counts += torch.bincount((place[..., 0] * 12 + place[..., 1]).flatten(), minlength=144)
    # 200 draws of probability 1/4 each: 50 expected, standard deviation 6.1
    assert counts.sum() == 200 * 36 and counts.min() > 25 and counts.max() < 75


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"loader": "gpu"}, "'gpu'"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"loader": "device", "wrapper": {"name": "sr-implicit-downsampled", "args": {"scale_min": 2}}}, "inp_size"),
        ({"wrapper": {"name": "sr-implicit-downsampled", "args": {"scale": 2}}}, "'sr-implicit-downsampled'.*scale"),
        (
            {"loader": "device", "dataset": {"name": "test-global-draws"}},
            "image-folder",
        ),
    ],
)
def test_bad_sections_get_a_sentence(folder, change, message):
    with pytest.raises(ValueError, match=message):
        make_loader({**section(folder), **change})


def test_ranks_that_cannot_share_a_batch_are_refused(folder):
    with pytest.raises(ValueError, match="batch_size is 4; 3 processes need a multiple of 3"):
        make_loader(section(folder), world=3)


def test_too_small_an_image_is_named_by_both_loaders(folder):
    for kind in ("workers", "device"):
        with pytest.raises(ValueError, match=r"'\d\.png' has 7.x\d\d pixels, less than a crop of 96x96"):
            list(make_loader({**section(folder, inp_size=24, scale_min=4), "loader": kind}).epoch())
