"""Where a query finds its latents, in Triton: csrc/geometry.h function by function, under the same names.

Every line follows the original's order of operations in the dtype T of the coordinates, because a rounding decides
which latent is nearest. Multiplications and additions must not contract to FMA, so every launch passes
`launch.OPTIONS`. Where a fused multiply-add is welcome, kernels call `tl.fma`.
"""

from __future__ import annotations

from collections.abc import Sequence
from ctypes import c_float
from typing import NamedTuple

import triton
import triton.language as tl

EPS_SHIFT = tl.constexpr(1e-6)  # breaks ties between two equally near latents, as in the original
EPS_AREA = tl.constexpr(1e-9)  # keeps the weights finite where all areas vanish
LOW = tl.constexpr(-1.0 + 1e-6)
HIGH = tl.constexpr(1.0 - 1e-6)


class Axis(NamedTuple):
    """One axis of a map of pixels that tile [-1, 1], as kernels take it.

    Whole numbers are floats, exact below 2^24. Triton would compile a kernel again for integers that are 1 or a
    multiple of 16, as sizes and positions often are. Triton passes a Python float as float32, rounded once, as
    `static_cast<float>` does in geometry.h. In float64 kernels compute these numbers from `size` or, where it does not
    give them, from the three floats of `parts`, so that GPUs without float64 never see one.
    """

    size: float  # pixels of the whole map
    begin: float  # the first pixel in memory
    held: float  # pixels in memory
    low: tuple[float, float, float]  # center of pixel 0
    step: tuple[float, float, float]  # from center to center
    minus: float  # shift to the lower neighbor
    plus: float  # shift to the upper neighbor
    half: float  # half a pixel


def image_axis(size: int) -> tuple[float, float]:
    """The center of the first of `size` pixels that tile [-1, 1], and the distance between neighbors."""
    half = 1.0 / size
    return -1.0 + half, 2.0 * half


def parts(number: float) -> tuple[float, float, float]:
    """Three float32 whose sum in float64 is `number`; the first one is `number` in float32."""
    first = c_float(number).value
    second = c_float(number - first).value
    return first, second, number - first - second


def make_axis(size: int, begin: int = 0, held: int | None = None, centers: Sequence[float] = ()) -> Axis:
    """The axis of a map of `size` pixels, of which `held` from `begin` are in memory (None: all).

    centers: of the first pixel, and the distance to the next one; empty: as `image_axis` has them.
    """
    low, step = centers or image_axis(size)
    return Axis(
        float(size),
        float(begin),
        float(size if held is None else held),
        parts(low),
        parts(step),
        -(2.0 / size / 2.0) + 1e-6,
        2.0 / size / 2.0 + 1e-6,
        1.0 / size,
    )


@triton.jit
def joined_parts(number, T: tl.constexpr):
    """The number that `parts` took apart, in T."""
    if T == tl.float64:
        return tl.cast(number[0], T) + tl.cast(number[1], T) + tl.cast(number[2], T)
    else:
        return number[0]


@triton.jit
def pixel_center(index, axis, T: tl.constexpr):
    """Center of pixel `index`."""
    return joined_parts(axis.low, T) + joined_parts(axis.step, T) * index.to(T)


@triton.jit
def clamp_coord(coord):
    """Keeps a coordinate inside the map; NaN stays NaN."""
    return tl.where(coord < LOW, LOW, tl.where(coord > HIGH, HIGH, coord))


@triton.jit
def round_half_even(value):
    """As C's rint, which Triton does not offer on every device. value - floor(value) is exact."""
    below = tl.floor(value)
    rest = value - below
    odd = tl.floor(below * 0.5) * 2.0 != below
    return tl.where((rest > 0.5) | ((rest == 0.5) & odd), below + 1.0, below)


@triton.jit
def nearest_index(coord, axis, T: tl.constexpr):
    """Nearest latent of a clamped coordinate, ties to even; inside [0, size), NaN maps to 0."""
    size = tl.cast(axis.size, T)
    position = ((coord + 1.0) * size + -1.0) * 0.5
    rounded = round_half_even(position)
    inside = (rounded > 0.0) & (rounded < size)
    index = tl.where(inside, rounded, 0.0).to(tl.int32)
    return tl.where(rounded >= size, tl.cast(axis.size, tl.int32) - 1, index)


@triton.jit
def clamp_to_region(index, axis):
    """Index in memory of a latent of the whole map. The Python ops check that the region covers the window; the clamp
    keeps a wrong call inside the region."""
    return tl.minimum(tl.maximum(index - tl.cast(axis.begin, tl.int32), 0), tl.cast(axis.held, tl.int32) - 1)


@triton.jit
def find_neighbor(coord, upper, axis, ENSEMBLE: tl.constexpr, T: tl.constexpr):
    """Index of the latent on the lower or upper side of a query along one axis, and its relative coordinate."""
    if ENSEMBLE:
        if T == tl.float64:
            to_edge = 2.0 / tl.cast(axis.size, tl.float64) / 2.0
            shifted = coord + tl.where(upper, to_edge + EPS_SHIFT, -to_edge + EPS_SHIFT)
        else:
            shifted = coord + tl.where(upper, axis.plus, axis.minus)
    else:
        shifted = coord
    index = nearest_index(clamp_coord(shifted), axis, T)
    return index, (coord - pixel_center(index, axis, T)) * tl.cast(axis.size, T)


@triton.jit
def find_metasr_neighbor(coord, cell, axis, T: tl.constexpr):
    """For MetaSR: index of the latent under the query's upper left corner, and that corner's position relative to the
    latent's upper left corner."""
    corner = coord - cell * 0.5
    index = nearest_index(clamp_coord(corner + EPS_SHIFT), axis, T)
    if T == tl.float64:
        half = 1.0 / tl.cast(axis.size, tl.float64)
    else:
        half = axis.half
    origin = pixel_center(index, axis, T) - half
    return index, (corner - origin) * (tl.cast(axis.size, T) * 0.5)


@triton.jit
def divide(a, b, T: tl.constexpr):
    """a / b, correctly rounded. Triton's own float32 division may be off by two units in the last place."""
    if T == tl.float64:
        return a / b
    else:
        return tl.div_rn(a, b)


@triton.jit
def corner_area(rel_row, rel_col):
    """Area of the rectangle between a query and a latent."""
    return tl.abs(rel_row * rel_col) + EPS_AREA


@triton.jit
def area_weights(rel_row0, rel_row1, rel_col0, rel_col1, down, right, T: tl.constexpr):
    """Blending weight of the corner (down, right): the area between the query and the diagonally opposite corner."""
    area0 = corner_area(rel_row0, rel_col0)
    area1 = corner_area(rel_row0, rel_col1)
    area2 = corner_area(rel_row1, rel_col0)
    area3 = corner_area(rel_row1, rel_col1)
    total = area0 + area1 + area2 + area3
    opposite = tl.where(down, tl.where(right, area0, area1), tl.where(right, area2, area3))
    return divide(opposite, total, T)


@triton.jit
def single_corner_weight(rel_row, rel_col):
    """Blending weight without local ensemble, the original's area / area: 1, or NaN where the area is not finite."""
    return rel_row * rel_col * 0.0 + 1.0


@triton.jit
def find_corner(row, col, corner, rows, cols, ENSEMBLE: tl.constexpr, T: tl.constexpr):
    """For one corner of each query at (row, col): the latent's row and column, relative coordinates, area weight.

    `corner` is 2*row_side + col_side. Every corner computes all four areas, which is cheaper than sharing them.
    """
    if ENSEMBLE:
        lower_row, rel_row0 = find_neighbor(row, False, rows, True, T)
        upper_row, rel_row1 = find_neighbor(row, True, rows, True, T)
        lower_col, rel_col0 = find_neighbor(col, False, cols, True, T)
        upper_col, rel_col1 = find_neighbor(col, True, cols, True, T)
        down = corner >= 2
        right = corner % 2 == 1
        return (
            tl.where(down, upper_row, lower_row),
            tl.where(right, upper_col, lower_col),
            tl.where(down, rel_row1, rel_row0),
            tl.where(right, rel_col1, rel_col0),
            area_weights(rel_row0, rel_row1, rel_col0, rel_col1, down, right, T),
        )
    else:
        index_row, rel_row = find_neighbor(row, False, rows, False, T)
        index_col, rel_col = find_neighbor(col, False, cols, False, T)
        return index_row, index_col, rel_row, rel_col, single_corner_weight(rel_row, rel_col)


@triton.jit
def corner_area_backward(rel_row, rel_col, grad_opposite, mean, total):
    """Gradients of one corner's relative coordinates through all weights; grad_opposite is that of the weight of the
    diagonally opposite corner."""
    product = rel_row * rel_col
    sign = tl.where(product > 0.0, 1.0, tl.where(product < 0.0, -1.0, 0.0))
    grad = (grad_opposite - mean) / total * sign
    return grad * rel_col, grad * rel_row


@triton.jit
def area_weights_backward(rel_row0, rel_row1, rel_col0, rel_col1, grad0, grad1, grad2, grad3):
    """Gradients of (rel_row0, rel_row1, rel_col0, rel_col1) from the gradients of the four corners' area weights."""
    area0 = corner_area(rel_row0, rel_col0)
    area1 = corner_area(rel_row0, rel_col1)
    area2 = corner_area(rel_row1, rel_col0)
    area3 = corner_area(rel_row1, rel_col1)
    total = area0 + area1 + area2 + area3
    mean = (grad0 * area3 + grad1 * area2 + grad2 * area1 + grad3 * area0) / total
    row_a, col_a = corner_area_backward(rel_row0, rel_col0, grad3, mean, total)
    row_b, col_b = corner_area_backward(rel_row0, rel_col1, grad2, mean, total)
    row_c, col_c = corner_area_backward(rel_row1, rel_col0, grad1, mean, total)
    row_d, col_d = corner_area_backward(rel_row1, rel_col1, grad0, mean, total)
    return row_a + row_b, row_c + row_d, col_a + col_c, col_b + col_d
