"""`ensemble`: the area-weighted blend of the corners' predictions."""

from __future__ import annotations

from torch import Tensor

from . import reference, registration
from .backends import OpRequest, calls, choose
from .dtypes import autocast_dtype, geometry_dtype


def ensemble(pred: Tensor, area_weight: Tensor, *, backend: str | None = None) -> Tensor:
    """Blend the corners' predictions; differentiable in both.

    Args:
        pred: a decoder's output for each corner, [B, Q, S, O].
        area_weight: `gather`'s weights, [B, Q, S].
        backend: a name of `backends.BACKENDS`; None lets the table choose.

    Returns:
        [B, Q, O] in pred's dtype (float32 under autocast), accumulated in float32 or better.

    Raises:
        ValueError, TypeError: a wrong shape, dtype or device. RuntimeError: the named backend cannot run this.

    Source: LIIF, equation 4.
    """
    if pred.dim() != 4:
        raise ValueError(f"pred must be [B, Q, S, O], got shape {tuple(pred.shape)}")
    if area_weight.shape != pred.shape[:3]:
        raise ValueError(f"area_weight must be {tuple(pred.shape[:3])}, got {tuple(area_weight.shape)}")
    if not pred.is_floating_point() or not area_weight.is_floating_point():
        raise TypeError(f"pred and area_weight must be floating point, got {pred.dtype} and {area_weight.dtype}")
    if area_weight.device != pred.device:
        raise ValueError(f"area_weight is on {area_weight.device} but pred is on {pred.device}: move it there")
    name = choose(OpRequest.on(pred, "ensemble", others=[area_weight]), backend)
    out = ensemble_on(name, pred, area_weight)
    return out if autocast_dtype(pred) is not None else out.to(pred.dtype)


def ensemble_on(backend: str, pred: Tensor, area_weight: Tensor) -> Tensor:
    """`ensemble` of validated tensors on a chosen backend, in the geometry dtype."""
    area_weight = area_weight.to(geometry_dtype(pred))
    if backend == "reference":
        return reference.ensemble(pred, area_weight)
    if backend == "torch":
        return calls.ensemble(pred, area_weight)
    return registration.ensemble(pred, area_weight, backend)
