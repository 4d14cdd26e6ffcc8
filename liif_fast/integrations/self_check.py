"""Compares a class's own query_rgb with the ops, on a small map and with random layers."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from liif_fast import ops
from liif_fast.ops.dtypes import allows_tf32
from liif_fast.ops.query import latent_map_for

SWITCHES = ("local_ensemble", "feat_unfold", "cell_decode")
_MAP, _BATCH, _QUERIES = (5, 7), 2, 33


class Setup(NamedTuple):
    """What a class's query_rgb and the ops are compared for: classes of model and imnet, switches, shape."""

    model: Any
    imnet: Any
    switches: tuple[bool, ...]  # in the order of SWITCHES
    widths: tuple[int, ...]  # of the imnet: (in_dim, *hidden, out_dim)
    training: tuple[bool, bool]  # whether model and imnet are in training mode
    device: torch.device

    @property
    def flags(self) -> dict[str, Any]:
        return dict(zip(SWITCHES, self.switches))

    @property
    def channels(self) -> int:
        """Channels of the features that fit the imnet."""
        _, feat_unfold, cell_decode = self.switches
        return (self.widths[0] - (4 if cell_decode else 2)) // (9 if feat_unfold else 1)


class _WithoutCuda(TorchFunctionMode):
    """Moves tensors to the features' device where the public code moves them to a GPU with `.cuda()`."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device = device

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.cuda:
            return args[0].to(self.device)
        return func(*args, **(kwargs or {}))


def difference(setup: Setup, query_rgb: Callable[..., Tensor], takes_feat: bool) -> str:
    """How outputs or gradients of query_rgb differ from those of the ops, in words; '' if they agree.

    query_rgb: the function in the class. takes_feat: whether its first argument is the features.
    """
    try:
        with (
            torch.inference_mode(False),
            torch.enable_grad(),
            torch.autocast(setup.device.type, enabled=False),
            _WithoutCuda(setup.device),
        ):
            error = _largest_error(setup, query_rgb, takes_feat)
    except Exception as failure:  # the class's code may raise anything on a model that it does not know
        return f"the comparison with liif_fast failed, {type(failure).__name__}: {str(failure).strip()[:200]}"
    tolerance = 5e-2 if setup.device.type != "cpu" and allows_tf32() else 1e-3
    return "" if error <= tolerance else f"liif_fast computes something else, with a relative error of {error:.1g}"


def _largest_error(setup: Setup, query_rgb: Callable[..., Tensor], takes_feat: bool) -> float:
    """Largest relative error (2-norm) of the outputs, with and without gradients, and of every gradient."""
    generator = torch.Generator().manual_seed(0)

    def uniform(*shape: int, low: float = -1.0, high: float = 1.0) -> Tensor:
        values = low + (high - low) * torch.rand(*shape, generator=generator, device="cpu", dtype=torch.float32)
        return values.to(setup.device)

    feat = uniform(_BATCH, setup.channels, *_MAP).requires_grad_()
    coord = uniform(_BATCH, _QUERIES, 2, low=-1.05, high=1.05)
    cell = uniform(_BATCH, _QUERIES, 2, low=0.01, high=0.5)
    probe = uniform(_BATCH, _QUERIES, setup.widths[-1])
    pairs = list(itertools.pairwise(setup.widths))
    weights = [(uniform(out, in_) * (6 / in_) ** 0.5).requires_grad_() for in_, out in pairs]
    biases = [(uniform(out) * 0.1).requires_grad_() for _, out in pairs]
    leaves = [feat, *weights, *biases]

    model = _stand_in(setup, weights, biases)
    if not takes_feat:
        model.feat = feat
    theirs = query_rgb(model, *([feat] if takes_feat else []), coord, cell)
    ours = ops.query(feat, coord, cell, weights, biases, **setup.flags)
    with torch.no_grad():
        latent_map = latent_map_for(feat, weights, feat_unfold=setup.flags["feat_unfold"])
        chunk = ops.query(feat, coord, cell, weights, biases, latent_map=latent_map, **setup.flags)
    gradients = [torch.autograd.grad((out * probe).sum(), leaves) for out in (theirs, ours)]
    pairs_of_tensors = [(ours, theirs), (chunk, theirs), *zip(gradients[1], gradients[0])]
    errors = [_relative_error(ours, theirs) for ours, theirs in pairs_of_tensors]
    return max(errors, key=lambda error: (math.isnan(error), error))


def _stand_in(setup: Setup, weights: Sequence[Tensor], biases: Sequence[Tensor]) -> Any:
    """A model of the class with nothing but an imnet of the given layers and the switches."""
    layers: list[nn.Module] = []
    for weight, bias in zip(weights, biases):
        linear: Any = nn.Linear(weight.shape[1], weight.shape[0], device="meta")
        del linear.weight, linear.bias
        linear.weight, linear.bias = weight, bias  # plain tensors, whose gradients are asked for
        layers += [linear, nn.ReLU()]
    chain = nn.Sequential(*layers[:-1])
    imnet: Any = chain
    if setup.imnet is not nn.Sequential:
        imnet = setup.imnet.__new__(setup.imnet)
        nn.Module.__init__(imnet)
        imnet.layers = chain
    model: Any = setup.model.__new__(setup.model)
    nn.Module.__init__(model)
    for name, value in setup.flags.items():
        setattr(model, name, value)
    model.imnet = imnet
    model.train(setup.training[0])
    imnet.train(setup.training[1])
    return model


def _relative_error(actual: Tensor, expected: Tensor) -> float:
    if actual.shape != expected.shape:
        raise ValueError(f"query_rgb returns {tuple(expected.shape)} where liif_fast returns {tuple(actual.shape)}")
    return ((actual - expected).norm() / expected.norm().clamp(min=1e-30)).item()
