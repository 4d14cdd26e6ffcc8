"""A decode in PyTorch that rounds where the fused kernels round, so that the same ReLUs pass gradients.

Compared with float64, one ReLU whose sign flips weighs more than all other errors. Here none flips, so small limits
detect a mistake.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from liif_fast import ops

Rounding = Callable[[Tensor], Tensor]  # to an operand's values, in float32


def to_tf32(values: Tensor) -> Tensor:
    """Keeps ten bits after the leading one, ties away from zero, as PTX's cvt.rna does; computed in float64."""
    mantissa, exponent = torch.frexp(values.double())
    scaled = mantissa * 2048
    return torch.ldexp(torch.copysign((scaled.abs() + 0.5).floor(), scaled) / 2048, exponent).float()


class _RoundGrad(torch.autograd.Function):
    """The gradient of a hidden layer is an operand too."""

    @staticmethod
    def forward(ctx, values: Tensor, rounding: Rounding) -> Tensor:
        ctx.rounding = rounding
        return values.clone()

    @staticmethod
    def backward(ctx, grad: Tensor):
        return ctx.rounding(grad), None


def rounded_query(
    feat: Tensor,
    coord: Tensor,
    cell: Tensor | None,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    rounding: Rounding,
    *,
    edges: bool,
    hidden_biases: bool = False,
    folds: bool = False,
    local_ensemble: bool = True,
    feat_unfold: bool = True,
    cell_decode: bool = True,
) -> Tensor:
    """As `ops.query`, in float32 between the roundings.

    Args:
        edges: whether the first layer's gradient and the last layer's input are rounded too.
        folds: whether the first layer is a 3x3 convolution that rounds its operands and the gradient of its result.
        hidden_biases: whether the biases of hidden layers are rounded too, as PyTorch's own layers do.
    """

    def rounded(tensor: Tensor) -> Tensor:
        return tensor + (rounding(tensor.detach()) - tensor.detach())  # gradients pass

    def round_grad(tensor: Tensor) -> Tensor:
        return _RoundGrad.apply(tensor, rounding)

    weights, biases = [w.float() for w in weights], [b.float() for b in biases]
    feat, first = feat.float(), weights[0]
    if folds:
        channels = feat.shape[1]
        kernels = first[:, : 9 * channels].unflatten(1, (channels, 3, 3))
        feat, feat_unfold = round_grad(F.conv2d(rounded(feat), rounded(kernels), padding=1)), False
        first = torch.cat([torch.eye(len(first)).to(first), first[:, 9 * channels :]], 1)
    x, area_weight = ops.reference.gather(
        feat, coord, cell if cell_decode else None, feat_unfold=feat_unfold, local_ensemble=local_ensemble
    )
    hidden = x @ first.t() + biases[0]
    if len(weights) == 1:
        return (hidden * area_weight.unsqueeze(-1)).sum(2)
    hidden = torch.relu(round_grad(hidden) if edges else hidden)
    for weight, bias in zip(weights[1:-1], biases[1:-1], strict=True):
        hidden = torch.relu(
            round_grad(rounded(hidden) @ rounded(weight).t() + (rounded(bias) if hidden_biases else bias))
        )
    hidden = rounded(hidden) if edges else hidden
    return (hidden * area_weight.unsqueeze(-1)).sum(2) @ weights[-1].t() + biases[-1]
