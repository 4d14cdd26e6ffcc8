"""Keeps one folded latent map for as long as the features and weights it came from stay what they were."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class _Source(NamedTuple):
    """One tensor a latent map was computed from, and how to tell that it is still the same."""

    tensor: weakref.ref[Tensor]
    version: int
    address: int
    storage: Tensor | None  # keeps a weight's memory, so that its address cannot come back with other contents
    contents: Tensor | None  # on a CPU, where comparing a few hundred kilobytes costs nothing

    def is_still(self, tensor: Tensor) -> bool:
        return (
            self.tensor() is tensor
            and self.version == tensor._version
            and self.address == tensor.data_ptr()
            and (self.storage is None or self.storage.dtype == tensor.dtype)
            and (self.contents is None or torch.equal(self.contents, tensor))
        )


class _Entry(NamedTuple):
    feat: _Source
    weights: tuple[_Source, ...]
    autocast: tuple[bool, torch.dtype]
    latent_map: Tensor


class LatentCache:
    """The latent map of one model's current features.

    It is found again while feat and weights are the same tensors, unchanged in place, under the same autocast. It is
    dropped when feat dies, and copies and pickles of the cache are empty. A change of feat through `.data`, or of
    weights on an accelerator through `.data` or a fused optimiser, leaves no trace in PyTorch and goes unseen until the
    features are computed anew.
    """

    def __init__(self) -> None:
        self._entry: _Entry | None = None

    def __reduce__(self) -> tuple[type[LatentCache], tuple[()]]:
        return (LatentCache, ())

    def clear(self) -> None:
        self._entry = None

    def get(self, feat: Tensor, weights: Sequence[Tensor], fold: Callable[[], Tensor]) -> Tensor | None:
        """The kept map, or the one `fold` makes now; None where changes to the tensors could not be noticed."""
        if not all(_can_be_watched(tensor) for tensor in (feat, *weights)):
            return None
        device = feat.device.type
        autocast = (torch.is_autocast_enabled(device), torch.get_autocast_dtype(device))
        entry = self._entry  # read once: replicas of a model in other threads share the cache
        if (
            entry is not None
            and entry.autocast == autocast
            and entry.feat.is_still(feat)
            and len(entry.weights) == len(weights)
            and all(source.is_still(weight) for source, weight in zip(entry.weights, weights, strict=True))
        ):
            return entry.latent_map
        self._entry = entry = None  # before folding: never two maps at a time
        latent_map = fold()
        self._entry = _Entry(self._watch_feat(feat), tuple(map(_watch_weight, weights)), autocast, latent_map)
        return latent_map

    def _watch_feat(self, feat: Tensor) -> _Source:
        owner = weakref.ref(self)

        def drop(_: weakref.ref[Tensor]) -> None:
            cache = owner()
            if cache is not None:
                cache.clear()

        return _Source(weakref.ref(feat, drop), feat._version, feat.data_ptr(), None, None)


def _watch_weight(weight: Tensor) -> _Source:
    contents = weight.detach().clone() if weight.device.type == "cpu" else None
    return _Source(weakref.ref(weight), weight._version, weight.data_ptr(), weight.detach(), contents)


def _can_be_watched(tensor: Tensor) -> bool:
    # Subclasses may have no memory of their own; inference tensors count no versions.
    return type(tensor) in (Tensor, torch.nn.Parameter) and not tensor.is_inference()
