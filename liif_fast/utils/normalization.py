"""Normalization of colors: a model's `data_norm` as tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

Norm = Mapping[str, Mapping[str, Sequence[float]]]  # {'inp': {'sub', 'div'}, 'gt': {'sub', 'div'}}


def default_data_norm() -> dict[str, dict[str, list[float]]]:
    """The paper's normalization of values in [0, 1], (x - sub) / div: it maps [0, 1] to [-1, 1]."""
    return {"inp": {"sub": [0.5], "div": [0.5]}, "gt": {"sub": [0.5], "div": [0.5]}}


class Normalization(NamedTuple):
    """One side of a data_norm: a color c in [0, 1] becomes (c - sub) / div. sub, div: [channels] or [1]."""

    sub: Tensor
    div: Tensor

    def normalize(self, colors: Tensor, channel: int = 1) -> Tensor:
        """Colors in [0, 1] as inputs of the model. channel: the dimension of `colors` that holds the channels."""
        sub, div = self._shaped(colors, channel)
        return (colors - sub) / div

    def restore(self, values: Tensor, channel: int = 1) -> Tensor:
        """The inverse of `normalize`."""
        sub, div = self._shaped(values, channel)
        return values * div + sub

    def _shaped(self, values: Tensor, channel: int) -> tuple[Tensor, Tensor]:
        shape = [1] * values.dim()
        shape[channel] = -1
        return self.sub.view(shape), self.div.view(shape)


def normalizations(
    data_norm: Norm, device: torch.device | str | None = None, dtype: torch.dtype = torch.float32
) -> tuple[Normalization, Normalization]:
    """The two sides of a data_norm, inputs ('inp') and outputs ('gt'); raises ValueError for another structure."""
    try:
        inp, gt = (
            Normalization(*(torch.tensor(data_norm[side][part], dtype=dtype, device=device) for part in ("sub", "div")))
            for side in ("inp", "gt")
        )
    except (KeyError, TypeError, ValueError) as error:
        structure = "{'inp': {'sub', 'div'}, 'gt': {'sub', 'div'}}"
        raise ValueError(f"data_norm is not {structure}: {data_norm!r}") from error
    return inp, gt
