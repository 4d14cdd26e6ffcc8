"""The shared base of LIIF and MetaSR, and the MLP that both use as imnet."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from liif_fast.models.coordinates import window_coord
from liif_fast.models.latent_map import LatentMapHolder
from liif_fast.models.pretrained import Pretrained
from liif_fast.models.registry import register
from liif_fast.ops.decode import grid_place
from liif_fast.ops.dtypes import geometry_dtype
from liif_fast.utils.normalization import default_data_norm

_RENDER_CHUNK = 65536  # queries per step when an image is rendered through coordinates: bounds the memory
_Model = TypeVar("_Model", bound=nn.Module)


@register("mlp")
class MLP(nn.Module):
    """Linear layers with ReLU between them: x [..., in_dim] -> [..., out_dim]. hidden_list: the hidden widths."""

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
    """The Linear layers of an imnet that the ops can compute themselves, or None for any other imnet.

    The ops can compute an `MLP` or an `nn.Sequential` of Linear layers with biases and ReLU between them, if it has no
    hooks, no parametrizations and no forward of its own.
    """
    if isinstance(imnet, MLP) and type(imnet).forward is MLP.forward:
        return linear_chain(imnet.layers, imnet)
    return linear_chain(imnet)


def linear_chain(chain: nn.Module | None, owner: nn.Module | None = None) -> list[nn.Linear] | None:
    """The Linear layers of an `nn.Sequential` as `linear_layers` returns them; owner: the module that calls it."""
    if type(chain) is not nn.Sequential:
        return None
    layers = list(chain)
    linears, relus = layers[::2], layers[1::2]
    if len(linears) != len(relus) + 1 or any(type(relu) is not nn.ReLU for relu in relus):
        return None
    if any(type(linear) is not nn.Linear or linear.bias is None for linear in linears):
        return None
    if any(_is_intercepted(module) for module in (owner or chain, chain, *layers)):
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


class ImplicitModel(Pretrained, nn.Module):
    """Base of LIIF and MetaSR: features are computed once, then decoded at any coordinates.

    feat: the current features [B,C,H,W], from `gen_feat` or assigned by hand. Copies and pickles of a model have none.
    backend: the backend of the ops; None = the first one that can run.
    data_norm: normalization of inputs and outputs, {'inp': {'sub', 'div'}, 'gt': {'sub', 'div'}}, for values in [0, 1].

    With gradients disabled, the first decode of the features also computes their latent map, and later decodes reuse
    it. New features, changed weights, another backend or another autocast replace the map. PyTorch does not count
    changes of a tensor through `.data` or by a fused optimizer. After such a change of the features, or of weights on
    an accelerator, call `gen_feat` again.

    `feat`, `gen_feat`, `forward` and what follows them are state of the model: only one thread may use them. `encode`
    changes nothing, so any number of threads may call it on one model.
    """

    encoder: nn.Module
    feat: Tensor | None
    _folded: LatentMapHolder | None

    def __init__(self) -> None:
        super().__init__()
        self.feat = None
        self.backend: str | None = None
        self.data_norm = default_data_norm()

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "feat":
            self._folded = None
        super().__setattr__(name, value)

    def gen_feat(self, inp: Tensor) -> Tensor:
        """Encode inp [B,n_colors,H,W], already normalized; stores and returns the features [B,C,H,W]."""
        self.feat = None  # frees the old features before the new ones are computed
        feat = self.encoder(inp)
        if not torch.compiler.is_compiling() and feat.is_inference():
            # PyTorch does not count changes of an inference tensor, so its latent map could not be reused.
            with torch.inference_mode(False):
                feat = feat.clone()
        self.feat = feat
        return feat

    def encode(self: _Model, inp: Tensor) -> _Model:
        """A copy of this model that holds the features of inp [B,n_colors,H,W], already normalized.

        The copy shares the weights and all submodules, and has its own `feat`, latent map and `backend`. Query it with
        `query_rgb` or `render`. This model is not changed.
        """
        twin: Any = sharing(self)
        twin.gen_feat(inp)
        return twin

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
        source: tuple[float, float, float, float] | None = None,
    ) -> Tensor:
        """Decode the current features as an image of `size` (h, w), or a window of it -> [B,out,h,w].

        window: (top, left, height, width) in output pixels; None = the whole image.
        cell: (rows, cols) pixel size in coordinates; None = that of the grid, (2/h, 2/w) without `source`.
        feat_region: (top, left, H, W) if feat is only a part of an H x W map, beginning at (top, left).
        source: (top, left, height, width) of the part of the input that the image of `size` shows, in input pixels,
            which need not be whole and may lie beyond the border; None = all of it.
        """
        feat = self._current_feat()
        place = grid_place(feat, size, window, cell, source, feat_region, self._reach())
        height, width, top, left, rows, cols, first_row, first_col, map_rows, map_cols = place.grid
        region = (first_row, first_col, map_rows, map_cols)
        cells = place.grid_cell[:2]
        geometry = geometry_dtype(feat)
        # Of the image, in coordinates of the whole map.
        ranges = source and [
            (2 * source[i] / region[2 + i] - 1, 2 * (source[i] + source[2 + i]) / region[2 + i] - 1) for i in (0, 1)
        ]
        # One pass even for an empty window, to get its shape. An exported program decodes all rows at once.
        exports = torch.compiler.is_exporting()
        step = rows if exports else max(1, _RENDER_CHUNK // max(cols, 1))
        chunks = []
        for row in [top] if exports else range(top, top + max(rows, 1), step):
            count = rows if exports else min(step, top + rows - row)
            coord = window_coord(
                (height, width), (row, left, count, cols), ranges=ranges, dtype=geometry, device=feat.device
            )
            coord = coord.expand(feat.shape[0], -1, 2)
            steps = torch.stack([torch.full_like(coord[..., 0], side) for side in cells], dim=-1)
            out = self._query_region(coord, steps, region)
            chunks.append(out.transpose(1, 2).reshape(feat.shape[0], out.shape[-1], count, cols))
        return torch.cat(chunks, dim=2)

    def __prepare_scriptable__(self) -> None:
        raise RuntimeError(
            f"torch.jit.script cannot compile a {type(self).__name__}: use torch.jit.trace or torch.export"
        )

    def _query_region(self, coord: Tensor, cell: Tensor, region: tuple[int, int, int, int]) -> Tensor:
        """query_rgb with coordinates and cells of the whole map, of which feat is the checked `region`."""
        feat = self._current_feat()
        part = (feat.shape[-2], feat.shape[-1])
        if region[2:] != part:  # the same points in coordinates of the part; exact up to rounding
            offset, whole, size = (coord.new_tensor(v, dtype=torch.float64) for v in (region[:2], region[2:], part))
            latents = (coord.double() + 1) / 2 * whole - offset
            coord = (latents / size * 2 - 1).to(coord.dtype)
            cell = (cell.double() * whole / size).to(cell.dtype)
        return self.query_rgb(coord, cell)

    def _reach(self) -> int:
        """How many latents around its nearest corners a query reads."""
        return 1

    def _current_feat(self) -> Tensor:
        if self.feat is None:
            raise RuntimeError("this model has no features to query yet: call gen_feat(inp) first")
        return self.feat

    def _latent_map(self, weights: Sequence[Tensor], make: Callable[[], Tensor | None]) -> Tensor | None:
        """The latent map of the current features: reused if nothing changed, otherwise made by `make`.

        weights: the layers that the map contains.
        Returns None if the op must run without a precomputed map: in traced code, and as `LatentMapHolder.get` says.
        """
        if torch.compiler.is_compiling() or torch.jit.is_tracing():
            return None
        if self._folded is None:
            self._folded = LatentMapHolder()
        return self._folded.get(self._current_feat(), weights, (self.backend,), make)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        self._folded = None
        return super()._apply(fn, recurse)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "feat": None, "_folded": None}


def sharing(model: _Model) -> _Model:
    """A copy of a model that shares its submodules and tensors. Assignments to the copy do not reach the model."""
    twin = copy.copy(model)
    for name in ("_parameters", "_buffers", "_modules"):
        twin.__dict__[name] = twin.__dict__[name].copy()
    return twin


def in_eval_mode(model: _Model) -> _Model:
    """A copy of a model in eval mode that shares its tensors, and its submodules if they are all in eval mode already.

    Raises ValueError for a model in training mode whose parts cannot be copied.
    """
    if not any(module.training for module in model.modules()):
        return sharing(model)
    held = [
        tensor
        for module in model.modules()
        for tensor in (*module._parameters.values(), *module._buffers.values(), *vars(module).values())
        if isinstance(tensor, Tensor)
    ]
    try:
        return copy.deepcopy(model, {id(tensor): tensor for tensor in held}).eval()
    except (TypeError, RuntimeError) as error:
        raise ValueError(
            f"this {type(model).__name__} is in training mode and cannot be copied, so call its eval() first: {error}"
        ) from error


def without_weights(spec: dict[str, Any]) -> dict[str, Any]:
    """A deep copy of a spec without its state_dict."""
    return copy.deepcopy({key: value for key, value in spec.items() if key != "sd"})
