"""Models of the classes to patch, and what they compute."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tests.integrations import original_classes as classes
from tests.integrations.original_classes import EDSRGenerator, Upscaler
from tests.models.small_models import image, queries

BOTH = [Upscaler, EDSRGenerator]
COORD, CELL = (tensor.float() for tensor in queries())
INP = image().float()


def make(cls: type, *switches: bool) -> Any:
    torch.manual_seed(0)
    return cls(*switches)


def decoded(model: Any, chunk: int = 10) -> Tensor:
    """The public code's loop over chunks."""
    with torch.no_grad():
        if hasattr(model, "gen_feature"):
            return model(INP, COORD, CELL, test_mode=True)
        model.gen_feat(INP)
        parts = [model.query_rgb(COORD[:, at : at + chunk], CELL[:, at : at + chunk]) for at in range(0, 29, chunk)]
        return torch.cat(parts, 1)


def results(model: Any) -> list[Tensor]:
    """Outputs with and without gradients, and all gradients."""
    model.zero_grad()
    out = model(INP, COORD, CELL)
    out.square().sum().backward()
    return [decoded(model), out.detach(), *(parameter.grad for parameter in model.parameters())]


def checked(model: Any, expected: list[Tensor]) -> None:
    """The patched model computes the expected results, without its own code."""
    results(model)  # the first call compares
    classes.calls.clear()
    torch.testing.assert_close(results(model), expected)
    assert classes.calls == []


def compiled(model: nn.Module) -> Any:
    torch.compiler.reset()
    return torch.compile(model, fullgraph=True, backend="aot_eager")
