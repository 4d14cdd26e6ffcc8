"""Keeps the latent map of some features between decodes, as long as everything that it depends on stays the same."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class _Source(NamedTuple):
    """A tensor from which a latent map was made, and its state at that time."""

    tensor: weakref.ref[Tensor]
    version: int | None  # PyTorch's count of in-place changes; None for an inference tensor, which has no count
    alias: Tensor  # keeps the memory allocated, so that no other tensor can get its address
    contents: Tensor | None  # on a CPU, for weights and inference tensors, because not every change is counted

    @classmethod
    def of(cls, tensor: Tensor, is_weight: bool, on_death: Callable[[object], None] | None = None) -> _Source:
        alias, inference = tensor.detach(), tensor.is_inference()
        contents = alias.clone() if tensor.device.type == "cpu" and (is_weight or inference) else None
        return cls(weakref.ref(tensor, on_death), None if inference else tensor._version, alias, contents)

    def is_still(self, tensor: Tensor) -> bool:
        return (
            self.tensor() is tensor
            and (self.version is None or self.version == tensor._version)
            and self.alias.data_ptr() == tensor.data_ptr()
            and (self.contents is None or torch.equal(self.contents, tensor))
        )


class _KeptMap(NamedTuple):
    """A latent map and everything that it depends on."""

    latent_map: Tensor
    sources: tuple[_Source, ...]
    settings: tuple[object, ...]


class LatentMapHolder:
    """Holds one latent map at a time and drops it when its features are deleted. Every thread needs its own holder."""

    def __init__(self) -> None:
        self._kept: _KeptMap | None = None

    @property
    def latent_map(self) -> Tensor | None:
        """The map [B,H,W,K] that is held now."""
        return self._kept.latent_map if self._kept is not None else None

    def clear(self) -> None:
        """Drop the map."""
        self._kept = None

    def get(
        self,
        feat: Tensor,
        weights: Sequence[Tensor],
        settings: tuple[object, ...],
        make: Callable[[], Tensor | None],
    ) -> Tensor | None:
        """The map of feat: the one that is held if nothing changed, otherwise the one that `make` makes.

        weights: the layers that the map contains. settings: everything else that it depends on, besides autocast.
        Returns None if the op must run without a precomputed map: with gradients enabled, for inference tensors on an
        accelerator (PyTorch does not count their changes), and if `make` returns None.
        """
        sources, device = (feat, *weights), feat.device.type
        if torch.is_grad_enabled() or (device != "cpu" and any(tensor.is_inference() for tensor in sources)):
            self.clear()
            return None
        settings = (*settings, torch.is_autocast_enabled(device), torch.get_autocast_dtype(device))
        kept = self._kept
        if kept is not None and kept.settings == settings and all(map(_Source.is_still, kept.sources, sources)):
            return kept.latent_map
        self._kept = kept = None  # frees the old map before the new one is made
        latent_map = make()
        if latent_map is not None:
            holder = weakref.ref(self)  # a strong reference would be a cycle, which only a collection frees

            def drop(_: object) -> None:
                if (alive := holder()) is not None:
                    alive.clear()

            states = (_Source.of(feat, False, drop), *(_Source.of(weight, True) for weight in weights))
            self._kept = _KeptMap(latent_map, states, settings)
        return latent_map
