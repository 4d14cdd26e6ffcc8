"""gather, ensemble and MetaSR's decode on the `cuda` backend, one function for each op of registration.py.

`backends.can_run_cuda` refuses the requests that the kernels cannot run. Features, predictions and MetaSR's latent maps
stay in their own dtype; geometry and sums are float64 or float32.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...dtypes import geometry_dtype

_C = torch.ops.liif_fast_C


def gather(
    feat: Tensor, coord: Tensor, cell: Tensor | None, feat_unfold: bool, local_ensemble: bool
) -> tuple[Tensor, Tensor]:
    cell = None if cell is None else cell.contiguous()
    if feat_unfold and local_ensemble and 4 * coord.shape[1] >= feat.shape[2] * feat.shape[3]:
        # The fast kernel reads channels-last maps. x has at least nine times as many values as the map, so a copy pays.
        feat = feat.contiguous(memory_format=torch.channels_last)
    x, area_weight = _C.gather(feat, coord.contiguous(), cell, feat_unfold, local_ensemble)  # any strides of feat
    return x, area_weight


def gather_backward(
    grad_x: Tensor,
    grad_area_weight: Tensor,
    feat: Tensor,
    coord: Tensor,
    cell: Tensor | None,
    feat_unfold: bool,
    local_ensemble: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    channels, height, width = feat.shape[1:]
    deterministic = torch.are_deterministic_algorithms_enabled()
    # The fast kernel adds four channels at a time to a channels-last gradient.
    channels_last = feat_unfold and local_ensemble and channels % 4 == 0 and not deterministic
    grad_feat, grad_coord, grad_cell = _C.cuda_gather_backward(
        grad_x.to(feat.dtype).contiguous(),
        grad_area_weight.contiguous(),
        coord.contiguous(),
        channels,
        height,
        width,
        cell is not None,
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


def metasr_query(
    latent_map: Tensor, coord: Tensor, cell: Tensor, weight: Tensor, bias: Tensor, region: list[int]
) -> Tensor:
    dtype = geometry_dtype(latent_map)
    return _C.metasr_query(
        latent_map.contiguous(),
        coord.contiguous(),
        cell.contiguous(),
        weight.to(dtype).contiguous(),
        bias.to(dtype).contiguous(),
        region,
    )


def metasr_query_backward(
    grad_out: Tensor, latent_map: Tensor, coord: Tensor, cell: Tensor, weight: Tensor, bias: Tensor, region: list[int]
) -> list[Tensor]:
    dtype = geometry_dtype(latent_map)
    coord, cell = coord.contiguous(), cell.contiguous()
    order = starts = None
    if torch.are_deterministic_algorithms_enabled():  # queries sorted by latent, stably
        sizes = list(latent_map.shape[:3])
        latents, order = torch.sort(_C.cuda_metasr_latents(coord, cell, region, sizes), stable=True)
        every = torch.arange(latent_map.shape[:3].numel() + 1, device=coord.device)
        starts = torch.searchsorted(latents, every)
    return _C.cuda_metasr_query_backward(
        grad_out.to(dtype).contiguous(),
        latent_map.contiguous(),
        coord,
        cell,
        weight.to(dtype).contiguous(),
        bias.to(dtype).contiguous(),
        region,
        order,
        starts,
    )
