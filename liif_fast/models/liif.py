"""LIIF as a module: an encoder, an imnet, and the ops between them.

Constructor, attributes, methods and state_dict keys are those of yinboc/liif, so its specs and checkpoints can be used.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from liif_fast import ops
from liif_fast.models.base import ImplicitModel, linear_layers, without_weights
from liif_fast.models.registry import make_model, register
from liif_fast.ops.dtypes import geometry_dtype
from liif_fast.ops.query import latent_map_for


@register("liif")
class LIIF(ImplicitModel):
    """Local implicit image function (Chen et al., CVPR 2021).

    encoder_spec, imnet_spec: specs for `make_model`; the imnet's in_dim is filled in. Without imnet_spec the output is
        the nearest feature, for an encoder that upsamples by itself.
    local_ensemble, feat_unfold, cell_decode: the paper's switches.
    recompute: an attribute, False by default: the backward pass recomputes activations instead of storing them.

    An imnet with other layers than Linear and ReLU runs as it is, between `ops.gather` and `ops.ensemble`.
    """

    def __init__(
        self,
        encoder_spec: dict[str, Any],
        imnet_spec: dict[str, Any] | None = None,
        local_ensemble: bool = True,
        feat_unfold: bool = True,
        cell_decode: bool = True,
    ) -> None:
        super().__init__()
        self.local_ensemble = local_ensemble
        self.feat_unfold = feat_unfold
        self.cell_decode = cell_decode
        self.recompute = False
        self.encoder = make_model(encoder_spec)
        self.imnet: nn.Module | None = None
        args: dict[str, Any] = {"encoder_spec": without_weights(encoder_spec)}
        if imnet_spec is not None:
            in_dim = cast(int, self.encoder.out_dim) * (9 if feat_unfold else 1) + 2 + (2 if cell_decode else 0)
            self.imnet = make_model(imnet_spec, args={"in_dim": in_dim})
            args["imnet_spec"] = without_weights(imnet_spec)
        self.spec = {"name": "liif", "args": args}

    @property
    def spec(self) -> dict[str, Any]:
        """The spec from which `make_model` builds this model, with the current values of the switches."""
        args = dict(self._spec["args"])
        for name in ("local_ensemble", "feat_unfold", "cell_decode"):
            if args.get(name, True) != getattr(self, name):
                args[name] = getattr(self, name)
        return {"name": self._spec["name"], "args": args}

    @spec.setter
    def spec(self, spec: dict[str, Any]) -> None:
        self._spec = spec

    def query_rgb(self, coord: Tensor, cell: Tensor | None = None) -> Tensor:
        """Decode the current features at coord [B,Q,2] with pixels of size cell [B,Q,2] -> [B,Q,out].

        cell may be None if cell_decode is off.
        """
        feat = self._current_feat()
        if self.imnet is None:
            return _sample_nearest(feat, coord)
        layers = linear_layers(self.imnet)
        if layers is None:
            return self._query_with_imnet(feat, coord, cell)
        return ops.query(feat, coord, cell, **self._decoder(feat, layers))

    def render(
        self,
        size: tuple[int, int],
        *,
        window: tuple[int, int, int, int] | None = None,
        cell: tuple[float, float] | None = None,
        feat_region: tuple[int, int, int, int] | None = None,
        source: tuple[float, float, float, float] | None = None,
    ) -> Tensor:
        """Decode the current features as an image of `size` (h, w), or a window of it -> [B,out,h,w].

        Arguments as in `ops.render`, which runs if the imnet has only Linear and ReLU layers; it stores no coordinates.
        """
        layers = linear_layers(self.imnet)
        if layers is None:
            return super().render(size, window=window, cell=cell, feat_region=feat_region, source=source)
        feat = self._current_feat()
        options = {**self._decoder(feat, layers), "source": source}
        return ops.render(feat, size, window=window, cell=cell, feat_region=feat_region, **options)

    def _decoder(self, feat: Tensor, layers: Sequence[nn.Linear]) -> dict[str, Any]:
        """The arguments that `ops.query` and `ops.render` have in common."""
        weights = [layer.weight for layer in layers]

        def make_latent_map() -> Tensor | None:
            return latent_map_for(feat, weights, feat_unfold=self.feat_unfold, backend=self.backend)

        return {
            "weights": weights,
            "biases": [layer.bias for layer in layers],
            "local_ensemble": self.local_ensemble,
            "feat_unfold": self.feat_unfold,
            "cell_decode": self.cell_decode,
            "latent_map": self._latent_map(weights[:1], make_latent_map),
            "recompute": self.recompute,
            "backend": self.backend,
        }

    def _reach(self) -> int:
        return 1 if self.feat_unfold and self.imnet is not None else 0

    def _query_with_imnet(self, feat: Tensor, coord: Tensor, cell: Tensor | None) -> Tensor:
        assert self.imnet is not None
        if self.cell_decode and cell is None:
            raise ValueError("this model decodes with cells: give cell [B,Q,2], or build it with cell_decode=False")
        x, area_weight = ops.gather(
            feat,
            coord,
            cell if self.cell_decode else None,
            feat_unfold=self.feat_unfold,
            local_ensemble=self.local_ensemble,
            backend=self.backend,
        )
        pred = self.imnet(x.flatten(0, 2))  # [rows, in_dim], the shape that the original gives to an imnet
        return ops.ensemble(pred.view(*x.shape[:3], pred.shape[-1]), area_weight, backend=self.backend)


def _sample_nearest(feat: Tensor, coord: Tensor) -> Tensor:
    """feat [B,C,H,W] at the latents nearest to coord [B,Q,2] -> [B,Q,C]; 0 outside the image, as in the original."""
    geometry = geometry_dtype(feat)
    grid = coord.to(geometry).flip(-1).unsqueeze(1)
    sampled = F.grid_sample(feat.to(geometry), grid, mode="nearest", align_corners=False)[:, :, 0, :].permute(0, 2, 1)
    return sampled if torch.is_autocast_enabled(feat.device.type) else sampled.to(feat.dtype)
