"""The arguments of the registered ops and their backends: the single place where Python declares them."""

# Without `from __future__ import annotations`: registration.py derives the op's schema from these types.
from typing import NamedTuple

import torch
from torch import Tensor

from .dtypes import geometry_dtype


class GatherInputs(NamedTuple):
    """The arguments of the registered ops `gather` and `gather_backward`, for every backend."""

    feat: Tensor  # [B, C, H, W]
    coord: Tensor  # [B, Q, 2], geometry dtype
    cell: Tensor | None  # [B, Q, 2], geometry dtype
    feat_unfold: bool
    local_ensemble: bool

    @property
    def features(self) -> int:
        """Columns of x that come from feat."""
        return self.feat.shape[1] * (9 if self.feat_unfold else 1)

    @property
    def x_shape(self) -> tuple[int, ...]:
        """[B, Q, corners, features + 2 (+ 2)]."""
        corners, geometry = 4 if self.local_ensemble else 1, 2 if self.cell is None else 4
        return *self.coord.shape[:2], corners, self.features + geometry

    def for_kernels(self) -> "GatherInputs":
        """The same gather with contiguous coordinates and cells; feat keeps its strides."""
        cell = None if self.cell is None else self.cell.contiguous()
        return self._replace(coord=self.coord.contiguous(), cell=cell)


class MetasrInputs(NamedTuple):
    """The arguments of the registered ops `metasr_query` and `metasr_query_backward`, for every backend."""

    latent_map: Tensor  # [B, H, W, O*(hidden + 1)], the result of `metasr_fold`
    coord: Tensor  # [B, Q, 2], geometry dtype
    cell: Tensor  # [B, Q, 2], geometry dtype
    weight: Tensor  # [hidden, 3], the first layer's
    bias: Tensor  # [hidden]
    region: list[int]  # top, left, map height, map width

    @property
    def out_shape(self) -> tuple[int, ...]:
        return *self.coord.shape[:2], self.latent_map.shape[-1] // (self.weight.shape[0] + 1)

    def for_kernels(self, latent_map: Tensor) -> "MetasrInputs":
        """The same decode of `latent_map` with contiguous tensors, and the filter in the geometry dtype."""
        dtype = geometry_dtype(latent_map)
        return self._replace(
            latent_map=latent_map.contiguous(),
            coord=self.coord.contiguous(),
            cell=self.cell.contiguous(),
            weight=self.weight.to(dtype).contiguous(),
            bias=self.bias.to(dtype).contiguous(),
        )


class DecodeInputs(NamedTuple):
    """The arguments of the registered ops `decode` and `decode_backward`, for every backend.

    With coord this is a decode at coordinates, without it the decode of a window of a regular grid. A field that is
    added here becomes an argument of both ops.
    """

    latent_map: Tensor  # [B, H, W, K]; it may be wider than matmul_dtype, see dtypes.latent_dtype
    coord: Tensor | None  # [B, Q, 2], geometry dtype; None: the grid
    cell: Tensor | None  # [B, Q, 2], geometry dtype; None for a grid and without cell decoding
    weight_geometry: Tensor  # [K, 2 or 4]: the first layer's columns for rel_coord (and rel_cell)
    weights: list[Tensor]  # of the layers after the first, [out, in] each
    biases: list[Tensor]  # of all layers, [out] each
    grid: list[int]  # image height, width; window top, left, height, width; region top, left, map height, width; or []
    # Row, col size of a pixel of the grid; then, for another grid than the image's own, the center of its first pixel
    # and the distance to the next one, of rows, of columns; or [].
    grid_cell: list[float]
    local_ensemble: bool
    query_term: Tensor | None  # [B, Q, K], added before the first activation
    matmul_dtype: torch.dtype  # of the operands of matrix products

    @property
    def widths(self) -> list[int]:
        """Outputs of every layer: K, *hidden, O."""
        return [self.latent_map.shape[-1], *(weight.shape[0] for weight in self.weights)]

    @property
    def entry_queries(self) -> int:
        """Queries of one batch entry."""
        return self.grid[4] * self.grid[5] if self.coord is None else self.coord.shape[1]

    @property
    def queries(self) -> int:
        """Of the whole batch."""
        return self.latent_map.shape[0] * self.entry_queries

    @property
    def corners(self) -> int:
        """Of a query."""
        return 4 if self.local_ensemble else 1

    @property
    def rows(self) -> int:
        """Rows of the imnet's input: one for each corner of each query."""
        return self.queries * self.corners

    @property
    def out_shape(self) -> tuple[int, ...]:
        """[B, Q, O] at coordinates, [B, O, h, w] for a grid."""
        batch, outs = self.latent_map.shape[0], self.widths[-1]
        if self.coord is None:
            return batch, outs, self.grid[4], self.grid[5]
        return batch, self.coord.shape[1], outs

    def for_kernels(self, latent_map: Tensor, dtype: torch.dtype) -> "DecodeInputs":
        """The same decode of `latent_map` with contiguous tensors, and the layers' weights and biases in `dtype`."""
        return self._replace(
            latent_map=latent_map.contiguous(),
            coord=None if self.coord is None else self.coord.contiguous(),
            cell=None if self.cell is None else self.cell.contiguous(),
            query_term=None if self.query_term is None else self.query_term.to(dtype).contiguous(),
            weight_geometry=self.weight_geometry.to(dtype).contiguous(),
            weights=[weight.to(dtype).contiguous() for weight in self.weights],
            biases=[bias.to(dtype).contiguous() for bias in self.biases],
        )

    def empty_saved(self, size: int) -> Tensor:
        """Memory for what the forward saves for the backward: a tensor of `size` bytes."""
        return self.latent_map.new_empty(size, dtype=torch.uint8)

    def differentiable(self, coord_grad: bool) -> list[Tensor]:
        """The tensors that `decode_backward` returns a gradient for, in its order."""
        points = [tensor for tensor in (self.coord, self.cell) if tensor is not None] if coord_grad else []
        term = [] if self.query_term is None else [self.query_term]
        return [self.latent_map, self.weight_geometry, *self.weights, *self.biases, *points, *term]
