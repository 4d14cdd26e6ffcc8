"""Item numbers: which items make up every batch, and the random generator of each item."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np


class Numbers:
    """The numbers of the items of every batch; arguments as for `loader.make_loader`, `length` items per epoch."""

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
        # A last batch that the ranks cannot split equally loses its remainder: all ranks take the same number of steps.
        return -(-(self.length - self.length % self.batch_size % self.world) // self.batch_size)

    def epoch(self, number: int, skip: int = 0) -> Iterator[list[int]]:
        """Lists of item numbers, from `number * length` upward, without the first `skip` batches."""
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


def item_rng(seed: int, number: int) -> np.random.Generator:
    """The generator of an item's random decisions."""
    return np.random.default_rng((seed, number))
