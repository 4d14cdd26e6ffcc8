"""The latent map that a model reuses between decodes: made once, never stale, freed with its features."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from liif_fast.models import LIIF
from tests.helpers import needs_cpu
from tests.models.small_models import image, liif, metasr, queries

pytestmark = needs_cpu  # the reference does not fold


class CountFolds(TorchDispatchMode):
    """Counts convolutions. Outside of the encoder, only folding computes one."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func.name().startswith("aten::conv")
        return func(*args, **(kwargs or {}))


def check_fresh(model: Any) -> Tensor:
    """Decode with the map that the model reuses, and compare with a decode that cannot reuse one."""
    coord, cell = (each.to(model.feat.dtype) for each in queries())
    with torch.no_grad():
        out = model.query_rgb(coord, cell)
        model.feat = model.feat
        assert torch.equal(model.query_rgb(coord, cell), out), "decoded with a stale latent map"
    return out


@pytest.mark.parametrize("make", [liif, metasr])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize(("name", "folds"), [("cpu", 1), ("reference", 0)])
def test_chunks_of_queries_fold_once(make: Any, mode: Any, name: str, folds: int) -> None:
    model, (coord, cell) = make(), queries()
    model.backend = name
    expected = model(image(), coord, cell).detach()
    with mode():
        model.gen_feat(image())
        with CountFolds() as counted:
            parts = [model.query_rgb(coord[:, at : at + 10], cell[:, at : at + 10]) for at in (0, 10, 20)]
            model.render((9, 9))
    torch.testing.assert_close(torch.cat(parts, 1), expected)
    assert counted.count == folds


def step(optimizer: Any, **options: Any) -> Callable[[LIIF], None]:
    def change(model: LIIF) -> None:
        for parameter in model.imnet.parameters():
            parameter.grad = torch.ones_like(parameter)
        optimizer(model.imnet.parameters(), 0.1, **options).step()

    return change


def load(**options: bool) -> Callable[[LIIF], object]:
    return lambda model: model.load_state_dict({key: 2 * each for key, each in model.state_dict().items()}, **options)


OTHER_WEIGHT = torch.randn(12, 40, dtype=torch.float64)
CHANGES: dict[str, Callable[[Any], object]] = {
    "adam": step(torch.optim.Adam),
    "fused adam": step(torch.optim.Adam, fused=True),
    "another parameter": lambda model: setattr(model.imnet.layers[0], "weight", nn.Parameter(OTHER_WEIGHT)),
    ".data replaced": lambda model: setattr(model.imnet.layers[0].weight, "data", OTHER_WEIGHT),
    ".data in place": lambda model: model.imnet.layers[0].weight.data.mul_(2),
    "load_state_dict": load(),
    "load_state_dict, assigned": load(assign=True),
    "rounded": lambda model: model.imnet.half().double(),
    "features in place": lambda model: model.feat.mul_(2),
    "features by hand": lambda model: setattr(model, "feat", model.feat * 2),
    "transposed features": lambda model: setattr(model, "feat", model.feat.transpose(2, 3)),
    "new features": lambda model: model.gen_feat(image() / 2),
}


@pytest.mark.parametrize("name", CHANGES)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_change_is_noticed(name: str, mode: Any) -> None:
    model = liif()
    with mode():
        model.gen_feat(image())
    before = check_fresh(model)
    with torch.no_grad():
        CHANGES[name](model)
    assert not torch.equal(check_fresh(model), before)


@pytest.mark.parametrize("part", ["weight", "bias"])
def test_metasr_notices_a_change_of_its_second_layer(part: str) -> None:
    model = metasr()
    with torch.no_grad():
        model.gen_feat(image())
        before = check_fresh(model)
        getattr(model.imnet.layers[2], part).mul_(3)
    assert not torch.equal(check_fresh(model), before)


def test_every_autocast_has_its_own_map() -> None:
    model = liif().float()
    with torch.no_grad():
        model.gen_feat(image().float())
    outs = []
    for enabled in (False, True, False):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            outs.append(check_fresh(model))
    assert torch.equal(outs[0], outs[2]) and not torch.equal(outs[0], outs[1])


def test_the_map_is_freed_with_its_features() -> None:
    model, (coord, cell) = liif(), queries()

    def make_map() -> weakref.ref[Tensor]:
        with torch.no_grad():
            model(image(), coord, cell)
        assert model._folded is not None
        return weakref.ref(model._folded.latent_map)

    for change in (
        lambda: setattr(model, "feat", None),
        lambda: model.to(torch.float32).to(torch.float64),
        lambda: model(image(), coord, cell),  # with gradients
    ):
        latent_map = make_map()
        change()
        assert latent_map() is None
    latent_map = make_map()
    alive = []
    model.encoder.register_forward_pre_hook(lambda *_: alive.append((latent_map() is not None, model.feat is not None)))
    make_map()
    assert alive == [(False, False)]  # old features and map are freed before the encoder runs
