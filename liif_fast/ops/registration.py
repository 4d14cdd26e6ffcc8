"""The ops as PyTorch registers them: schema, fake and autograd, each once for every backend.

Every op takes the chosen backend's name as its last argument and calls the function of the same name in that backend's
module. `decode` starts at the latent map: PyTorch differentiates the convolution that makes it. An op returns the
geometry dtype (float64 for float64 inputs, otherwise float32); the public functions cast.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.library import register_autograd, register_fake

from .backends import calls, implementation
from .dtypes import geometry_dtype
from .inputs import DecodeInputs, GatherInputs, MetasrInputs
from .namespace import LIBRARY, register_op
from .transforms import is_transformed


def _match(grads: Sequence[Tensor], tensors: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Gradients in the dtypes of their tensors; None where a tensor is missing or needs no gradient."""
    return [
        None if tensor is None or not tensor.requires_grad else grad.to(tensor.dtype)
        for grad, tensor in zip(grads, tensors, strict=True)
    ]


def _is_differentiated(*grads: Tensor) -> bool:
    """Whether a backward is differentiated itself: with create_graph=True, or in forward mode."""
    return torch.is_grad_enabled() or is_transformed(*grads)


def _grads_by_calls(
    run: Callable[[], Sequence[Tensor]], tensors: Sequence[Tensor | None], grads: Sequence[Tensor]
) -> list[Tensor | None]:
    """Gradients with a graph of their own, for a backward that is differentiated: those of the `torch` backend."""
    with torch.enable_grad():
        pairs = [(out, grad) for out, grad in zip(run(), grads) if out.requires_grad]
        wanted = [tensor for tensor in tensors if tensor is not None and tensor.requires_grad]
        outs, known = zip(*pairs)
        found = iter(torch.autograd.grad(outs, wanted, known, create_graph=True, allow_unused=True))
    return [next(found) if tensor is not None and tensor.requires_grad else None for tensor in tensors]


def _empty_grads(tensors: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    return [tensor.new_empty(tensor.shape, dtype=dtype) for tensor in tensors]


_SCHEMA_TYPES = {
    Tensor: "Tensor",
    Tensor | None: "Tensor?",
    list[Tensor]: "Tensor[]",
    list[int]: "int[]",
    list[float]: "float[]",
    bool: "bool",
    torch.dtype: "ScalarType",
}


def _arguments(inputs: type) -> str:
    """The fields of a NamedTuple as arguments in a schema."""
    return ", ".join(f"{_SCHEMA_TYPES[kind]} {name}" for name, kind in inputs.__annotations__.items())


# ------------------------------------------------------------------------------------------------------------- gather


@register_op(f"gather({_arguments(GatherInputs)}, str backend) -> (Tensor, Tensor)")
def gather(*arguments: Any) -> tuple[Tensor, Tensor]:
    *fields, backend = arguments
    return implementation(backend).gather(GatherInputs(*fields))


@register_fake(gather, lib=LIBRARY)
def _(*arguments: Any) -> tuple[Tensor, Tensor]:
    inputs = GatherInputs(*arguments[:-1])
    weight = inputs.coord.new_empty(inputs.x_shape[:3], dtype=geometry_dtype(inputs.feat))
    return inputs.feat.new_empty(inputs.x_shape), weight


@register_op(
    f"gather_backward(Tensor grad_x, Tensor grad_area_weight, {_arguments(GatherInputs)}, str backend) "
    "-> (Tensor, Tensor, Tensor)",
)
def gather_backward(grad_x: Tensor, grad_area_weight: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    *fields, backend = arguments
    return implementation(backend).gather_backward(grad_x, grad_area_weight, GatherInputs(*fields))


@register_fake(gather_backward, lib=LIBRARY)
def _(grad_x: Tensor, grad_area_weight: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    feat, coord, cell = arguments[:3]
    return tuple(_empty_grads([feat, coord, coord.new_empty(0) if cell is None else cell], geometry_dtype(feat)))


def _gather_setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    feat, coord, cell, *ctx.options = inputs  # feat_unfold, local_ensemble, backend
    ctx.save_for_backward(feat, coord, cell)


def _gather_backward(ctx: Any, grad_x: Tensor, grad_area_weight: Tensor) -> tuple[Any, ...]:
    tensors = ctx.saved_tensors
    if _is_differentiated(grad_x, grad_area_weight):
        inputs = GatherInputs(*tensors, *ctx.options[:-1])
        return *_grads_by_calls(lambda: calls.gather(inputs), tensors, [grad_x, grad_area_weight]), None, None, None
    return *_match(gather_backward(grad_x, grad_area_weight, *tensors, *ctx.options), tensors), None, None, None


register_autograd(gather, _gather_backward, setup_context=_gather_setup, lib=LIBRARY)

# ----------------------------------------------------------------------------------------------------------- ensemble


@register_op("ensemble(Tensor pred, Tensor area_weight, str backend) -> Tensor")
def ensemble(pred: Tensor, area_weight: Tensor, backend: str) -> Tensor:
    return implementation(backend).ensemble(pred, area_weight)


@register_fake(ensemble, lib=LIBRARY)
def _(pred: Tensor, area_weight: Tensor, backend: str) -> Tensor:
    batch, queries, _, out = pred.shape
    return pred.new_empty(batch, queries, out, dtype=geometry_dtype(pred))


@register_op("ensemble_backward(Tensor grad_out, Tensor pred, Tensor area_weight, str backend) -> (Tensor, Tensor)")
def ensemble_backward(grad_out: Tensor, pred: Tensor, area_weight: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    return implementation(backend).ensemble_backward(grad_out, pred, area_weight)


@register_fake(ensemble_backward, lib=LIBRARY)
def _(grad_out: Tensor, pred: Tensor, area_weight: Tensor, backend: str) -> tuple[Tensor, ...]:
    return tuple(_empty_grads([pred, area_weight], geometry_dtype(pred)))


def _ensemble_setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    *tensors, ctx.backend = inputs
    ctx.save_for_backward(*tensors)


def _ensemble_backward(ctx: Any, grad_out: Tensor) -> tuple[Any, ...]:
    tensors = ctx.saved_tensors
    if _is_differentiated(grad_out):
        return *_grads_by_calls(lambda: [calls.ensemble(*tensors)], tensors, [grad_out]), None
    return *_match(ensemble_backward(grad_out, *tensors, ctx.backend), tensors), None


register_autograd(ensemble, _ensemble_backward, setup_context=_ensemble_setup, lib=LIBRARY)

# ------------------------------------------------------------------------------------------------------------- decode
# Both ops take the fields of DecodeInputs. With `save` the forward returns what its backward needs in one tensor of
# bytes whose layout the backend defines; without it that tensor is empty and the backward computes it again. `save` is
# None where no backward follows.
# Gradients come back in the order of DecodeInputs.differentiable.

_INPUTS = _arguments(DecodeInputs)
_FIELDS = len(DecodeInputs._fields)


@register_op(
    f"decode({_INPUTS}, bool? save, bool coord_grad, str backend) -> (Tensor, Tensor)",
)
def decode(*arguments: Any) -> tuple[Tensor, Tensor]:
    inputs, (save, coord_grad, backend) = DecodeInputs(*arguments[:_FIELDS]), arguments[_FIELDS:]
    return implementation(backend).decode(inputs, save, coord_grad)


@register_fake(decode, lib=LIBRARY)
def _(*arguments: Any) -> tuple[Tensor, Tensor]:
    inputs, (save, coord_grad, backend) = DecodeInputs(*arguments[:_FIELDS]), arguments[_FIELDS:]
    out = inputs.latent_map.new_empty(inputs.out_shape, dtype=geometry_dtype(inputs.latent_map))
    return out, inputs.empty_saved(implementation(backend).saved_bytes(inputs, coord_grad) if save else 0)


@register_op(
    f"decode_backward(Tensor grad_out, Tensor saved, {_INPUTS}, bool coord_grad, str backend) -> Tensor[]",
)
def decode_backward(grad_out: Tensor, saved: Tensor, *arguments: Any) -> list[Tensor]:
    inputs, (coord_grad, backend) = DecodeInputs(*arguments[:_FIELDS]), arguments[_FIELDS:]
    return implementation(backend).decode_backward(grad_out, saved, inputs, coord_grad)


@register_fake(decode_backward, lib=LIBRARY)
def _(grad_out: Tensor, saved: Tensor, *arguments: Any) -> list[Tensor]:
    inputs = DecodeInputs(*arguments[:_FIELDS])
    return _empty_grads(inputs.differentiable(arguments[_FIELDS]), geometry_dtype(inputs.latent_map))


def _decode_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    fields = DecodeInputs(*inputs[:_FIELDS])
    _save, ctx.coord_grad, ctx.backend = inputs[_FIELDS:]
    ctx.layers = len(fields.weights)
    firsts = (fields.latent_map, fields.coord, fields.cell, fields.weight_geometry, fields.query_term)
    # Kept without its tensors: those must go through save_for_backward.
    none: Any = dict.fromkeys(("latent_map", "coord", "cell", "weight_geometry", "query_term"))
    ctx.fields = fields._replace(**none, weights=[], biases=[])
    ctx.save_for_backward(output[1], *firsts, *fields.weights, *fields.biases)
    ctx.set_materialize_grads(False)  # or PyTorch makes zeros as large as what is saved, in every backward


def _decode_backward(ctx: Any, grad_out: Tensor | None, _grad_saved: None) -> tuple[Any, ...]:
    saved, latent_map, coord, cell, weight_geometry, query_term, *layers = ctx.saved_tensors
    fields = ctx.fields._replace(
        latent_map=latent_map,
        coord=coord,
        cell=cell,
        weight_geometry=weight_geometry,
        query_term=query_term,
        weights=layers[: ctx.layers],
        biases=layers[ctx.layers :],
    )
    tensors = fields.differentiable(ctx.coord_grad)
    grads: list[Tensor | None]
    if grad_out is None:  # where a function above returned None
        grads = [None] * len(tensors)
    elif _is_differentiated(grad_out):
        grads = _grads_by_calls(lambda: [calls.decode(fields)], tensors, [grad_out])
    else:
        grads = _match(decode_backward(grad_out, saved, *fields, ctx.coord_grad, ctx.backend), tensors)
    first, geometry, *rest = grads
    grad_term = None if query_term is None else rest.pop()
    points = 2 * ctx.layers + 1
    grad_coord, grad_cell = [*rest[points:], None, None][:2]
    # PyTorch takes an empty list for a list of tensors, so an empty `grid` needs a list of gradients, not None.
    by_field: dict[str, Any] = {name: [] if value == [] else None for name, value in fields._asdict().items()}
    by_field.update(latent_map=first, coord=grad_coord, cell=grad_cell, weight_geometry=geometry, query_term=grad_term)
    by_field.update(weights=rest[: ctx.layers], biases=rest[ctx.layers : points])
    return *by_field.values(), None, None, None


register_autograd(decode, _decode_backward, setup_context=_decode_setup, lib=LIBRARY)

# ------------------------------------------------------------------------------------------------------- metasr_query


@register_op(f"metasr_query({_arguments(MetasrInputs)}, str backend) -> Tensor")
def metasr_query(*arguments: Any) -> Tensor:
    *fields, backend = arguments
    return implementation(backend).metasr_query(MetasrInputs(*fields))


@register_fake(metasr_query, lib=LIBRARY)
def _(*arguments: Any) -> Tensor:
    inputs = MetasrInputs(*arguments[:-1])
    return inputs.latent_map.new_empty(inputs.out_shape, dtype=geometry_dtype(inputs.latent_map))


@register_op(
    f"metasr_query_backward(Tensor grad_out, {_arguments(MetasrInputs)}, str backend) -> Tensor[]",
)
def metasr_query_backward(grad_out: Tensor, *arguments: Any) -> list[Tensor]:
    *fields, backend = arguments
    return implementation(backend).metasr_query_backward(grad_out, MetasrInputs(*fields))


@register_fake(metasr_query_backward, lib=LIBRARY)
def _(grad_out: Tensor, *arguments: Any) -> list[Tensor]:
    return _empty_grads(arguments[:5], geometry_dtype(arguments[0]))


def _metasr_setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    *tensors, ctx.region, ctx.backend = inputs
    ctx.save_for_backward(*tensors)


def _metasr_backward(ctx: Any, grad_out: Tensor) -> tuple[Any, ...]:
    tensors = ctx.saved_tensors
    if _is_differentiated(grad_out):
        inputs = MetasrInputs._make([*tensors, ctx.region])
        return *_grads_by_calls(lambda: [calls.metasr_query(inputs)], tensors, [grad_out]), None, None
    return *_match(metasr_query_backward(grad_out, *tensors, ctx.region, ctx.backend), tensors), None, None


register_autograd(metasr_query, _metasr_backward, setup_context=_metasr_setup, lib=LIBRARY)
