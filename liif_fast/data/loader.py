"""Batches: `make_loader` turns a section of a configuration into a loader, by worker processes or on the device.

An item is a function of the seed and its number alone (epoch * items of an epoch + index), whoever makes it: with any
number of workers, split over any number of ranks, resumed in the middle of an epoch, the batches are the same.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from typing import Any, Protocol, cast

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from liif_fast.data.pictures import Item
from liif_fast.data.registry import build

KINDS = ("workers", "device")


class Loader(Protocol):
    """What `make_loader` returns."""

    dataset: Any

    def __len__(self) -> int:
        """Batches of an epoch."""

    def epoch(self, number: int = 0, skip: int = 0) -> Iterator[Item]:
        """The batches of an epoch, without the first `skip` ones."""


def make_loader(
    section: Mapping[str, Any],
    *,
    seed: int = 0,
    shuffle: bool = False,
    rank: int = 0,
    world: int = 1,
    split: str = "batches",
    workers: int | None = None,
    device: torch.device | str | None = None,
) -> Loader:
    """A loader for `{'dataset', 'wrapper', 'batch_size'[, 'loader'][, 'num_workers']}`.

    section: batch_size counts the items of all ranks together; loader is 'workers' (items on the CPU) or 'device'
        (images kept on the device, items made there).
    split: what a rank takes. 'batches': an equal, contiguous share of every batch (for training: the ranks together
        see what one process would); 'items': every world-th item in batches of its own (for evaluation).
    workers: processes that make items; None takes the section's num_workers, or 0.
    device: where the batches are used. Items made on the CPU are pinned for a GPU, not moved.
    Raises ValueError for a bad section, or a batch_size that the ranks cannot share.
    """
    kind = section.get("loader") or "workers"  # a key left empty in YAML is None
    if kind not in KINDS:
        raise ValueError(f"loader is {kind!r}; it must be one of {', '.join(KINDS)}")
    if split not in ("batches", "items"):
        raise ValueError(f"split is {split!r}; it must be 'batches' or 'items'")
    batch_size = section.get("batch_size", 1)
    if not isinstance(batch_size, int) or batch_size < 1:
        raise ValueError(f"batch_size is {batch_size!r}; it must be a whole number from 1")
    if split == "batches" and batch_size % world:
        raise ValueError(f"batch_size is {batch_size}; {world} processes need a multiple of {world} to share")
    dataset = build(section)
    place = torch.device(device or "cpu")
    numbers = Numbers(len(dataset), batch_size, seed=seed, shuffle=shuffle, rank=rank, world=world, split=split)
    if kind == "device":
        from liif_fast.data.device import DeviceLoader

        return DeviceLoader(dataset, numbers, place)
    count = (section.get("num_workers") or 0) if workers is None else workers
    return WorkerLoader(dataset, numbers, workers=count, pin_memory=place.type == "cuda")


class Numbers:
    """The numbers of the items of every batch; arguments as for `make_loader`, `length` items an epoch."""

    def __init__(
        self,
        length: int,
        batch_size: int,
        *,
        seed: int = 0,
        shuffle: bool = False,
        rank: int = 0,
        world: int = 1,
        split: str = "batches",
    ) -> None:
        self.length, self.batch_size, self.seed, self.shuffle = length, batch_size, seed, shuffle
        self.rank, self.world, self.split = rank, world, split

    def __len__(self) -> int:
        if self.split == "items":
            return -(-len(range(self.rank, self.length, self.world)) // self.batch_size)
        # A last batch that the ranks cannot share equally loses the few items too many: ranks must stay in step.
        return -(-(self.length - self.length % self.batch_size % self.world) // self.batch_size)

    def epoch(self, number: int, skip: int = 0) -> Iterator[list[int]]:
        """Lists of item numbers, `number * length` upwards, without the first `skip` batches."""
        order = np.arange(self.length)
        if self.shuffle:
            order = np.random.default_rng((self.seed, number, self.length)).permutation(self.length)
        order += number * self.length
        if self.split == "items":
            order = order[self.rank :: self.world]
        for batch in range(skip, len(self)):
            chosen = order[batch * self.batch_size : (batch + 1) * self.batch_size]
            if self.split == "batches":
                share = len(chosen) // self.world
                chosen = chosen[self.rank * share : (self.rank + 1) * share]
            yield chosen.tolist()


class WorkerLoader:
    """Items made by worker processes (or here, without any), stacked to batches on the CPU."""

    def __init__(self, dataset: Any, numbers: Numbers, *, workers: int = 0, pin_memory: bool = False) -> None:
        self.dataset, self._numbers = dataset, numbers
        self._batches = _Epoch(numbers)
        ahead: dict[str, Any] = {"prefetch_factor": 4, "persistent_workers": True} if workers else {}
        self._loader = DataLoader(
            _Numbered(dataset, numbers.seed),
            batch_sampler=cast(Any, self._batches),
            num_workers=workers,
            pin_memory=pin_memory,
            generator=torch.Generator(),  # otherwise every epoch would draw from the training's generator
            **ahead,
        )

    def __len__(self) -> int:
        return len(self._numbers)

    def epoch(self, number: int = 0, skip: int = 0) -> Iterator[Item]:
        self._batches.number, self._batches.skip = number, skip
        return iter(self._loader)


class _Epoch:
    """The batch sampler of the epoch that is to come."""

    def __init__(self, numbers: Numbers) -> None:
        self.numbers, self.number, self.skip = numbers, 0, 0

    def __iter__(self) -> Iterator[list[int]]:
        return self.numbers.epoch(self.number, self.skip)


class _Numbered(Dataset[Item]):
    """Item `number` of an endless row of epochs, from a wrapper of ours or a user's own."""

    def __init__(self, wrapper: Any, seed: int) -> None:
        self.wrapper, self.seed = wrapper, seed
        inner = getattr(wrapper, "dataset", None)
        draws_from_rng = hasattr(wrapper, "item")
        self._is_ours = draws_from_rng and (hasattr(inner, "array") or hasattr(inner, "arrays"))

    def __getitem__(self, number: int) -> Item:
        if self._is_ours:
            return self._made(number)
        # Other people's classes draw from the global generators: seeded here for this item, and put back afterwards,
        # since without workers they are those of the training.
        kept = random.getstate(), np.random.get_state()  # noqa: NPY002 (theirs to use)
        seed = int(np.random.SeedSequence((self.seed, number)).generate_state(1)[0])
        try:
            with torch.random.fork_rng(devices=[]):
                random.seed(seed)
                np.random.seed(seed)  # noqa: NPY002
                torch.default_generator.manual_seed(seed)
                return self._made(number)
        finally:
            random.setstate(kept[0])
            np.random.set_state(kept[1])  # noqa: NPY002

    def _made(self, number: int) -> Item:
        index = number % len(self.wrapper)
        if hasattr(self.wrapper, "item"):
            return self.wrapper.item(index, item_rng(self.seed, number))
        return self.wrapper[index]


def item_rng(seed: int, number: int) -> np.random.Generator:
    """The generator of an item's random decisions."""
    return np.random.default_rng((seed, number))
