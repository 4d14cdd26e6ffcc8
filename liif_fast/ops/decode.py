"""`decode`: the decode of a latent map that anyone made; `query` and `render` make the map and call the same code."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from . import first_use, reference, registration
from .backends import OpRequest, calls, choose
from .dtypes import autocast_dtype, geometry_dtype, needs_grad
from .inputs import DecodeInputs
from .validation import (
    check_cell,
    check_general,
    check_points,
    check_query_term,
    check_reach,
    check_region,
    check_size,
    check_source,
    check_window,
)


class Layers(NamedTuple):
    """What a decode multiplies with, and in which dtypes."""

    weight_geometry: Tensor  # [K, 2 or 4]
    weights: Sequence[Tensor]  # of the layers after the first
    biases: Sequence[Tensor]  # of all layers
    local_ensemble: bool
    matmul_dtype: torch.dtype  # autocast's, otherwise the layers'
    out_dtype: torch.dtype  # float32 under autocast, otherwise the layers'

    @classmethod
    def of(
        cls,
        weight_geometry: Tensor,
        weights: Sequence[Tensor],
        biases: Sequence[Tensor],
        local_ensemble: bool,
        values: Tensor,  # the features or the latent map
    ) -> Layers:
        autocast, dtype = autocast_dtype(values), biases[0].dtype
        dtypes = (dtype, dtype) if autocast is None else (autocast, torch.float32)
        return cls(weight_geometry, weights, biases, local_ensemble, *dtypes)

    @property
    def tensors(self) -> list[Tensor]:
        return [self.weight_geometry, *self.weights, *self.biases]


class Place(NamedTuple):
    """The queries of a decode: coordinates, or the window of a grid."""

    coord: Tensor | None = None  # [B, Q, 2]
    cell: Tensor | None = None  # [B, Q, 2]
    grid: Sequence[int] = ()  # as in DecodeInputs
    grid_cell: Sequence[float] = ()
    query_term: Tensor | None = None  # [B, Q, K]

    @property
    def tensors(self) -> list[Tensor | None]:
        return [self.coord, self.cell, self.query_term]

    def queries(self, batch: int) -> int:
        entry = self.grid[4] * self.grid[5] if self.coord is None else self.coord.shape[1]
        return batch * entry


_DECODERS: list[first_use.Decoders] = []


def check_with(decoders: first_use.Decoders) -> None:
    """Set what the first-use check runs: `query` and `render`, whose module imports this one."""
    _DECODERS[:] = [decoders]


def choose_decode(
    values: Tensor,
    layers: Layers,
    place: Place,
    latent_map: Tensor | None,
    feat_unfold: bool,
    recompute: bool,
    backend: str | None,
) -> str:
    """As `choose`, for a decode of features or a latent map; checks a GPU's kernels at their first use."""
    widths = tuple(bias.shape[0] for bias in layers.biases)
    layer_grads = needs_grad(values, place.query_term, *layers.tensors)
    point_grads = needs_grad(place.coord, place.cell)
    request = OpRequest.on(values, "decode", widths, [latent_map, *place.tensors, *layers.tensors])
    request = request._replace(
        matmul_dtype=layers.matmul_dtype,
        trains=layer_grads or point_grads,
        queries=place.queries(values.shape[0]),
        has_query_term=place.query_term is not None,
    )
    kernels = first_use.Combination(
        "",
        request.device,
        request.device_index,
        values.dtype,
        layers.matmul_dtype,
        (layers.local_ensemble, feat_unfold, layers.weight_geometry.shape[1] == 4),
        layer_grads,
        point_grads,
        recompute,
        request.has_query_term,
        len(place.grid_cell) > 2,
        widths,
    )

    def against(name: str, _: OpRequest) -> str:
        return first_use.against(kernels._replace(backend=name), _DECODERS[0])

    return choose(request, backend, against)


def decode_on(backend: str, latent_map: Tensor, layers: Layers, place: Place, keep: bool, recorded: bool) -> Tensor:
    """The registered op, or the same by PyTorch's calls, of validated tensors -> [B, Q, O] or [B, O, h, w].

    keep: whether the forward keeps activations for its backward. recorded: whether there is one.
    """
    dtype = geometry_dtype(latent_map)
    coord, cell, term = (None if tensor is None else tensor.to(dtype) for tensor in place.tensors)
    inputs = DecodeInputs(
        latent_map,
        coord,
        cell,
        layers.weight_geometry,
        list(layers.weights),
        list(layers.biases),
        list(place.grid),
        list(place.grid_cell),
        layers.local_ensemble,
        term,
        layers.matmul_dtype,
    )
    if backend == "torch":
        return calls.decode(inputs)
    return registration.decode(*inputs, keep if recorded else None, needs_grad(coord, cell), backend)[0]


def grid_place(
    feat: Tensor,
    size: Sequence[int],
    window: Sequence[int] | None,
    cell: Sequence[float] | None,
    source: Sequence[float] | None,
    feat_region: Sequence[int] | None = None,
    reach: int = 0,
) -> Place:
    """The validated window of a grid over feat [B, C, H, W]; reach: latents around a corner that a query reads."""
    image = check_size("size", size)
    area = check_window(window, image)
    region = check_region(feat_region, feat)
    box = check_source(source)
    if feat_region is not None:
        check_reach(image, area, region, feat, reach, box)
    if cell is not None and len(cell) != 2:
        raise ValueError(f"cell must be (row, col), two numbers in [-1, 1] units, got {tuple(cell)}")
    cells, axes = [2 / image[0], 2 / image[1]], []
    if box is not None:
        cells = [2 * box[2 + axis] / (region[2 + axis] * image[axis]) for axis in (0, 1)]
        axes = [[2 * box[axis] / region[2 + axis] - 1 + step / 2, step] for axis, step in enumerate(cells)]
    cells = cells if cell is None else [float(cell[0]), float(cell[1])]
    return Place(grid=[*image, *area, *region], grid_cell=[*cells, *(number for axis in axes for number in axis)])


def decode(
    latent_map: Tensor,
    weight_geometry: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    *,
    coord: Tensor | None = None,
    cell: Tensor | Sequence[float] | None = None,
    size: Sequence[int] | None = None,
    window: Sequence[int] | None = None,
    source: Sequence[float] | None = None,
    query_term: Tensor | None = None,
    local_ensemble: bool = True,
    recompute: bool = False,
    backend: str | None = None,
) -> Tensor:
    """Decode a latent map at coordinates or on a regular grid; differentiable in every tensor.

    The first layer of a corner is `latent + weight_geometry @ (rel_coord, rel_cell) + biases[0] + query_term`. Then
    come ReLU, the layers `weights` with ReLU between them, and the area-weighted blend of the corners.

    Args:
        latent_map: [B, H, W, K]: what the first layer makes of all that belongs to a latent. `fold` makes LIIF's.
        weight_geometry: [K, 4], the first layer's columns for rel_coord and rel_cell; [K, 2] without cells.
        weights: of the layers after the first, [out, in] each; none if the first is the only one.
        biases: of all layers, [out] each; biases[0] is the first layer's, [K].
        coord: query centers, [B, Q, 2], (row, col) in [-1, 1]; outside is legal. None: the grid of `size`.
        cell: query pixel sizes in the same units, [B, Q, 2], needed where weight_geometry is [K, 4]. On a grid
            (row, col) of all pixels, or None for the grid's own.
        size, window, source: a grid as in `render`.
        query_term: what the first layer makes of all that belongs to a query (a guide, a position), [B, Q, K]; on a
            grid [B, K, h, w].
        local_ensemble: four corners around each query instead of the one nearest latent.
        recompute: whether the backward computes activations again instead of keeping them: less memory, more time.
        backend: a name of `backends.BACKENDS`; None lets the table choose.

    Returns:
        [B, Q, O], on a grid [B, O, h, w], in the layers' dtype (float32 under autocast).

    Raises:
        ValueError, TypeError: a wrong shape, dtype or device. RuntimeError: the named backend cannot run this.
    """
    check_general(latent_map, weight_geometry, weights, biases, autocast=autocast_dtype(latent_map) is not None)
    feat, has_cell = latent_map.permute(0, 3, 1, 2), weight_geometry.shape[1] == 4
    if (coord is None) == (size is None):
        raise ValueError("decode takes either coord or size: coordinates [B, Q, 2], or the rows and columns of a grid")
    if coord is None:
        assert size is not None
        if isinstance(cell, Tensor):
            raise TypeError("cell is a tensor, but on a grid it is (row, col): two numbers, or None")
        place = grid_place(feat, size, window, cell, source)
        shape: tuple[int, ...] = (feat.shape[0], feat.shape[1], *place.grid[4:6])
    else:
        check_points("coord", coord, feat)
        if (isinstance(cell, Tensor)) != has_cell:
            given = "no tensor" if has_cell else "given"
            raise ValueError(
                f"weight_geometry is {tuple(weight_geometry.shape)} but cell is {given}: [K, 4] needs cells"
            )
        if isinstance(cell, Tensor):
            check_cell(cell, coord, feat)
        place = Place(coord, cell if has_cell else None)  # type: ignore[arg-type]
        shape = (*coord.shape[:2], feat.shape[1])
    if query_term is not None:
        check_query_term(query_term, shape, latent_map)
        term = query_term if coord is not None else query_term.flatten(2).transpose(1, 2)
        place = place._replace(query_term=term)

    layers = Layers.of(weight_geometry, weights, biases, local_ensemble, latent_map)
    name = choose_decode(latent_map, layers, place, None, False, recompute, backend)
    if name == "reference":
        out = _by_reference(latent_map, layers, place, source)
    else:
        recorded = needs_grad(latent_map, *place.tensors, *layers.tensors)
        out = decode_on(name, latent_map, layers, place, not recompute, recorded)
    return out.to(layers.out_dtype)


def _by_reference(latent_map: Tensor, layers: Layers, place: Place, source: Sequence[float] | None) -> Tensor:
    coord, cell, term = place.tensors
    if coord is None:
        dtype, device = geometry_dtype(latent_map), latent_map.device
        box = None if source is None else (tuple(source), tuple(latent_map.shape[1:3]))
        coord = reference.window_coord(place.grid[:2], place.grid[2:6], dtype=dtype, device=device, source=box)
        coord = coord.expand(latent_map.shape[0], -1, 2)
        cell = coord.new_tensor(place.grid_cell[:2]).expand(coord.shape)
    layer_tensors = layers.weight_geometry, layers.weights, layers.biases
    out = reference.decode(latent_map, coord, cell, *layer_tensors, term, local_ensemble=layers.local_ensemble)
    return out if place.coord is not None else out.transpose(1, 2).unflatten(2, tuple(place.grid[4:6]))
