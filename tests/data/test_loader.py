"""Loaders: batches depend only on the seed and on the items' numbers."""

import gc
import itertools
import os
import random

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import Dataset

from liif_fast.data import explaining_killed_workers, make_loader, register
from liif_fast.data.errors import WorkerTraceback
from liif_fast.data.numbering import Numbers

KEYS = ("inp", "coord", "cell", "gt")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Five noisy images of different sizes."""
    rng = np.random.default_rng(0)
    path = tmp_path_factory.mktemp("images")
    for index in range(5):
        pixels = rng.integers(0, 256, (70 + 2 * index, 90 - 4 * index, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path / f"{index}.png")
    return path


def section(folder, **wrapper):
    arguments = {"inp_size": 12, "scale_min": 1, "scale_max": 4, "augment": True, "sample_q": 50, **wrapper}
    dataset = {"root_path": str(folder), "repeat": 3, "cache": "in_memory"}
    return {
        "dataset": {"name": "image-folder", "args": dataset},
        "wrapper": {"name": "sr-implicit-downsampled", "args": arguments},
        "batch_size": 4,
    }


def assert_same(first, second):
    assert len(first) == len(second) > 0
    for one, other in zip(first, second, strict=True):
        for key in KEYS:
            assert torch.equal(one[key], other[key]), key


def flat(batches):
    return list(itertools.chain.from_iterable(batches))


def test_an_epoch_uses_every_item_once_and_epochs_differ():
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
    assert shares == [whole[0], whole[1], whole[2][:2]]  # three items are left, of which two ranks can share two
    evaluation = [Numbers(7, 2, rank=rank, world=3, split="items") for rank in range(3)]
    assert [flat(numbers.epoch(0)) for numbers in evaluation] == [[0, 3, 6], [1, 4], [2, 5]]
    assert [len(numbers) for numbers in evaluation] == [2, 1, 1]


def test_batches_do_not_depend_on_ranks_or_on_the_first_batch(folder):
    spec = section(folder)
    whole = list(make_loader(spec, seed=3, shuffle=True).epoch(2))
    assert_same(list(make_loader(spec, seed=3, shuffle=True).epoch(2, skip=2)), whole[2:])
    ranks = [list(make_loader(spec, seed=3, shuffle=True, rank=rank, world=2).epoch(2)) for rank in range(2)]
    joined = [{key: torch.cat([part[key] for part in batch]) for key in KEYS} for batch in zip(*ranks, strict=True)]
    assert_same(joined[:3], whole[:3])
    other = next(make_loader(spec, seed=4, shuffle=True).epoch(2))
    assert not torch.equal(other["inp"], whole[0]["inp"])


def test_batches_do_not_depend_on_the_number_of_workers(folder):
    spec = section(folder)
    here = make_loader(spec, seed=3, shuffle=True)
    elsewhere = make_loader({**spec, "num_workers": 2}, seed=3, shuffle=True)
    for epoch in range(2):  # the same workers make both epochs
        assert_same(list(elsewhere.epoch(epoch)), list(here.epoch(epoch)))
        next(elsewhere.epoch(5))  # abandoned after its first batch, while workers make others


@register("test-global-draws")
class GlobalDraws(Dataset):
    """A user's own class, which draws from every global generator."""

    def __len__(self):
        return 6

    def __getitem__(self, index):
        draws = [random.random(), np.random.random(), float(torch.rand(()))]  # noqa: NPY002
        return torch.tensor(draws).view(3, 1, 1).expand(3, 16, 16) * (index + 1) / 6


def test_users_own_datasets_are_reproducible_and_do_not_change_the_generators():
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
    assert torch.allclose(here[0]["gt"][0], here[0]["gt"][0, :1].expand(5, 3))  # floats are not rounded to 8 bits
    assert (here[0]["gt"] * 255 - (here[0]["gt"] * 255).round()).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        ({"loader": "device"}, {}, "loader is no longer a key.* set cache: in_memory"),
        ({"batch_size": 0}, {}, "batch_size is 0"),
        ({"wrapper": {"name": "sr-implicit-downsampled", "args": {"scale": 2}}}, {}, "downsampled'.*scale"),
        ({}, {"world": 3}, "batch_size is 4; 3 processes need a multiple of 3"),
        ({}, {"split": "half"}, "split is 'half'"),
    ],
)
def test_bad_sections_get_a_sentence(folder, change, options, message):
    with pytest.raises(ValueError, match=message):
        make_loader({**section(folder), **change}, **options)


class Unsendable(Exception):
    """An exception that does not survive the way from another process."""

    def __init__(self, first, second):
        super().__init__(f"{first}\n{second}")


@register("test-own-failure")
class OwnFailure(Dataset):
    """A user's own class with one bad item."""

    def __init__(self, act):
        self.act = act

    def __len__(self):
        return 4

    def __getitem__(self, index):
        if index == 2:
            OWN[self.act]()
        return torch.zeros(3, 16, 16)


def unsendable():
    raise Unsendable("no sky", "in scene 7")


OWN = {
    "lookup": lambda: {}["sky"],
    "unsendable": unsendable,
    "numpy": lambda: np.zeros(3) + np.zeros(4),
    "memory": lambda: (_ for _ in ()).throw(MemoryError()),
    "kill": lambda: os.kill(os.getpid(), 9),
}


def vanish(path):
    (path / "1.png").unlink()


def damage(path):
    (path / "1.png").write_bytes((path / "1.png").read_bytes()[:300])


@pytest.mark.parametrize(
    ("wrapper", "act", "message"),
    [
        ({"inp_size": 20, "scale_min": 4}, None, r"0\.png: 70x90 pixels are less than a crop of 80x80"),
        ({"inp_size": None, "sample_q": None, "scale_min": 30}, None, r"0\.png: .*70x90.*shrunk by \d\d"),
        (
            {"inp_size": None, "sample_q": None},
            None,
            r"inp is \[3, .*for 0\.png and \[3, .* for 1\.png; .* batch_size 1",
        ),
        ({}, vanish, r"'\S+1\.png' cannot be read as an image"),
        ({}, damage, r"'\S+1\.png' cannot be read as an image"),
    ],
)
def test_errors_have_the_same_sentence_with_and_without_workers(tmp_path, folder, wrapper, act, message):
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    spec = section(tmp_path, **wrapper)
    spec["dataset"]["args"]["cache"] = "none"
    if wrapper.get("scale_min") == 30:
        spec["wrapper"]["args"]["scale_max"] = 100
    loaders, sentences = [make_loader({**spec, "num_workers": workers}) for workers in (0, 2)], []
    if act is not None:
        act(tmp_path)
    for loader in loaders:
        with pytest.raises(ValueError, match=message) as caught:
            list(loader.epoch())
        sentences.append(str(caught.value))
    assert sentences[0] == sentences[1] and "\n" not in sentences[0]
    assert isinstance(caught.value.__cause__, WorkerTraceback) and "Traceback" in str(caught.value.__cause__)
    del caught, loader, loaders
    gc.collect()  # ends the workers now


@pytest.mark.parametrize(
    ("act", "kind", "sentence"),
    [
        ("lookup", RuntimeError, "item 2: KeyError: 'sky'"),
        ("unsendable", RuntimeError, "item 2: Unsendable: no sky"),
        ("numpy", ValueError, "item 2: ValueError: operands could not be broadcast together with shapes (3,) (4,)"),
        ("memory", MemoryError, "item 2: MemoryError"),
        ("kill", RuntimeError, "a loader process ended (DataLoader worker (pid"),
    ],
)
def test_failures_of_a_users_dataset_name_item_type_and_message(act, kind, sentence):
    spec = {
        "dataset": {"name": "test-own-failure", "args": {"act": act}},
        "wrapper": {"name": "sr-implicit-downsampled", "args": {"inp_size": 4, "scale_max": 2, "sample_q": 5}},
        "batch_size": 2,
    }
    for workers in (0, 2) if act != "kill" else (2,):
        with pytest.raises(kind) as caught, explaining_killed_workers():
            list(make_loader({**spec, "num_workers": workers}).epoch())
        assert str(caught.value).startswith(sentence)
        del caught
        gc.collect()  # ends the workers now


def test_names_follow_the_items_of_a_rank(folder):
    loader = make_loader(section(folder), split="items", rank=1, world=2)
    assert list(loader.names()) == [f"{number % 5}.png" for number in range(1, 15, 2)]
