"""Shared by the Triton launchers: compile options, device, tile configurations, and a decode's tensors in chunks."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler.compiler import make_backend

from ...dtypes import allows_tf32, geometry_dtype
from ...inputs import DecodeInputs
from .geometry import make_axis
from .rows import PATCH, QueryGrid, split

# Multiplications and additions must not contract to FMA: a rounding decides which latent is the nearest one.
OPTIONS = {"enable_fp_fusion": False}

DTYPES = {
    torch.float64: tl.float64,
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
}
Shapes = list[tuple[tuple[int, ...], torch.dtype]]  # of the tensors that a forward saves


@contextmanager
def on_device_of(tensor: Tensor) -> Iterator[None]:
    """Makes the tensor's device current and switches autocast off.

    Triton launches on the current device and its current stream. An op runs under its caller's autocast, which would
    round the float32 products of PyTorch's layers; matmul_dtype has been chosen before.
    """
    with torch.autocast(tensor.device.type, enabled=False):
        if tensor.device.type == "cpu":  # the interpreter
            yield
            return
        with torch.accelerator.device_index(tensor.device.index):
            yield


def power_of_two(size: int, least: int, most: int) -> int:
    """The smallest power of two that holds `size`, between `least` and `most`."""
    return min(max(triton.next_power_of_2(size), least), most)


def segments(keys: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """A fixed order for sums: items sorted by key, and where each key's items begin.

    Args:
        keys: [n], int64, below count; items with a negative key are in no sum.
        count: number of keys.

    Returns:
        order [n] and begins [count + 1]: key k's items are order[begins[k]:begins[k + 1]], in their own order.
    """
    ordered, order = torch.sort(keys, stable=True)
    return order, torch.searchsorted(ordered, torch.arange(count + 1, device=keys.device))


# ------------------------------------------------------------------------------------------------ tile configurations


class TileConfig(NamedTuple):
    """The tiles of a fused kernel. Chosen by compiling ahead of time (registers, shared memory); not yet tuned on a
    GPU."""

    rows: int  # of a tile
    block: int  # columns of a block of activations
    warps: int
    stages: int  # of the pipeline that loads weights


Kernel = Literal["forward", "save", "backward"]  # save: the forward that saves activations


class TileConfigKey(NamedTuple):
    """What the tile configuration of a fused kernel depends on, apart from the device."""

    kernel: Kernel
    width: int  # of a tile: `tile_width` of the widest hidden layer
    matmul_dtype: torch.dtype
    precision: str  # of float32 products, from `product_precision`


def tile_width(width: int) -> int:
    """Columns of a tile for `width` activations: a power of two up to 128, then a multiple of 64, because Triton takes
    blocks of powers of two."""
    return power_of_two(width, 16, 128) if width <= 128 else triton.cdiv(width, 64) * 64


def padded_width(width: int) -> int:
    """Columns in memory for `width` activations: a multiple of 16, so that rows are aligned; above 128 the tile's.

    Above 128, masking columns would take registers that wide tiles do not have: on sm_90 they would spill 112 bytes,
    or have half the rows and read the weights twice as often.
    """
    return triton.cdiv(width, 16) * 16 if width <= 128 else tile_width(width)


def holds_wide(device: GPUTarget | None) -> bool:
    """Whether registers hold more than 256 channels of the forward in 16 bits.

    A tile of 64 rows has 128 registers of old activations. Compiled ahead of time, it spills nothing on compute
    capability 9.0 and 10.0. On 8.0 and 8.6, and everywhere in the backward, it spills 0.2 to 1.3 KB.
    """
    return device is None or (device.backend == "cuda" and device.arch // 10 in (9, 10))


def tile_config(key: TileConfigKey, device: GPUTarget | None) -> TileConfig:
    """The table of tile configurations of the fused decode; device: from `current_device`, None for the interpreter."""
    kernel, width, matmul_dtype, _ = key
    whole = min(width, 128) if width % 128 == 0 or width < 128 else 64
    if device is None:
        return TileConfig(64, whole, 4, 2)
    if device.backend != "cuda":  # AMD and Intel: 64 KB of shared memory at least
        rows, stages = (64, 2) if matmul_dtype.itemsize == 2 else (32, 1)
        return TileConfig(rows, min(width, rows), 4, stages)
    family = device.arch // 10
    roomy = family in (9, 10) or device.arch == 80  # 227 or 163 KB of shared memory instead of 99
    if matmul_dtype.itemsize > 2:
        return _float32_tile_config(key, family, roomy)
    narrow = min(width, 64)
    if width > 256:
        return TileConfig(64, 64, 8, 3)
    if kernel == "save":  # addresses need registers too
        return TileConfig(128, narrow, 8, 3 if roomy else 2)
    if kernel == "backward":
        return TileConfig(64, whole, 8, 2) if family == 10 else TileConfig(128, whole, 8, 3 if roomy else 2)
    return TileConfig(128, whole if roomy else narrow, 8, 3)


def _float32_tile_config(key: TileConfigKey, family: int, roomy: bool) -> TileConfig:
    """Activations are twice as large as in 16 bits: half of them are in shared memory, where a product reads them."""
    kernel, width, _, precision = key
    narrow = min(width, 32)
    if precision == "ieee":
        rows = {"forward": 128 if roomy else 64, "save": 64, "backward": 32}
        block = min(width, 64) if kernel == "backward" and family == 10 else narrow  # 32 columns spill there
        return TileConfig(rows[kernel], block, 8, 2)
    if family == 9:
        return TileConfig(128, narrow, 8, 2)
    if family == 10:
        return TileConfig(128, narrow, 8, 1) if kernel == "forward" else TileConfig(64, min(width, 64), 8, 1)
    if width < 64:
        return TileConfig(64, width, 4, 2)
    # Fewer rows than columns: Triton then gives each warp its own columns, and all warps read the rows from shared
    # memory.
    return TileConfig(32, 64, 8, 2 if roomy or kernel == "forward" else 1)


def current_device() -> GPUTarget | None:
    """The current device as `tile_config` takes it."""
    return None if triton.knobs.runtime.interpret else triton.runtime.driver.active.get_current_target()


@cache
def _precisions(target: GPUTarget) -> tuple[str, ...]:
    return make_backend(target).parse_options({}).allowed_dot_input_precisions


def product_precision(matmul_dtype: torch.dtype) -> str:
    """How kernels multiply float32: "tf32" if PyTorch's switch allows it and the device can, otherwise "ieee".

    Read at every launch, as PyTorch's own products do. The layout of saved activations does not depend on it.
    """
    if matmul_dtype != torch.float32 or not allows_tf32():
        return "ieee"
    device = current_device()
    return "tf32" if device is None or "tf32" in _precisions(device) else "ieee"


# ------------------------------------------------------------------------------------------------------- decode chunks


def point_grid(
    coord: Tensor, cell: Tensor, map_size: Sequence[int], points: int, total: int, first: int = 0
) -> QueryGrid:
    """QueryGrid of `total` of the points in coord, with `points` in each batch entry, on a map of (height, width)."""
    axes = make_axis(map_size[0]), make_axis(map_size[1])
    return QueryGrid(coord, cell, *axes, *axes, split(total), split(first), split(points))


def grid_rel_cell(inputs: DecodeInputs) -> tuple[float, float]:
    """rel_cell of every query of a grid."""
    return inputs.grid_cell[0] * inputs.grid[8], inputs.grid_cell[1] * inputs.grid[9]


def _first_table(inputs: DecodeInputs) -> Tensor:
    """The first layer's geometry weights and bias, [terms + 1, padded K]. A grid's cell is added to the bias."""
    dtype = geometry_dtype(inputs.latent_map)
    weight, bias = inputs.weight_geometry.to(dtype), inputs.biases[0].to(dtype)
    if inputs.coord is None and weight.shape[1] == 4:
        cell = grid_rel_cell(inputs)
        bias = torch.add(torch.add(bias, weight[:, 2], alpha=cell[0]), weight[:, 3], alpha=cell[1])
        weight = weight[:, :2]
    table = torch.cat([weight.t(), bias.unsqueeze(0)])
    missing = tile_width(table.shape[1]) - table.shape[1]
    return F.pad(table, (0, missing)) if missing else table


@dataclasses.dataclass(frozen=True)
class DecodeChunk:
    """A decode with its tensors as kernels take them, or a chunk of one: a range of points, or some rows of the window
    of one batch entry."""

    inputs: DecodeInputs  # of the whole decode
    latent_map: Tensor  # [b, h, w, K], contiguous: the chunk's batch entries
    coord: Tensor | None  # [B*Q, 2] of the whole decode; None for a grid
    cell: Tensor | None  # [B*Q, 2] of the whole decode, for points with cells
    all_terms: Tensor | None  # [B*Q, K], query_term of the whole decode
    first: Tensor  # [terms + 1, padded K]: the weights of each geometry term, then the bias
    precision: str  # of float32 products, from `product_precision`
    queries: int  # of the chunk
    first_query: int = 0  # number of the chunk's first one in the whole decode
    window: tuple[int, ...] = ()  # grid: top, left, height, width in the image
    begin: tuple[int, int] = (0, 0)  # grid: first batch entry and row in the whole decode's window

    @classmethod
    def whole(cls, inputs: DecodeInputs) -> DecodeChunk:
        """The decode as one chunk."""
        coord, cell, terms = (
            None if tensor is None else tensor.flatten(0, 1).contiguous()
            for tensor in (inputs.coord, inputs.cell, inputs.query_term)
        )
        precision, window = product_precision(inputs.matmul_dtype), tuple(inputs.grid[2:6])
        latent_map, first = inputs.latent_map.contiguous(), _first_table(inputs)
        return cls(inputs, latent_map, coord, cell, terms, first, precision, inputs.queries, window=window)

    @property
    def corners(self) -> int:
        return 4 if self.inputs.local_ensemble else 1

    @property
    def rows(self) -> int:
        return self.queries * self.corners

    @property
    def terms(self) -> int:
        return self.first.shape[0] - 1

    @property
    def query_term(self) -> Tensor | None:
        """[queries, K]"""
        return None if self.all_terms is None else self.of_terms(self.all_terms)

    @property
    def kernel_dtype(self) -> Any:
        """Triton's name for the dtype of geometry and sums."""
        return DTYPES[self.first.dtype]

    def flags(self, rows: int) -> dict[str, Any]:
        """Compile-time arguments that all kernels of a decode share, for tiles of `rows`."""
        return {"GRID": self.coord is None, "ENSEMBLE": self.inputs.local_ensemble, "ROWS": rows, **OPTIONS}

    def tiles(self, rows: int) -> tuple[int, QueryGrid]:
        """The number of tiles of `rows` rows, and the queries in them."""
        queries, map_size = rows // self.corners, self.latent_map.shape[1:3]
        if self.coord is not None:
            cell, points = self.first if self.cell is None else self.cell, self.coord.shape[0] // len(self.latent_map)
            grid = point_grid(self.coord, cell, map_size, points, self.queries, self.first_query)
            return triton.cdiv(self.queries, queries), grid
        image_height, image_width, *_, region_top, region_left, map_height, map_width = self.inputs.grid
        tiles_y = triton.cdiv(self.window[2], queries // PATCH.value)
        tiles_x = triton.cdiv(self.window[3], PATCH.value)
        map_axes = make_axis(map_height, region_top, map_size[0]), make_axis(map_width, region_left, map_size[1])
        centers = self.inputs.grid_cell[2:4], self.inputs.grid_cell[4:]
        image_axes = make_axis(image_height, centers=centers[0]), make_axis(image_width, centers=centers[1])
        zero = split(0)
        window = map(float, (*self.window, tiles_y, tiles_x))
        grid = QueryGrid(self.first, self.first, *map_axes, *image_axes, split(self.queries), zero, zero, *window)
        return len(self.latent_map) * tiles_y * tiles_x, grid

    def chunks(self, rows: int) -> Iterator[DecodeChunk]:
        """Chunks of about `rows` rows, which bound the memory for activations."""
        limit = max(rows // self.corners, 1)
        if self.queries <= limit:
            yield self
        elif self.coord is not None:
            for first in range(0, self.queries, limit):
                yield dataclasses.replace(self, first_query=first, queries=min(limit, self.queries - first))
        else:
            top, left, height, width = self.window
            step = min(max(limit // width, 1), height)
            for entry in range(len(self.latent_map)):
                for row in range(0, height, step):
                    window = (top + row, left, min(step, height - row), width)
                    part = dataclasses.replace(self, window=window, begin=(entry, row), queries=window[2] * width)
                    first = (entry * height + row) * width
                    latent_map = self.latent_map[entry : entry + 1]
                    yield dataclasses.replace(part, latent_map=latent_map, first_query=first)

    def _of_window(self, out: Tensor) -> Tensor:
        """The chunk's part of the output of a grid."""
        entry, top = self.begin
        return out[entry : entry + len(self.latent_map), :, top : top + self.window[2]]

    def of_queries(self, out: Tensor) -> Tensor:
        """The chunk's part of the whole decode's output or its gradient, [queries, O]; a view where possible."""
        if self.coord is not None:
            return out.reshape(-1, out.shape[-1])[self.first_query : self.first_query + self.queries]
        return self._of_window(out).permute(0, 2, 3, 1).reshape(self.queries, -1)

    def put_queries(self, out: Tensor, values: Tensor) -> None:
        """Writes [queries, O] to the chunk's part of the whole decode's output."""
        if self.coord is not None:
            self.of_queries(out).copy_(values)
            return
        part = self._of_window(out)
        part.copy_(values.view(-1, *self.window[2:], out.shape[1]).permute(0, 3, 1, 2))

    def of_terms(self, whole: Tensor) -> Tensor:
        """The chunk's part of the whole decode's query terms or their gradient, [queries, K]; a view."""
        return whole.flatten(0, -2)[self.first_query : self.first_query + self.queries]

    def of_latents(self, whole: Tensor) -> Tensor:
        """The chunk's batch entries of the whole decode's latent map or its gradient."""
        return whole[self.begin[0] : self.begin[0] + len(self.latent_map)]
