"""What the launchers of `query` and `render` work on: a decode's tensors as kernels take them, piece by piece."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from ...dtypes import geometry_dtype
from .geometry import Axis, make_axis
from .launch import DTYPES, OPTIONS, tile_width
from .rows import PATCH, Places, split


@dataclasses.dataclass(frozen=True)
class Decode:
    """A decode up to its first layer: where the queries are, and what stands in their latents' place.

    A piece of a decode is one too: a range of points, or a band of the window of some batch entries.
    """

    latent_map: Tensor  # [B, h, w, K], contiguous
    coord: Tensor | None  # [B*Q, 2]; None for a grid
    cell: Tensor | None  # [B*Q, 2], for points with cells
    first: Tensor  # [terms + 1, padded K]: the weights of each geometry term, then the bias
    axes: tuple[Axis, Axis, Axis, Axis]  # rows and columns of the map, and of the grid's image
    queries: int  # of all batch entries
    ensemble: bool
    first_query: int = 0  # points: in the whole problem
    points_of_entry: int = 0
    window: tuple[int, int, int, int] = (0, 0, 0, 0)  # a grid's: top, left, height, width in the image
    begin: tuple[int, int] = (0, 0)  # a grid's first batch entry and row, in the whole problem's window

    @property
    def corners(self) -> int:
        return 4 if self.ensemble else 1

    @property
    def rows(self) -> int:
        return self.queries * self.corners

    @property
    def terms(self) -> int:
        return self.first.shape[0] - 1

    @property
    def width(self) -> int:
        return self.latent_map.shape[-1]

    @property
    def points(self) -> Tensor:
        """What kernels take as coord: any tensor for a grid, which reads none."""
        return self.first if self.coord is None else self.coord

    def flags(self, rows: int) -> dict[str, Any]:
        """Compile-time arguments that the kernels of this decode share, for tiles of `rows`."""
        return {"GRID": self.coord is None, "ENSEMBLE": self.ensemble, "ROWS": rows, **OPTIONS}

    def tiles(self, rows: int) -> tuple[int, tuple[Any, ...]]:
        """The number of tiles of `rows`, and the arguments that place them: Places and the axes."""
        queries = rows // self.corners
        counts = (split(self.first_query), split(self.queries), split(self.points_of_entry))
        if self.coord is not None:
            return triton.cdiv(self.queries, queries), (Places(*counts, *(0.0,) * 6), *self.axes)
        height = triton.cdiv(self.window[2], queries // PATCH.value)
        width = triton.cdiv(self.window[3], PATCH.value)
        places = Places(*counts, *map(float, (*self.window, height, width)))
        return self.latent_map.shape[0] * height * width, (places, *self.axes)

    def pieces(self, rows: int) -> Iterator[Decode]:
        """The decode in parts of about `rows` rows, so that memory for activations is bounded."""
        limit = max(rows // self.corners, 1)
        if self.queries <= limit:
            yield self
        elif self.coord is not None:
            for first in range(0, self.queries, limit):
                yield dataclasses.replace(self, first_query=first, queries=min(limit, self.queries - first))
        else:
            top, left, height, width = self.window
            band = min(max(limit // width, 1), height)
            for entry in range(self.latent_map.shape[0]):
                for row in range(0, height, band):
                    tall = min(band, height - row)
                    yield dataclasses.replace(
                        self,
                        latent_map=self.latent_map[entry : entry + 1],
                        queries=tall * width,
                        window=(top + row, left, tall, width),
                        begin=(entry, row),
                    )

    def of_queries(self, out: Tensor) -> Tensor:
        """The part of the whole problem's output or its gradient that belongs here: [B, Q, O] or, for a grid,
        [B, O, h, w] -> [queries, O], a view where that is possible."""
        if self.coord is not None:
            return out.reshape(-1, out.shape[-1])[self.first_query : self.first_query + self.queries]
        entry, top = self.begin
        part = out[entry : entry + self.latent_map.shape[0], :, top : top + self.window[2]]
        return part.permute(0, 2, 3, 1).reshape(self.queries, -1)

    def put_queries(self, out: Tensor, values: Tensor) -> None:
        """Writes [queries, O] to this decode's part of the whole problem's output."""
        if self.coord is not None:
            self.of_queries(out).copy_(values)
            return
        entry, top = self.begin
        part = out[entry : entry + self.latent_map.shape[0], :, top : top + self.window[2]]
        part.copy_(values.view(-1, self.window[2], self.window[3], out.shape[1]).permute(0, 3, 1, 2))

    def latents_of(self, whole: Tensor) -> Tensor:
        """The part of the whole problem's latent map, or its gradient, that belongs here."""
        entry = self.begin[0]
        return whole if self.coord is not None else whole[entry : entry + self.latent_map.shape[0]]


def _first_table(weight_geometry: Tensor, bias: Tensor, cell: Sequence[float] | None, dtype: torch.dtype) -> Tensor:
    """[terms + 1, padded K]; a cell that all queries share goes into the bias."""
    weight, bias = weight_geometry.to(dtype), bias.to(dtype)
    if cell is not None and weight.shape[1] == 4:
        bias = torch.add(torch.add(bias, weight[:, 2], alpha=cell[0]), weight[:, 3], alpha=cell[1])
        weight = weight[:, :2]
    table = torch.cat([weight.t(), bias.unsqueeze(0)])
    missing = tile_width(table.shape[1]) - table.shape[1]
    return F.pad(table, (0, missing)) if missing else table


def decode_points(
    latent_map: Tensor, coord: Tensor, cell: Tensor | None, weight_geometry: Tensor, bias: Tensor, ensemble: bool
) -> Decode:
    """The decode of `query`: coord and cell [B, Q, 2]."""
    batch, queries = coord.shape[:2]
    dtype = geometry_dtype(latent_map)
    rows, cols = make_axis(latent_map.shape[1]), make_axis(latent_map.shape[2])
    return Decode(
        latent_map=latent_map.contiguous(),
        coord=coord.reshape(-1, 2).contiguous(),
        cell=None if cell is None else cell.reshape(-1, 2).contiguous(),
        first=_first_table(weight_geometry, bias, None, dtype),
        axes=(rows, cols, rows, cols),
        queries=batch * queries,
        points_of_entry=queries,
        ensemble=ensemble,
    )


def grid_rel_cell(grid: Sequence[int], cell: Sequence[float]) -> tuple[float, float]:
    """rel_cell of every query of a grid."""
    return cell[0] * grid[8], cell[1] * grid[9]


def decode_grid(
    latent_map: Tensor,
    weight_geometry: Tensor,
    bias: Tensor,
    grid: Sequence[int],
    cell: Sequence[float],
    ensemble: bool,
) -> Decode:
    """The decode of `render`; grid as in `library.render`."""
    image_height, image_width, top, left, height, width, region_top, region_left, map_height, map_width = grid
    batch, region_height, region_width = latent_map.shape[:3]
    dtype = geometry_dtype(latent_map)
    return Decode(
        latent_map=latent_map.contiguous(),
        coord=None,
        cell=None,
        first=_first_table(weight_geometry, bias, grid_rel_cell(grid, cell), dtype),
        axes=(
            make_axis(map_height, region_top, region_height),
            make_axis(map_width, region_left, region_width),
            make_axis(image_height),
            make_axis(image_width),
        ),
        queries=batch * height * width,
        window=(top, left, height, width),
        ensemble=ensemble,
    )


def kernel_dtype(decode: Decode) -> Any:
    """Triton's name for the dtype of geometry and sums."""
    return DTYPES[decode.first.dtype]
