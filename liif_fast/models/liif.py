"""LIIF and MetaSR as modules: an encoder, an imnet, and the ops between them.

Constructors, attributes, methods and state_dict keys are those of yinboc/liif; specs and checkpoints carry over.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from liif_fast import ops
from liif_fast.models import encoders as encoders  # registers the encoders' names
from liif_fast.models.coordinates import window_coord
from liif_fast.models.latent_cache import LatentCache
from liif_fast.models.registry import make_model, register
from liif_fast.ops import validation as checks
from liif_fast.ops.backends import OpRequest, choose_fused

__all__ = ["LIIF", "MLP", "MetaSR", "default_data_norm", "linear_layers", "make_model", "register"]

_RENDER_CHUNK = 65536  # queries a step where an image is rendered through coordinates: bounds the memory


def default_data_norm() -> dict[str, dict[str, list[float]]]:
    """The paper's normalisation, (x - sub) / div on values in [0, 1]: [0, 1] becomes [-1, 1]."""
    return {"inp": {"sub": [0.5], "div": [0.5]}, "gt": {"sub": [0.5], "div": [0.5]}}


@register("mlp")
class MLP(nn.Module):
    """Linear layers with ReLU between them: x [..., in_dim] -> [..., out_dim]; hidden_list gives the widths between."""

    def __init__(self, in_dim: int, out_dim: int, hidden_list: Sequence[int]) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        width = in_dim
        for hidden in hidden_list:
            layers += [nn.Linear(width, hidden), nn.ReLU()]
            width = hidden
        layers.append(nn.Linear(width, out_dim))
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


def linear_layers(imnet: nn.Module | None) -> list[nn.Linear] | None:
    """The Linear layers of an imnet the ops can run in its place, or None where they cannot.

    They can where it is an `MLP` or an `nn.Sequential` of plain Linear layers with biases and ReLU between them,
    without hooks, parametrisations or a forward of its own.
    """
    if isinstance(imnet, MLP) and type(imnet).forward is MLP.forward:
        modules = [imnet, imnet.layers, *imnet.layers]
        chain = list(imnet.layers)
    elif type(imnet) is nn.Sequential:
        modules = [imnet, *imnet]
        chain = list(imnet)
    else:
        return None
    linears = chain[::2]
    relus = chain[1::2]
    if len(linears) != len(relus) + 1 or any(type(relu) is not nn.ReLU for relu in relus):
        return None
    if any(type(linear) is not nn.Linear or linear.bias is None for linear in linears):
        return None
    if any(_is_intercepted(module) for module in modules):
        return None
    return linears  # type: ignore[return-value]


def _is_intercepted(module: nn.Module) -> bool:
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
    )


class _ImplicitModel(nn.Module):
    """What LIIF and MetaSR share: features made once, then queried at any coordinates.

    feat: the current features [B,C,H,W], from `gen_feat` or set by hand; like the latent map derived from them they are
        working memory, so copies and pickles of the model come without them.
    backend: which backend the ops use (None = the first that can run).
    data_norm: normalisation of inputs and outputs, {'inp': {'sub', 'div'}, 'gt': {'sub', 'div'}}, for values in [0, 1].
    """

    encoder: nn.Module

    def __init__(self) -> None:
        super().__init__()
        self.feat: Tensor | None = None
        self.backend: str | None = None
        self.data_norm = default_data_norm()
        self._latent_cache = LatentCache()

    def gen_feat(self, inp: Tensor) -> Tensor:
        """Encode inp [B,n_colors,H,W], already normalised; keeps and returns the features [B,C,H,W]."""
        if not torch.compiler.is_compiling():
            self._latent_cache.clear()
        self.feat = None  # the old features need not outlive the making of the new ones
        feat = self.encoder(inp)
        if not torch.compiler.is_compiling() and feat.is_inference():
            # An inference tensor does not count changes; without the count its latent map could not be kept.
            with torch.inference_mode(False):
                feat = feat.clone()
        self.feat = feat
        return feat

    def query_rgb(self, coord: Tensor, cell: Tensor | None = None) -> Tensor:
        """Decode the current features at coord [B,Q,2] with pixels of size cell [B,Q,2] -> [B,Q,out]."""
        raise NotImplementedError

    def forward(self, inp: Tensor, coord: Tensor, cell: Tensor | None = None) -> Tensor:
        """inp [B,n_colors,H,W], coord [B,Q,2], cell [B,Q,2] -> [B,Q,out]."""
        self.gen_feat(inp)
        return self.query_rgb(coord, cell)

    def render(
        self,
        size: tuple[int, int],
        *,
        window: tuple[int, int, int, int] | None = None,
        cell: tuple[float, float] | None = None,
        feat_region: tuple[int, int, int, int] | None = None,
    ) -> Tensor:
        """Decode the current features as an image of `size` (h, w), or the window of it -> [B,out,h,w].

        window: (top, left, height, width) in output pixels; None = all.
        cell: (rows, cols) pixel size in coordinates; None = (2/h, 2/w), the grid's own.
        feat_region: (top, left, H, W) where feat is only the part of an H x W map that begins at (top, left).
        """
        feat = self._current_feat()
        size = checks.check_size("size", size)
        top, left, rows, cols = checks.check_window(window, size)
        region = checks.check_region(feat_region, feat)
        if feat_region is not None:
            checks.check_reach(size, (top, left, rows, cols), region, feat, self._reach())
        geometry = torch.float64 if feat.dtype == torch.float64 else torch.float32
        cells = torch.tensor(cell or (2 / size[0], 2 / size[1]), dtype=geometry, device=feat.device)
        step = max(1, _RENDER_CHUNK // max(cols, 1))
        bands = []
        for row in range(top, top + max(rows, 1), step):  # an empty window still has a shape
            band = (row, left, min(step, top + rows - row), cols)
            coord = window_coord(size, band, dtype=geometry, device=feat.device)
            shape = (feat.shape[0], coord.shape[0], 2)
            out = self._query_part(coord.expand(shape), cells.expand(shape), region)
            bands.append(out.transpose(1, 2).reshape(feat.shape[0], out.shape[-1], band[2], cols))
        return torch.cat(bands, dim=2)

    def _query_part(self, coord: Tensor, cell: Tensor, region: tuple[int, int, int, int] | None) -> Tensor:
        """query_rgb where the current features may be a part of a map, as feat_region says of it; None: all of it."""
        feat = self._current_feat()
        return self.query_rgb(*_place_region(feat, checks.check_region(region, feat), coord, cell))

    def _reach(self) -> int:
        """Latents that a query reads around its nearest corners."""
        return 1

    def _current_feat(self) -> Tensor:
        if self.feat is None:
            raise RuntimeError("this model has no features to query yet: call gen_feat(inp) first")
        return self.feat

    def _latent_map(
        self, op: str, weights: Sequence[Tensor], fold: Callable[[], Tensor], widths: tuple[int, ...] = ()
    ) -> Tensor | None:
        """The current features' latent map from the cache, where gradients, tracing and op's backend allow one."""
        if torch.compiler.is_compiling() or torch.jit.is_tracing():
            return None
        if torch.is_grad_enabled():
            self._latent_cache.clear()  # training: weights are about to change
            return None
        feat = self._current_feat()
        if not choose_fused(OpRequest(op, feat.device.type, feat.dtype, widths), self.backend)[1]:
            return None  # what runs it layer by layer does not fold
        return self._latent_cache.get(feat, weights, fold)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        self._latent_cache.clear()
        return super()._apply(fn, recurse)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "feat": None}


@register("liif")
class LIIF(_ImplicitModel):
    """Local implicit image function (Chen et al., CVPR 2021).

    encoder_spec, imnet_spec: what `make_model` takes; the imnet's in_dim is filled in. Without imnet_spec the nearest
    feature is the output, for an encoder that upsamples by itself.
    local_ensemble, feat_unfold, cell_decode: the paper's switches.
    recompute: an attribute, False: whether training computes activations again in the backward instead of keeping them.

    An imnet that is not plain Linear and ReLU layers is run as it is, between `ops.gather` and `ops.ensemble`.
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
        args: dict[str, Any] = {"encoder_spec": _without_weights(encoder_spec)}
        if imnet_spec is not None:
            in_dim = cast(int, self.encoder.out_dim) * (9 if feat_unfold else 1) + 2 + (2 if cell_decode else 0)
            self.imnet = make_model(imnet_spec, args={"in_dim": in_dim})
            args["imnet_spec"] = _without_weights(imnet_spec)
        self.spec = {"name": "liif", "args": args}

    @property
    def spec(self) -> dict[str, Any]:
        """What `make_model` takes to build this model, with the switches as they stand now."""
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

        cell may be left out where cell_decode is off.
        """
        feat = self._current_feat()
        if self.imnet is None:
            return _sample_nearest(feat, coord)
        layers = linear_layers(self.imnet)
        if layers is None:
            return self._query_with_imnet(feat, coord, cell)
        weights, biases = [layer.weight for layer in layers], [layer.bias for layer in layers]
        return ops.query(
            feat,
            coord,
            cell,
            weights,
            biases,
            local_ensemble=self.local_ensemble,
            feat_unfold=self.feat_unfold,
            cell_decode=self.cell_decode,
            latent_map=self._folded("decode", weights),
            recompute=self.recompute,
            backend=self.backend,
        )

    def render(
        self,
        size: tuple[int, int],
        *,
        window: tuple[int, int, int, int] | None = None,
        cell: tuple[float, float] | None = None,
        feat_region: tuple[int, int, int, int] | None = None,
    ) -> Tensor:
        """Decode the current features as an image of `size` (h, w), or the window of it -> [B,out,h,w].

        Arguments as in `ops.render`; where it can run the imnet, coordinates are never stored.
        """
        layers = linear_layers(self.imnet)
        if layers is None:
            return super().render(size, window=window, cell=cell, feat_region=feat_region)
        weights, biases = [layer.weight for layer in layers], [layer.bias for layer in layers]
        return ops.render(
            self._current_feat(),
            size,
            weights,
            biases,
            window=window,
            cell=cell,
            feat_region=feat_region,
            local_ensemble=self.local_ensemble,
            feat_unfold=self.feat_unfold,
            cell_decode=self.cell_decode,
            latent_map=self._folded("decode", weights),
            recompute=self.recompute,
            backend=self.backend,
        )

    def _reach(self) -> int:
        return 1 if self.feat_unfold and self.imnet is not None else 0

    def _folded(self, op: str, weights: Sequence[Tensor]) -> Tensor | None:
        feat, first = self._current_feat(), weights[0]
        widths = tuple(weight.shape[0] for weight in weights)
        return self._latent_map(op, [first], lambda: ops.fold(feat, first, feat_unfold=self.feat_unfold), widths)

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
        pred = self.imnet(x.flatten(0, 2))  # rows of inputs, as the original hands them over
        return ops.ensemble(pred.view(*x.shape[:3], pred.shape[-1]), area_weight, backend=self.backend)


@register("metasr")
class MetaSR(_ImplicitModel):
    """Meta-SR (Hu et al., CVPR 2019) as the LIIF paper compares with it: its imnet predicts a 3x3 filter per query."""

    def __init__(self, encoder_spec: dict[str, Any]) -> None:
        super().__init__()
        self.encoder = make_model(encoder_spec)
        out_dim = cast(int, self.encoder.out_dim) * 9 * getattr(self.encoder, "n_colors", 3)
        self.imnet = make_model({"name": "mlp", "args": {"in_dim": 3, "out_dim": out_dim, "hidden_list": [256]}})
        self.spec = {"name": "metasr", "args": {"encoder_spec": _without_weights(encoder_spec)}}

    def query_rgb(self, coord: Tensor, cell: Tensor | None = None) -> Tensor:
        """Decode the current features at coord [B,Q,2] with pixels of size cell [B,Q,2] -> [B,Q,n_colors]."""
        if cell is None:
            raise ValueError("MetaSR needs the pixel sizes: give cell [B,Q,2]")
        return self._query_part(coord, cell, None)

    def _query_part(self, coord: Tensor, cell: Tensor, region: tuple[int, int, int, int] | None) -> Tensor:
        feat = self._current_feat()
        layers = linear_layers(self.imnet)
        if layers is None:
            found = type(self.imnet).__name__
            raise TypeError(f"MetaSR's imnet must be Linear, ReLU, Linear without hooks, this {found} is not")
        weights, biases = [layer.weight for layer in layers], [layer.bias for layer in layers]
        latent_map = self._latent_map(
            "metasr_query", [weights[-1], biases[-1]], lambda: ops.metasr_fold(feat, weights, biases)
        )
        return ops.metasr_query(
            feat, coord, cell, weights, biases, feat_region=region, latent_map=latent_map, backend=self.backend
        )


def _sample_nearest(feat: Tensor, coord: Tensor) -> Tensor:
    """feat [B,C,H,W] at the latents nearest to coord [B,Q,2] -> [B,Q,C]; outside the image 0, as in the original."""
    geometry = torch.float64 if feat.dtype == torch.float64 else torch.float32
    grid = coord.to(geometry).flip(-1).unsqueeze(1)
    sampled = F.grid_sample(feat.to(geometry), grid, mode="nearest", align_corners=False)[:, :, 0, :].permute(0, 2, 1)
    return sampled if torch.is_autocast_enabled(feat.device.type) else sampled.to(feat.dtype)


def _place_region(
    feat: Tensor, region: tuple[int, int, int, int], coord: Tensor, cell: Tensor
) -> tuple[Tensor, Tensor]:
    """Coordinates and cells of a whole map as they read on the part of it that feat is; exact up to rounding."""
    part = (feat.shape[-2], feat.shape[-1])
    if region[2:] == part:
        return coord, cell
    offset, whole, size = (coord.new_tensor(v, dtype=torch.float64) for v in (region[:2], region[2:], part))
    latents = (coord.double() + 1) / 2 * whole - offset
    return (latents / size * 2 - 1).to(coord.dtype), (cell.double() * whole / size).to(cell.dtype)


def _without_weights(spec: dict[str, Any]) -> dict[str, Any]:
    return copy.deepcopy({key: value for key, value in spec.items() if key != "sd"})
