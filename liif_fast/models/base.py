"""The shared base of LIIF and MetaSR, and the MLP that both use as imnet."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from liif_fast.models.coordinates import window_coord
from liif_fast.models.pretrained import Pretrained
from liif_fast.models.registry import register
from liif_fast.ops import validation
from liif_fast.ops.dtypes import geometry_dtype
from liif_fast.utils.normalization import default_data_norm

_RENDER_CHUNK = 65536  # queries per step when an image is rendered through coordinates: bounds the memory


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


class _Source(NamedTuple):
    """A tensor from which a latent map was made, and its state at that time."""

    tensor: Tensor
    version: int  # PyTorch's count of in-place changes
    alias: Tensor  # keeps the memory allocated, so that no other tensor can get its address
    contents: Tensor | None  # for weights on a CPU, because not every change is counted

    @classmethod
    def of(cls, tensor: Tensor, is_weight: bool) -> _Source:
        alias = tensor.detach()
        contents = alias.clone() if is_weight and tensor.device.type == "cpu" else None
        return cls(tensor, tensor._version, alias, contents)

    def is_still(self, tensor: Tensor) -> bool:
        return (
            self.tensor is tensor
            and self.version == tensor._version
            and self.alias.data_ptr() == tensor.data_ptr()
            and (self.contents is None or torch.equal(self.contents, tensor))
        )


class _FoldedFeatures(NamedTuple):
    """The latent map of a model's features, and everything it depends on."""

    latent_map: Tensor
    sources: tuple[_Source, ...]
    settings: tuple[object, ...]


class ImplicitModel(Pretrained, nn.Module):
    """Base of LIIF and MetaSR: features are computed once, then decoded at any coordinates.

    feat: the current features [B,C,H,W], from `gen_feat` or assigned by hand. Copies and pickles of a model have none.
    backend: the backend of the ops; None = the first one that can run.
    data_norm: normalization of inputs and outputs, {'inp': {'sub', 'div'}, 'gt': {'sub', 'div'}}, for values in [0, 1].

    With gradients disabled, the first decode of the features also computes their latent map, and later decodes reuse
    it. New features, changed weights, another backend or another autocast replace the map. PyTorch does not count
    changes of a tensor through `.data` or by a fused optimizer. After such a change of the features, or of weights on
    an accelerator, call `gen_feat` again.
    """

    encoder: nn.Module
    feat: Tensor | None
    _folded: _FoldedFeatures | None

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
        """Decode the current features as an image of `size` (h, w), or a window of it -> [B,out,h,w].

        window: (top, left, height, width) in output pixels; None = the whole image.
        cell: (rows, cols) pixel size in coordinates; None = (2/h, 2/w), that of the grid.
        feat_region: (top, left, H, W) if feat is only a part of an H x W map, beginning at (top, left).
        """
        feat = self._current_feat()
        size = validation.check_size("size", size)
        top, left, rows, cols = validation.check_window(window, size)
        region = validation.check_region(feat_region, feat)
        if feat_region is not None:
            validation.check_reach(size, (top, left, rows, cols), region, feat, self._reach())
        geometry = geometry_dtype(feat)
        cells = torch.tensor(cell or (2 / size[0], 2 / size[1]), dtype=geometry, device=feat.device)
        step = max(1, _RENDER_CHUNK // max(cols, 1))
        chunks = []
        for row in range(top, top + max(rows, 1), step):  # one pass even for an empty window, to get its shape
            chunk = (row, left, min(step, top + rows - row), cols)
            coord = window_coord(size, chunk, dtype=geometry, device=feat.device)
            shape = (feat.shape[0], coord.shape[0], 2)
            out = self._query_region(coord.expand(shape), cells.expand(shape), region)
            chunks.append(out.transpose(1, 2).reshape(feat.shape[0], out.shape[-1], chunk[2], cols))
        return torch.cat(chunks, dim=2)

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
        Returns None if the op must run without a precomputed map: with gradients enabled, in traced code, for inference
        tensors (PyTorch does not count their changes), and if `make` returns None.
        """
        if torch.compiler.is_compiling() or torch.jit.is_tracing():
            return None
        sources = (self._current_feat(), *weights)
        if torch.is_grad_enabled() or any(tensor.is_inference() for tensor in sources):
            self._folded = None
            return None
        device = sources[0].device.type
        settings = (self.backend, torch.is_autocast_enabled(device), torch.get_autocast_dtype(device))
        folded = self._folded
        if folded is not None and folded.settings == settings and all(map(_Source.is_still, folded.sources, sources)):
            return folded.latent_map
        self._folded = folded = None  # frees the old map before the new one is made
        latent_map = make()
        if latent_map is not None:
            states = (_Source.of(sources[0], False), *(_Source.of(weight, True) for weight in weights))
            self._folded = _FoldedFeatures(latent_map, states, settings)
        return latent_map

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        self._folded = None
        return super()._apply(fn, recurse)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "feat": None, "_folded": None}


def without_weights(spec: dict[str, Any]) -> dict[str, Any]:
    """A deep copy of a spec without its state_dict."""
    return copy.deepcopy({key: value for key, value in spec.items() if key != "sd"})
