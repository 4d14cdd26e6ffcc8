"""Batches: `make_loader` turns a section of a configuration into a loader with worker processes.

An item depends only on the seed and on its number (epoch * items per epoch + index). Batches are therefore the same
for any number of workers, for any number of ranks, and when a run resumes in the middle of an epoch.
"""

from __future__ import annotations

import random
import traceback
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, default_collate, get_worker_info

from liif_fast.data.arrays import Range
from liif_fast.data.errors import WorkerTraceback, item_name, naming
from liif_fast.data.numbering import Numbers, item_rng
from liif_fast.data.pictures import Item
from liif_fast.data.registry import build

REMOVED_LOADER_KEY = (
    "is no longer a key, because worker processes make all items: delete it, and set cache: in_memory in the dataset's "
    "args to decode every image only once"
)


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
    """A loader for `{'dataset', 'wrapper', 'batch_size'[, 'num_workers']}`.

    section: batch_size counts the items of all ranks together.
    split: the share of this rank. 'batches': an equal, contiguous part of every batch (for training: all ranks together
        see the batches of a single process); 'items': every world-th item in batches of its own (for evaluation).
    workers: number of worker processes; None takes the section's num_workers, or 0 (items are made in this process).
    device: where the batches are used. Batches stay on the CPU; for a GPU they are in pinned memory.
    Raises ValueError for a bad section, or a batch_size that the ranks cannot split.
    """
    if "loader" in section:
        raise ValueError(f"loader {REMOVED_LOADER_KEY}")
    if split not in ("batches", "items"):
        raise ValueError(f"split is {split!r}; it must be 'batches' or 'items'")
    batch_size = section.get("batch_size", 1)
    if not isinstance(batch_size, int) or batch_size < 1:
        raise ValueError(f"batch_size is {batch_size!r}; it must be a whole number from 1")
    if split == "batches" and batch_size % world:
        raise ValueError(f"batch_size is {batch_size}; {world} processes need a multiple of {world} to share")
    dataset = build(section)
    numbers = Numbers(len(dataset), batch_size, seed=seed, shuffle=shuffle, rank=rank, world=world, split=split)
    count = (section.get("num_workers") or 0) if workers is None else workers
    return Loader(dataset, numbers, workers=count, pin_memory=torch.device(device or "cpu").type == "cuda")


class Loader:
    """Batches of items, stacked on the CPU; `make_loader` builds it."""

    def __init__(self, dataset: Any, numbers: Numbers, *, workers: int = 0, pin_memory: bool = False) -> None:
        self.dataset, self._numbers = dataset, numbers
        self._batches = _Epoch(numbers)
        ahead: dict[str, Any] = {"prefetch_factor": 4, "persistent_workers": True} if workers else {}
        self._loader = DataLoader(
            _Numbered(dataset, numbers.seed),
            batch_sampler=cast(Any, self._batches),
            collate_fn=_as_it_is,
            num_workers=workers,
            pin_memory=pin_memory,
            generator=torch.Generator(),  # otherwise every epoch would draw from the training's generator
            **ahead,
        )

    def __len__(self) -> int:
        """Batches per epoch."""
        return len(self._numbers)

    def epoch(self, number: int = 0, skip: int = 0) -> Iterator[Item]:
        """The batches of an epoch, without the first `skip` batches.

        An item that cannot be made raises the same error, with the image's name, with and without loader processes:
        ValueError for bad input, RuntimeError for a failure of a user's class.
        """
        self._batches.number, self._batches.skip = number, skip
        return _without_failures(iter(self._loader))

    @property
    def n_colors(self) -> int | None:
        """Channels of the items; None for a user's dataset that does not tell."""
        return getattr(getattr(self.dataset, "dataset", None), "n_colors", None)

    @property
    def data_range(self) -> Range | None:
        """The values that are 0 and 1 in the batches; None for pictures."""
        return getattr(self.dataset, "data_range", None)

    def names(self) -> Iterator[str]:
        """The file names of the items of epoch 0, in their order."""
        return (_name(self.dataset, number) for batch in self._numbers.epoch(0) for number in batch)


class _Failure(NamedTuple):
    """An error in a loader process; the exception itself may not survive the way to another process."""

    kind: type[Exception]
    sentence: str
    traceback: str


def _without_failures(batches: Iterator[Any]) -> Iterator[Item]:
    for batch in batches:
        if isinstance(batch, _Failure):
            raise batch.kind(batch.sentence) from WorkerTraceback(batch.traceback)
        yield batch


def _as_it_is(batch: Any) -> Any:
    return batch


def _name(wrapper: Any, number: int) -> str:
    return item_name(getattr(wrapper, "dataset", wrapper), number % len(wrapper))


class _Epoch:
    """The batch sampler of the next epoch."""

    def __init__(self, numbers: Numbers) -> None:
        self.numbers, self.number, self.skip = numbers, 0, 0

    def __iter__(self) -> Iterator[list[int]]:
        return self.numbers.epoch(self.number, self.skip)


class _Numbered(Dataset[Item]):
    """Items by number over all epochs, from a wrapper of this package or of a user."""

    def __init__(self, wrapper: Any, seed: int) -> None:
        self.wrapper, self.seed = wrapper, seed
        inner = getattr(wrapper, "dataset", None)
        self._takes_rng = hasattr(wrapper, "item") and (hasattr(inner, "array") or hasattr(inner, "arrays"))

    def __getitems__(self, numbers: Sequence[int]) -> Any:
        """A whole batch, or the failure that prevents it."""
        try:
            return self._stacked([self[number] for number in numbers], [_name(self.wrapper, each) for each in numbers])
        except Exception as error:
            if get_worker_info() is None:
                raise
            return _Failure(type(error), str(error), "".join(traceback.format_exception(error)))

    def _stacked(self, items: Sequence[Item], names: Sequence[str]) -> Item:
        with naming(f"the batch of {', '.join(names)}"):
            for item, name in zip(items, names, strict=True):
                for key in items[0]:
                    first, other = list(items[0][key].shape), list(item[key].shape)
                    if first != other:
                        raise ValueError(
                            f"{key} is {first} for {names[0]} and {other} for {name}; items of different sizes need "
                            "batch_size 1, or inp_size and sample_q"
                        )
            return default_collate(list(items))

    def __getitem__(self, number: int) -> Item:
        if self._takes_rng:
            return self._made(number)
        # A user's class draws from the global generators. They are seeded for this item and restored afterward, because
        # without workers the training draws from them too.
        kept = random.getstate(), np.random.get_state()  # noqa: NPY002 (users' code may draw from it)
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
        with naming(_name(self.wrapper, number)):
            if hasattr(self.wrapper, "item"):
                return self.wrapper.item(index, item_rng(self.seed, number))
            return self.wrapper[index]
