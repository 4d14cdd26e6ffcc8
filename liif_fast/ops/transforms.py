"""Whether PyTorch transforms or traces tensors in a way that registered ops have no rules for."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad


def is_transformed(*tensors: Tensor | None) -> bool:
    """Whether forward-mode AD, torch.func or torch.jit.trace acts on one of the tensors.

    Registered ops have rules for reverse mode only; PyTorch would take their tangents for zeros. Inside torch.compile
    the tensors cannot be asked, and any level of forward mode counts.
    """
    if torch.jit.is_tracing():
        return True
    if torch.compiler.is_compiling():
        return forward_ad._current_level >= 0
    return any(map(_is_wrapped, tensors))


def _is_wrapped(tensor: Tensor | None) -> bool:
    if tensor is None:
        return False
    if torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        return True
    return forward_ad._current_level >= 0 and forward_ad.unpack_dual(tensor).tangent is not None
