"""The ops as PyTorch sees them: schema, fake, autograd, each once for every backend.

Every op takes the chosen backend's name as its last argument and hands the call to that backend's module, which has
one function of the same name. Gradients of the folded first layer's convolution are PyTorch's own: `query` and `render`
begin at the latent map. What leaves an op has the compute dtype (float64 for float64 maps, otherwise float32); the
doors cast.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

_MODULES = {name: f"{__package__}.backends.{name}" for name in ("cpu", "cuda", "triton")}


def _implementation(backend: str) -> ModuleType:
    return import_module(_MODULES[backend])


def compute_dtype(values: Tensor) -> torch.dtype:
    """The dtype of geometry and of what the fused ops return."""
    return torch.float64 if values.dtype == torch.float64 else torch.float32


def latent_dtype(backend: str, dtype: torch.dtype, trained: bool) -> torch.dtype:
    """The dtype of the latent map when the op runs in `dtype`.

    Rounding the map to 16 bits turns some ReLUs of the first layer round, which costs gradients several times the error
    that PyTorch's own 16-bit layers make: training keeps float32. On a CPU only bfloat16 gains anything from 16 bits.
    """
    narrow = dtype in (torch.float16, torch.bfloat16)
    if narrow and (trained or (backend == "cpu" and dtype == torch.float16)):
        return torch.float32
    return dtype


def allows_tf32() -> bool:
    """Whether the user lets float32 products on an accelerator round their operands to TF32."""
    return torch.backends.cuda.matmul.fp32_precision == "tf32"  # what allow_tf32 and its successors set


def _match(grad: Tensor, tensor: Tensor | None) -> Tensor | None:
    """A gradient in its tensor's dtype; None where there was nothing to differentiate."""
    return None if tensor is None or not tensor.requires_grad else grad.to(tensor.dtype)


# ------------------------------------------------------------------------------------------------------------- gather


@torch.library.custom_op("liif_fast::gather", mutates_args=())
def gather(
    feat: Tensor, coord: Tensor, cell: Tensor | None, feat_unfold: bool, local_ensemble: bool, backend: str
) -> tuple[Tensor, Tensor]:
    return _implementation(backend).gather(feat, coord, cell, feat_unfold, local_ensemble)


@gather.register_fake
def _(
    feat: Tensor, coord: Tensor, cell: Tensor | None, feat_unfold: bool, local_ensemble: bool, backend: str
) -> tuple[Tensor, Tensor]:
    batch, queries = coord.shape[:2]
    corners = 4 if local_ensemble else 1
    depth = feat.shape[1] * (9 if feat_unfold else 1) + 2 + (0 if cell is None else 2)
    return (
        feat.new_empty(batch, queries, corners, depth),
        coord.new_empty(batch, queries, corners, dtype=compute_dtype(feat)),
    )


@torch.library.custom_op("liif_fast::gather_backward", mutates_args=())
def gather_backward(
    grad_x: Tensor,
    grad_area_weight: Tensor,
    feat: Tensor,
    coord: Tensor,
    cell: Tensor | None,
    feat_unfold: bool,
    local_ensemble: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    return _implementation(backend).gather_backward(
        grad_x, grad_area_weight, feat, coord, cell, feat_unfold, local_ensemble
    )


@gather_backward.register_fake
def _(
    grad_x: Tensor,
    grad_area_weight: Tensor,
    feat: Tensor,
    coord: Tensor,
    cell: Tensor | None,
    feat_unfold: bool,
    local_ensemble: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = compute_dtype(feat)
    grad_cell = coord.new_empty(0, dtype=dtype) if cell is None else coord.new_empty(cell.shape, dtype=dtype)
    return feat.new_empty(feat.shape, dtype=dtype), coord.new_empty(coord.shape, dtype=dtype), grad_cell


def _gather_setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    feat, coord, cell, ctx.feat_unfold, ctx.local_ensemble, ctx.backend = inputs
    ctx.save_for_backward(feat, coord, cell)


def _gather_backward(ctx: Any, grad_x: Tensor, grad_area_weight: Tensor) -> tuple[Any, ...]:
    feat, coord, cell = ctx.saved_tensors
    grad_feat, grad_coord, grad_cell = gather_backward(
        grad_x, grad_area_weight, feat, coord, cell, ctx.feat_unfold, ctx.local_ensemble, ctx.backend
    )
    return _match(grad_feat, feat), _match(grad_coord, coord), _match(grad_cell, cell), None, None, None


gather.register_autograd(_gather_backward, setup_context=_gather_setup)

# ----------------------------------------------------------------------------------------------------------- ensemble


@torch.library.custom_op("liif_fast::ensemble", mutates_args=())
def ensemble(pred: Tensor, area_weight: Tensor, backend: str) -> Tensor:
    return _implementation(backend).ensemble(pred, area_weight)


@ensemble.register_fake
def _(pred: Tensor, area_weight: Tensor, backend: str) -> Tensor:
    batch, queries, _, out = pred.shape
    return pred.new_empty(batch, queries, out, dtype=compute_dtype(pred))


@torch.library.custom_op("liif_fast::ensemble_backward", mutates_args=())
def ensemble_backward(grad_out: Tensor, pred: Tensor, area_weight: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    return _implementation(backend).ensemble_backward(grad_out, pred, area_weight)


@ensemble_backward.register_fake
def _(grad_out: Tensor, pred: Tensor, area_weight: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    dtype = compute_dtype(pred)
    return pred.new_empty(pred.shape, dtype=dtype), pred.new_empty(area_weight.shape, dtype=dtype)


def _ensemble_setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    pred, area_weight, ctx.backend = inputs
    ctx.save_for_backward(pred, area_weight)


def _ensemble_backward(ctx: Any, grad_out: Tensor) -> tuple[Any, ...]:
    pred, area_weight = ctx.saved_tensors
    grad_pred, grad_area_weight = ensemble_backward(grad_out, pred, area_weight, ctx.backend)
    return _match(grad_pred, pred), _match(grad_area_weight, area_weight), None


ensemble.register_autograd(_ensemble_backward, setup_context=_ensemble_setup)

# ---------------------------------------------------------------------------------------------------- query and render
# weight_geometry is the first layer's part for rel_coord (and rel_cell): [K, 2 or 4]. `weights` holds the layers after
# the first, `biases` those of all layers. `operands` is the dtype in which matrix products multiply: the latent map may
# be wider (latent_dtype). With `save` the forward keeps what the backward wants to know, in one tensor of bytes that
# only the backend can read; without it that tensor is empty and the backward computes it again. Gradients come back as
# one flat list: latent_map, weight_geometry, *weights, *biases, and with `coord_grad` coord [, cell].


def _out_channels(latent_map: Tensor, weights: Sequence[Tensor]) -> int:
    return weights[-1].shape[0] if weights else latent_map.shape[-1]


def _empty_grads(tensors: Sequence[Tensor | None], dtype: torch.dtype) -> list[Tensor]:
    return [tensor.new_empty(tensor.shape, dtype=dtype) for tensor in tensors if tensor is not None]


def _empty_saved(
    latent_map: Tensor,
    queries: int,
    weights: Sequence[Tensor],
    local_ensemble: bool,
    operands: torch.dtype,
    save: bool,
    coord_grad: bool,
    backend: str,
) -> Tensor:
    """`saved`, unwritten. queries: of the whole batch."""
    size = 0
    if save:
        widths = [latent_map.shape[-1], *(weight.shape[0] for weight in weights)]
        rows = queries * (4 if local_ensemble else 1)
        size = _implementation(backend).saved_bytes(queries, rows, widths, operands, coord_grad)
    return latent_map.new_empty(size, dtype=torch.uint8)


@torch.library.custom_op("liif_fast::query", mutates_args=())
def query(
    latent_map: Tensor,
    coord: Tensor,
    cell: Tensor | None,
    weight_geometry: Tensor,
    weights: list[Tensor],
    biases: list[Tensor],
    local_ensemble: bool,
    operands: torch.dtype,
    save: bool,
    coord_grad: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    queries = coord.shape[0] * coord.shape[1]
    saved = _empty_saved(latent_map, queries, weights, local_ensemble, operands, save, coord_grad, backend)
    out = _implementation(backend).query(
        latent_map, coord, cell, weight_geometry, weights, biases, local_ensemble, operands, coord_grad, saved
    )
    return out, saved


@query.register_fake
def _(
    latent_map: Tensor,
    coord: Tensor,
    cell: Tensor | None,
    weight_geometry: Tensor,
    weights: list[Tensor],
    biases: list[Tensor],
    local_ensemble: bool,
    operands: torch.dtype,
    save: bool,
    coord_grad: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    shape = (coord.shape[0], coord.shape[1], _out_channels(latent_map, weights))
    queries = coord.shape[0] * coord.shape[1]
    return (
        latent_map.new_empty(shape, dtype=compute_dtype(latent_map)),
        _empty_saved(latent_map, queries, weights, local_ensemble, operands, save, coord_grad, backend),
    )


@torch.library.custom_op("liif_fast::query_backward", mutates_args=())
def query_backward(
    grad_out: Tensor,
    saved: Tensor,
    latent_map: Tensor,
    coord: Tensor,
    cell: Tensor | None,
    weight_geometry: Tensor,
    weights: list[Tensor],
    biases: list[Tensor],
    local_ensemble: bool,
    operands: torch.dtype,
    coord_grad: bool,
    backend: str,
) -> list[Tensor]:
    return _implementation(backend).query_backward(
        grad_out,
        saved,
        latent_map,
        coord,
        cell,
        weight_geometry,
        weights,
        biases,
        local_ensemble,
        operands,
        coord_grad,
    )


@query_backward.register_fake
def _(
    grad_out: Tensor,
    saved: Tensor,
    latent_map: Tensor,
    coord: Tensor,
    cell: Tensor | None,
    weight_geometry: Tensor,
    weights: list[Tensor],
    biases: list[Tensor],
    local_ensemble: bool,
    operands: torch.dtype,
    coord_grad: bool,
    backend: str,
) -> list[Tensor]:
    tensors = [latent_map, weight_geometry, *weights, *biases, *((coord, cell) if coord_grad else ())]
    return _empty_grads(tensors, compute_dtype(latent_map))


def _query_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    latent_map, coord, cell, weight_geometry, weights, biases, *ctx.how, _save, coord_grad, backend = inputs
    ctx.how += [coord_grad, backend]  # local_ensemble, operands, coord_grad, backend
    ctx.layers = len(weights)
    ctx.save_for_backward(output[1], latent_map, coord, cell, weight_geometry, *weights, *biases)


def _query_backward(ctx: Any, grad_out: Tensor, _grad_saved: Tensor) -> tuple[Any, ...]:
    saved, latent_map, coord, cell, weight_geometry, *layers = ctx.saved_tensors
    weights, biases = layers[: ctx.layers], layers[ctx.layers :]
    coord_grad = ctx.how[2]
    grads = query_backward(grad_out, saved, latent_map, coord, cell, weight_geometry, weights, biases, *ctx.how)
    points = [tensor for tensor in (coord, cell) if tensor is not None] if coord_grad else []
    tensors = [latent_map, weight_geometry, *weights, *biases, *points]
    grad_latent_map, grad_weight_geometry, *rest = [
        _match(grad, tensor) for grad, tensor in zip(grads, tensors, strict=True)
    ]
    geometry = 2 * ctx.layers + 1
    grad_coord, grad_cell = [*rest[geometry:], None, None][:2]
    return (
        grad_latent_map,
        grad_coord,
        grad_cell,
        grad_weight_geometry,
        rest[: ctx.layers],
        rest[ctx.layers : geometry],
        *(None,) * 5,
    )


query.register_autograd(_query_backward, setup_context=_query_setup)

# `grid` = image height, width; window top, left, height, width; region top, left, full map height, full map width.


@torch.library.custom_op("liif_fast::render", mutates_args=())
def render(
    latent_map: Tensor,
    weight_geometry: Tensor,
    weights: list[Tensor],
    biases: list[Tensor],
    grid: list[int],
    cell: list[float],
    local_ensemble: bool,
    operands: torch.dtype,
    save: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    queries = latent_map.shape[0] * grid[4] * grid[5]
    saved = _empty_saved(latent_map, queries, weights, local_ensemble, operands, save, False, backend)
    out = _implementation(backend).render(
        latent_map, weight_geometry, weights, biases, grid, cell, local_ensemble, operands, saved
    )
    return out, saved


@render.register_fake
def _(
    latent_map: Tensor,
    weight_geometry: Tensor,
    weights: list[Tensor],
    biases: list[Tensor],
    grid: list[int],
    cell: list[float],
    local_ensemble: bool,
    operands: torch.dtype,
    save: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    shape = (latent_map.shape[0], _out_channels(latent_map, weights), grid[4], grid[5])
    queries = latent_map.shape[0] * grid[4] * grid[5]
    return (
        latent_map.new_empty(shape, dtype=compute_dtype(latent_map)),
        _empty_saved(latent_map, queries, weights, local_ensemble, operands, save, False, backend),
    )


@torch.library.custom_op("liif_fast::render_backward", mutates_args=())
def render_backward(
    grad_out: Tensor,
    saved: Tensor,
    latent_map: Tensor,
    weight_geometry: Tensor,
    weights: list[Tensor],
    biases: list[Tensor],
    grid: list[int],
    cell: list[float],
    local_ensemble: bool,
    operands: torch.dtype,
    backend: str,
) -> list[Tensor]:
    return _implementation(backend).render_backward(
        grad_out, saved, latent_map, weight_geometry, weights, biases, grid, cell, local_ensemble, operands
    )


@render_backward.register_fake
def _(
    grad_out: Tensor,
    saved: Tensor,
    latent_map: Tensor,
    weight_geometry: Tensor,
    weights: list[Tensor],
    biases: list[Tensor],
    grid: list[int],
    cell: list[float],
    local_ensemble: bool,
    operands: torch.dtype,
    backend: str,
) -> list[Tensor]:
    return _empty_grads([latent_map, weight_geometry, *weights, *biases], compute_dtype(latent_map))


def _render_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    latent_map, weight_geometry, weights, biases, *ctx.how, _save, backend = inputs
    ctx.how.append(backend)  # grid, cell, local_ensemble, operands, backend
    ctx.layers = len(weights)
    ctx.save_for_backward(output[1], latent_map, weight_geometry, *weights, *biases)


def _render_backward(ctx: Any, grad_out: Tensor, _grad_saved: Tensor) -> tuple[Any, ...]:
    saved, *tensors = ctx.saved_tensors
    latent_map, weight_geometry, *layers = tensors
    weights, biases = layers[: ctx.layers], layers[ctx.layers :]
    grads = render_backward(grad_out, saved, latent_map, weight_geometry, weights, biases, *ctx.how)
    grad_latent_map, grad_weight_geometry, *rest = [
        _match(grad, tensor) for grad, tensor in zip(grads, tensors, strict=True)
    ]
    return grad_latent_map, grad_weight_geometry, rest[: ctx.layers], rest[ctx.layers :], *(None,) * 6


render.register_autograd(_render_backward, setup_context=_render_setup)

# ------------------------------------------------------------------------------------------------------- metasr_query
# latent_map here is `metasr_fold`'s [B, H, W, O*(hidden + 1)]; weight [hidden, 3] and bias [hidden] are the first
# layer's. `region` = top, left, full map height, full map width.


@torch.library.custom_op("liif_fast::metasr_query", mutates_args=())
def metasr_query(
    latent_map: Tensor, coord: Tensor, cell: Tensor, weight: Tensor, bias: Tensor, region: list[int], backend: str
) -> Tensor:
    return _implementation(backend).metasr_query(latent_map, coord, cell, weight, bias, region)


@metasr_query.register_fake
def _(
    latent_map: Tensor, coord: Tensor, cell: Tensor, weight: Tensor, bias: Tensor, region: list[int], backend: str
) -> Tensor:
    shape = (coord.shape[0], coord.shape[1], latent_map.shape[-1] // (weight.shape[0] + 1))
    return latent_map.new_empty(shape, dtype=compute_dtype(latent_map))


@torch.library.custom_op("liif_fast::metasr_query_backward", mutates_args=())
def metasr_query_backward(
    grad_out: Tensor,
    latent_map: Tensor,
    coord: Tensor,
    cell: Tensor,
    weight: Tensor,
    bias: Tensor,
    region: list[int],
    backend: str,
) -> list[Tensor]:
    return _implementation(backend).metasr_query_backward(grad_out, latent_map, coord, cell, weight, bias, region)


@metasr_query_backward.register_fake
def _(
    grad_out: Tensor,
    latent_map: Tensor,
    coord: Tensor,
    cell: Tensor,
    weight: Tensor,
    bias: Tensor,
    region: list[int],
    backend: str,
) -> list[Tensor]:
    return _empty_grads([latent_map, coord, cell, weight, bias], compute_dtype(latent_map))


def _metasr_setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    *tensors, ctx.region, ctx.backend = inputs
    ctx.save_for_backward(*tensors)


def _metasr_backward(ctx: Any, grad_out: Tensor) -> tuple[Any, ...]:
    tensors = ctx.saved_tensors
    grads = metasr_query_backward(grad_out, *tensors, ctx.region, ctx.backend)
    return *(_match(grad, tensor) for grad, tensor in zip(grads, tensors, strict=True)), None, None


metasr_query.register_autograd(_metasr_backward, setup_context=_metasr_setup)
