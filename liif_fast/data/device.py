"""`loader: device`: images stay on the device as bytes; crops, reductions and samples are made there, a batch at once.

The host draws each item's image, scale, place and flips, from the same generator as the workers would: a few numbers
an item, copied without waiting. What touches pixels are about 150 tensor operations a batch, however many items; none
of them makes the host wait for the device. Inputs equal the workers' to the last bit; which pixels are sampled comes
from a hash of the item's number, so they are the same on every device and for any number of ranks.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from liif_fast.data.folders import decoded
from liif_fast.data.loader import Numbers, item_rng
from liif_fast.data.pictures import Item
from liif_fast.data.resize import resize_squares
from liif_fast.data.wrappers import Crop, SRImplicitDownsampled, SRImplicitPaired
from liif_fast.utils import memory

_LOW_32 = 0xFFFFFFFF
_INDEX_BITS = 24  # of a key: crops up to 4096 x 4096 pixels


class DeviceImages:
    """Images of any sizes as one tensor on the device: uint8 [pixels of all, C]; every process keeps all of them.

    sizes: [(H, W)] of every image; starts: the row at which each begins.
    """

    def __init__(self, dataset: Any, device: torch.device) -> None:
        """dataset: with `array`, `size`, `image_count` and `n_colors`, such as ImageFolder."""
        self.sizes = [dataset.size(index) for index in range(dataset.image_count)]
        counts = [height * width for height, width in self.sizes]
        total = sum(counts) * dataset.n_colors
        advice = "take fewer images (first_k), or leave `loader: device` out"
        if device.type == "cuda":
            free = torch.cuda.mem_get_info(device)[0]
            if total > free:
                have = f"{memory.readable(total)} of memory, but {memory.readable(free)} are free"
                raise memory.NotEnoughMemory(f"{len(counts)} images on {device} need {have}: {advice}.")
        else:
            memory.require(total, f"{len(counts)} images in memory", advice)
        self.pixels = torch.empty(sum(counts), dataset.n_colors, dtype=torch.uint8, device=device)
        self.starts = [0]
        for index, array in enumerate(decoded(dataset.array, range(dataset.image_count))):
            start, count = self.starts[-1], counts[index]
            self.starts.append(start + count)
            image = torch.from_numpy(array.copy())
            if tuple(image.shape[:2]) != self.sizes[index]:
                raise ValueError(f"{dataset.name(index)!r} has another size than its header says; write the file anew")
            self.pixels[start : start + count] = image.view(count, -1)

    def __len__(self) -> int:
        return len(self.sizes)


class DeviceLoader:
    """Batches of random crops, made on the device; `loader.make_loader` builds it."""

    def __init__(self, dataset: Any, numbers: Numbers, device: torch.device) -> None:
        """dataset: an SRImplicitDownsampled or SRImplicitPaired with inp_size; numbers: of the items.

        sample_q may be left out where all crops have one size: pairs of one factor, or one scale.

        Raises ValueError for another wrapper, NotEnoughMemory where the images do not fit.
        """
        pairs = isinstance(dataset, SRImplicitPaired)
        if not pairs and not isinstance(dataset, SRImplicitDownsampled):
            raise ValueError(
                f"loader 'device' makes the items of sr-implicit-downsampled and sr-implicit-paired, not those of "
                f"{type(dataset).__name__}; leave `loader` out"
            )
        if dataset.inp_size is None or (dataset.sample_q is None and not (pairs or _has_one_scale(dataset))):
            raise ValueError("loader 'device' stacks crops and samples to batches; give inp_size and sample_q")
        needed = ("dataset_1", "dataset_2") if pairs else ("array", "size", "image_count", "n_colors")
        if not all(hasattr(dataset.dataset, name) for name in needed):
            raise ValueError(
                f"loader 'device' reads {'paired-image-folders' if pairs else 'image-folder'}, not "
                f"{type(dataset.dataset).__name__}; leave `loader` out"
            )
        self.dataset, self.device, self._numbers = dataset, device, numbers
        self._small = DeviceImages(dataset.dataset.dataset_1, device) if pairs else None
        self._large = DeviceImages(dataset.dataset.dataset_2 if pairs else dataset.dataset, device)

    def __len__(self) -> int:
        return len(self._numbers)

    def epoch(self, number: int = 0, skip: int = 0) -> Iterator[Item]:
        for batch in self._numbers.epoch(number, skip):
            yield self.batch(batch)

    @torch.no_grad()
    def batch(self, numbers: list[int]) -> Item:
        """The items of these numbers: inp [B, C, n, n], coord, cell [B, Q, 2], gt [B, Q, C], on the device."""
        images = [number % self._numbers.length % len(self._large) for number in numbers]
        crops = [self._draw(image, number) for image, number in zip(images, numbers, strict=True)]
        factors = [self._factor(image) for image in images]
        large = _Squares(self._large, images, crops, factors, self.device)
        if self._small is None:
            inp = resize_squares(large.gather(), large.side, self.dataset.inp_size)
        else:
            inp = _Squares(self._small, images, crops, [1] * len(crops), self.device).gather()
        inp = large.turned(inp.float().div_(255))
        chosen = _without_replacement(numbers, self._numbers.seed, large, self.dataset.sample_q)
        return {"inp": inp, **large.samples(chosen)}

    def _draw(self, image: int, number: int) -> Crop:
        sizes = self._large.sizes if self._small is None else self._small.sizes
        return self.dataset.draw_crop(image, sizes[image], item_rng(self._numbers.seed, number))

    def _factor(self, image: int) -> int:
        """Pixels of the large image to a pixel of what the crop was drawn on."""
        if self._small is None:
            return 1
        return self.dataset.factor(image, self._small.sizes[image], self._large.sizes[image])


class _Squares:
    """A batch of crops of one set of images, described by a few numbers each: [B] tensors on the device."""

    def __init__(
        self, images: DeviceImages, chosen: list[int], crops: list[Crop], factors: list[int], device: torch.device
    ) -> None:
        self._images = images
        self.longest = max(crop.side * factor for crop, factor in zip(crops, factors, strict=True))
        self.shortest = min(crop.side * factor for crop, factor in zip(crops, factors, strict=True))
        rows = []
        for image, crop, factor in zip(chosen, crops, factors, strict=True):
            width = images.sizes[image][1]
            corner = images.starts[image] + crop.top * factor * width + crop.left * factor
            rows.append((corner, width, crop.side * factor, *crop.flips))
        table = torch.tensor(rows, dtype=torch.int64)
        if device.type == "cuda":
            table = table.pin_memory()  # so that the copy need not wait
        table = table.to(device, non_blocking=True)
        self.corner, self.width, self.side = table[:, 0], table[:, 1], table[:, 2]
        self._flip_rows, self._flip_cols, self._transpose = (table[:, column].bool() for column in (3, 4, 5))

    def gather(self) -> Tensor:
        """The crops as uint8 [B, C, longest, longest]; what lies behind a shorter side repeats its last pixel."""
        line = torch.arange(self.longest, device=self.side.device)
        line = torch.minimum(line, (self.side - 1).unsqueeze(1))  # [B, longest]
        index = self.corner.view(-1, 1, 1) + line.unsqueeze(2) * self.width.view(-1, 1, 1) + line.unsqueeze(1)
        pixels = self._images.pixels[index.flatten()]
        return pixels.view(*index.shape, -1).permute(0, 3, 1, 2)

    def turned(self, squares: Tensor) -> Tensor:
        """Every square of [B, C, n, n] turned as its crop says."""
        side = squares.shape[2]
        row = torch.arange(side, device=squares.device).view(1, side, 1)
        row, col = self._source(row, row.transpose(1, 2), torch.full_like(self.side, side))
        batch = torch.arange(len(squares), device=squares.device).view(-1, 1, 1)
        return squares.permute(0, 2, 3, 1)[batch, row, col].permute(0, 3, 1, 2).contiguous()

    def samples(self, chosen: Tensor) -> Item:
        """coord, cell and gt of pixels chosen [B, Q], numbered row by row in the turned crops."""
        side = self.side.unsqueeze(1)
        row, col = chosen // side, chosen % side
        # In make_coord's order of operations, so that coordinates are the workers' to the last bit.
        sides = side.double()
        low, step = (-1 + 1 / sides).float(), (2 / sides).float()
        coord = torch.stack([step * row.float() + low, step * col.float() + low], dim=-1)
        cell = step.unsqueeze(2).expand(coord.shape).contiguous()
        row, col = (part.squeeze(2) for part in self._source(row.unsqueeze(2), col.unsqueeze(2), self.side))
        index = self.corner.unsqueeze(1) + row * self.width.unsqueeze(1) + col
        gt = self._images.pixels[index.flatten()].view(*index.shape, -1).float().div_(255)
        return {"coord": coord, "cell": cell, "gt": gt}

    def _source(self, row: Tensor, col: Tensor, side: Tensor) -> tuple[Tensor, Tensor]:
        """Where in the crop as it lies in the image a pixel of the turned crop comes from; [B or 1, ., .] each."""
        last = (side - 1).view(-1, 1, 1)
        transpose, flip_rows, flip_cols = (
            flag.view(-1, 1, 1) for flag in (self._transpose, self._flip_rows, self._flip_cols)
        )
        row, col = torch.where(transpose, col, row), torch.where(transpose, row, col)
        return torch.where(flip_rows, last - row, row), torch.where(flip_cols, last - col, col)


def _has_one_scale(dataset: SRImplicitDownsampled) -> bool:
    return dataset.scale_min == dataset.scale_max


def _without_replacement(numbers: list[int], seed: int, squares: _Squares, count: int | None) -> Tensor:
    """`count` different pixels of every crop: int64 [B, count]; None: all of them in order.

    Those with the smallest hashes of (seed, item, pixel): the same on every device, whatever the batch around an item.
    """
    device = squares.side.device
    if count is None:
        if squares.shortest != squares.longest:
            raise ValueError(
                f"crops of {squares.shortest} and {squares.longest} pixels a side make no batch; give sample_q"
            )
        return torch.arange(squares.longest**2, device=device).expand(len(numbers), -1)
    if count > squares.shortest**2:
        raise ValueError(f"sample_q is {count}, but a crop has {squares.shortest**2} pixels; lower it")
    if squares.longest**2 >= 1 << _INDEX_BITS:
        raise ValueError(f"crops of {squares.longest} pixels a side are too large for loader 'device'; leave it out")
    seeds = torch.tensor([[_mixed_number(seed, number)] for number in numbers], dtype=torch.int64)
    if device.type == "cuda":
        seeds = seeds.pin_memory()
    pixel = torch.arange(squares.longest**2, device=device)
    # An odd multiplier permutes the 32-bit numbers, the mixing is a bijection of them too.
    keys = _mixed((pixel * 0x9E3779B1 + seeds.to(device, non_blocking=True)) & _LOW_32)
    keys = (keys << _INDEX_BITS) | pixel  # all different, whatever the device's order of equal ones
    keys = torch.where(pixel < squares.side.unsqueeze(1) ** 2, keys, torch.iinfo(torch.int64).max)
    smallest = keys.topk(count, dim=1, largest=False, sorted=True).values
    return smallest & ((1 << _INDEX_BITS) - 1)


def _mixed(x: Any) -> Any:
    """Spread the bits of 32-bit numbers (int or int64 tensor): MurmurHash3's finalizer, which is public domain."""
    x = x ^ (x >> 16)
    x = (x * 0x85EBCA6B) & _LOW_32
    x = x ^ (x >> 13)
    x = (x * 0xC2B2AE35) & _LOW_32
    return x ^ (x >> 16)


def _mixed_number(seed: int, number: int) -> int:
    return _mixed((_mixed((seed ^ (seed >> 32)) & _LOW_32) ^ number ^ (number >> 32)) & _LOW_32)
