"""gather, ensemble and MetaSR's decode on the `cuda` backend, one function for each op of registration.py.

`backends.can_run_cuda` refuses the requests that the kernels cannot run. Features, predictions and MetaSR's latent maps
stay in their own dtype; geometry and sums are float64 or float32.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...dtypes import geometry_dtype
from ...inputs import GatherInputs, MetasrInputs
from ..extension import OPS as _C


def gather(inputs: GatherInputs) -> tuple[Tensor, Tensor]:
    inputs = inputs.for_kernels()
    feat = inputs.feat
    if inputs.feat_unfold and inputs.local_ensemble and 4 * inputs.coord.shape[1] >= feat.shape[2] * feat.shape[3]:
        # The fast kernel reads channels-last maps. x has at least nine times as many values as the map, so a copy pays.
        inputs = inputs._replace(feat=feat.contiguous(memory_format=torch.channels_last))
    return _C.gather(*inputs)  # any strides of feat


def gather_backward(grad_x: Tensor, grad_area_weight: Tensor, inputs: GatherInputs) -> tuple[Tensor, Tensor, Tensor]:
    feat, (feat_unfold, local_ensemble) = inputs.feat, inputs[3:]
    deterministic = torch.are_deterministic_algorithms_enabled()
    # The fast kernel adds four channels at a time to a channels-last gradient.
    channels_last = feat_unfold and local_ensemble and feat.shape[1] % 4 == 0 and not deterministic
    grad_feat, grad_coord, grad_cell = _C.cuda_gather_backward(
        grad_x.to(feat.dtype).contiguous(),
        grad_area_weight.contiguous(),
        inputs.coord.contiguous(),
        *feat.shape[1:],
        inputs.cell is not None,
        feat_unfold,
        local_ensemble,
        deterministic,
        channels_last,
    )
    if channels_last:
        grad_feat = grad_feat.permute(0, 3, 1, 2).contiguous()
    return grad_feat, grad_coord, grad_cell


def ensemble(pred: Tensor, area_weight: Tensor) -> Tensor:
    return _C.ensemble(pred.contiguous(), area_weight.contiguous())


def ensemble_backward(grad_out: Tensor, pred: Tensor, area_weight: Tensor) -> tuple[Tensor, Tensor]:
    grad_pred, grad_area_weight = _C.ensemble_backward(
        grad_out.to(geometry_dtype(pred)).contiguous(), pred.contiguous(), area_weight.contiguous()
    )
    return grad_pred, grad_area_weight


def metasr_query(inputs: MetasrInputs) -> Tensor:
    return _C.metasr_query(*inputs.for_kernels(inputs.latent_map))


def metasr_query_backward(grad_out: Tensor, inputs: MetasrInputs) -> list[Tensor]:
    inputs = inputs.for_kernels(inputs.latent_map)
    latent_map, coord, cell = inputs[:3]
    order = starts = None
    if torch.are_deterministic_algorithms_enabled():  # queries sorted by latent, stably
        sizes = latent_map.shape[:3]
        latents, order = torch.sort(_C.cuda_metasr_latents(coord, cell, inputs.region, list(sizes)), stable=True)
        starts = torch.searchsorted(latents, torch.arange(sizes.numel() + 1, device=coord.device))
    grad_out = grad_out.to(geometry_dtype(latent_map)).contiguous()
    return _C.cuda_metasr_query_backward(grad_out, *inputs, order, starts)
