"""The part of `extension.OPS` that the `cuda` backend calls, on CPU tensors and through the kernels on the CPU.

With it in the place of `liif_fast.ops.backends.cuda.gather._C`, everything above the bindings runs as it does on a GPU.
"""

from __future__ import annotations

from types import ModuleType

import numpy as np
import torch
from torch import Tensor


def _array(tensor: Tensor) -> np.ndarray:
    """The tensor's memory, with its strides; bfloat16, which numpy lacks, as uint16."""
    tensor = tensor.detach()
    return (tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor).numpy()


def _tensor(array: np.ndarray, dtype: torch.dtype) -> Tensor:
    tensor = torch.from_numpy(array)
    return tensor.view(torch.bfloat16) if dtype == torch.bfloat16 else tensor


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _arrays(value: object) -> object:
    """Every tensor in an argument as its array."""
    if isinstance(value, Tensor):
        return _array(value)
    return (
        [_array(tensor) for tensor in value]
        if isinstance(value, list) and value and isinstance(value[0], Tensor)
        else value
    )


def _operands(policy: int) -> torch.dtype:
    return {0: torch.float16, 1: torch.bfloat16, 4: torch.float16, 5: torch.bfloat16}.get(policy, torch.float32)


class Ops:
    """gather, cuda_gather_backward, ensemble, ensemble_backward: signatures as in the bindings."""

    def __init__(self, kernels: ModuleType) -> None:
        self.kernels = kernels
        self.packs = 0  # calls of cuda_decode_pack

    def gather(
        self, feat: Tensor, coord: Tensor, cell: Tensor | None, feat_unfold: bool, local_ensemble: bool
    ) -> tuple[Tensor, Tensor]:
        cells = None if cell is None else _array(cell)
        x, area_weight = self.kernels.gather_forward(
            _name(feat.dtype), _array(feat), _array(coord), cells, feat_unfold, local_ensemble
        )
        return _tensor(x, feat.dtype), torch.from_numpy(area_weight)

    def cuda_gather_backward(
        self, grad_x: Tensor, grad_area_weight: Tensor, coord: Tensor, *sizes_and_flags: int
    ) -> tuple[Tensor, ...]:
        assert grad_x.is_contiguous()
        grads = self.kernels.gather_backward(
            _name(grad_x.dtype), _array(grad_x), _array(grad_area_weight), _array(coord), *sizes_and_flags
        )
        return tuple(torch.from_numpy(grad) for grad in grads)

    def ensemble(self, pred: Tensor, area_weight: Tensor) -> Tensor:
        assert pred.is_contiguous()
        return torch.from_numpy(self.kernels.ensemble_forward(_name(pred.dtype), _array(pred), _array(area_weight)))

    def ensemble_backward(self, grad_out: Tensor, pred: Tensor, area_weight: Tensor) -> tuple[Tensor, ...]:
        assert pred.is_contiguous()
        grads = self.kernels.ensemble_backward(_name(pred.dtype), _array(grad_out), _array(pred), _array(area_weight))
        return tuple(torch.from_numpy(grad) for grad in grads)

    def cuda_decode_pack(self, *arguments: object) -> Tensor:
        self.packs += 1
        return torch.from_numpy(self.kernels.decode_pack(*map(_arrays, arguments)))

    def cuda_decode(self, *arguments: object) -> Tensor:
        *arguments, with_out = arguments
        out = torch.from_numpy(self.kernels.decode_forward(*map(_arrays, arguments)))
        if out.dtype == torch.uint16:
            out = out.view(_operands(arguments[10]))
        return out if with_out else torch.empty(0)

    def cuda_decode_backward(self, *arguments: object) -> tuple[Tensor, ...]:
        grad_rows, *others = self.kernels.decode_backward(*map(_arrays, arguments))
        return torch.from_numpy(grad_rows).view(_operands(arguments[14])), *map(torch.from_numpy, others)

    def cuda_convolution(self, map: Tensor, kernels: Tensor, transposed: bool, in_bfloat16: bool) -> Tensor:
        return torch.from_numpy(self.kernels.convolution(_array(map), _array(kernels), transposed, in_bfloat16))

    def cuda_kernel_grads(self, latents: Tensor, grads: Tensor, *sizes: int) -> Tensor:
        return torch.from_numpy(self.kernels.kernel_grads(_array(latents), _array(grads), *sizes))

    def metasr_query(self, latent_map: Tensor, *tensors_and_region: object) -> Tensor:
        assert latent_map.is_contiguous()
        arguments = map(_arrays, (latent_map, *tensors_and_region))
        return torch.from_numpy(self.kernels.metasr_forward(_name(latent_map.dtype), *arguments))

    def cuda_metasr_latents(self, coord: Tensor, cell: Tensor, region: list[int], sizes: list[int]) -> Tensor:
        return torch.from_numpy(self.kernels.metasr_latents(_array(coord), _array(cell), region, sizes))

    def cuda_metasr_query_backward(self, grad_out: Tensor, latent_map: Tensor, *others: object) -> list[Tensor]:
        *arguments, order, starts = map(_arrays, (grad_out, latent_map, *others))
        ordered = None if order is None else (order, starts)
        grads = self.kernels.metasr_backward(_name(latent_map.dtype), *arguments, ordered)
        return [torch.from_numpy(grad) for grad in grads]
