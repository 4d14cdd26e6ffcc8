"""Pixel grids: the original's coordinates to the bit."""

from __future__ import annotations

import pytest
import torch

from liif_fast.models.coordinates import make_cell, make_coord, to_pixel_samples, window_coord


def test_make_coord_is_the_original_to_the_bit() -> None:
    for shape, ranges in [((3, 5), None), ((7,), None), ((4, 1, 6), [(0, 1), (-2, 3), (-1, 1)])]:
        axes = []
        for axis, size in enumerate(shape):
            low, high = (-1, 1) if ranges is None else ranges[axis]
            radius = (high - low) / (2 * size)
            axes.append(low + radius + (2 * radius) * torch.arange(size).float())
        expected = torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1)
        assert torch.equal(make_coord(shape, ranges, flatten=False), expected)
        assert torch.equal(make_coord(shape, ranges), expected.view(-1, len(shape)))
    double = make_coord([3, 3], dtype=torch.float64)
    assert double.dtype == torch.float64 and abs(double[0, 0] + 2 / 3) < 1e-15


def test_a_windows_coordinates_are_rows_of_the_whole_grid() -> None:
    grid = make_coord([9, 11], flatten=False)
    assert torch.equal(window_coord((9, 11), (2, 3, 4, 5)), grid[2:6, 3:8].reshape(-1, 2))
    assert window_coord((9, 11), (2, 3, 0, 5)).shape == (0, 2)


def test_cells_and_pixel_samples() -> None:
    img = torch.rand(3, 4, 6).transpose(1, 2)  # any strides
    coord, rgb = to_pixel_samples(img)
    assert torch.equal(coord, make_coord([6, 4]))
    assert torch.equal(rgb, img.permute(1, 2, 0).reshape(-1, 3))
    cell = make_cell(coord, (6, 4))
    assert torch.equal(cell, torch.tensor([2 / 6, 2 / 4]).expand(24, 2))


def test_arguments_that_coordinates_refuse() -> None:
    with pytest.raises(ValueError, match="1 entries for a shape of 2 axes"):
        make_coord([2, 2], [(-1, 1)])
    with pytest.raises(ValueError, match="-1 pixels"):
        make_coord([2, -1])
    with pytest.raises(ValueError, match=r"not \(0, 4\)"):
        make_cell(torch.zeros(1, 2), (0, 4))
    with pytest.raises(ValueError, match=r"\[C,H,W\], not of shape \[4, 4\]"):
        to_pixel_samples(torch.zeros(4, 4))
