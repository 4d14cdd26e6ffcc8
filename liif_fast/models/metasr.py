"""MetaSR as a module: the paper's baseline, whose imnet predicts a filter for each query."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

from torch import Tensor

from liif_fast import ops
from liif_fast.models.base import ImplicitModel, linear_layers, without_weights
from liif_fast.models.registry import make_model, register
from liif_fast.ops.backends import OpRequest, choose


@register("metasr")
class MetaSR(ImplicitModel):
    """Meta-SR (Hu et al., CVPR 2019) as the LIIF paper compares with it: its imnet predicts a 3x3 filter per query."""

    def __init__(self, encoder_spec: dict[str, Any]) -> None:
        super().__init__()
        self.encoder = make_model(encoder_spec)
        out_dim = cast(int, self.encoder.out_dim) * 9 * getattr(self.encoder, "n_colors", 3)
        self.imnet = make_model({"name": "mlp", "args": {"in_dim": 3, "out_dim": out_dim, "hidden_list": [256]}})
        self.spec = {"name": "metasr", "args": {"encoder_spec": without_weights(encoder_spec)}}

    def query_rgb(self, coord: Tensor, cell: Tensor | None = None) -> Tensor:
        """Decode the current features at coord [B,Q,2] with pixels of size cell [B,Q,2] -> [B,Q,n_colors]."""
        if cell is None:
            raise ValueError("MetaSR needs the pixel sizes: give cell [B,Q,2]")
        return self._query_region(coord, cell, None)

    def _query_region(self, coord: Tensor, cell: Tensor, region: tuple[int, int, int, int] | None) -> Tensor:
        feat = self._current_feat()
        layers = linear_layers(self.imnet)
        if layers is None:
            found = type(self.imnet).__name__
            raise TypeError(f"MetaSR's imnet must be Linear, ReLU, Linear without hooks, this {found} is not")
        weights, biases = [layer.weight for layer in layers], [layer.bias for layer in layers]
        latent_map = self._latent_map([weights[-1], biases[-1]], lambda: self._fold(feat, weights, biases))
        return ops.metasr_query(
            feat, coord, cell, weights, biases, feat_region=region, latent_map=latent_map, backend=self.backend
        )

    def _fold(self, feat: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor]) -> Tensor | None:
        """The latent map that the op would make; None for the reference, which does not fold."""
        if choose(OpRequest.on(feat, "metasr_query"), self.backend) == "reference":
            return None
        return ops.metasr_fold(feat, weights, biases)
