"""The latent map a model keeps between queries: made once, never stale, never alive for longer than its features."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from liif_fast import models, ops
from liif_fast.models import LIIF
from liif_fast.ops import backends
from tests.models.small_models import image, liif, metasr, queries


class Spy:
    """Counts folds, and holds every latent map that reaches an op against a fresh one."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folds = 0
        self.handed: list[bool] = []
        fold, metasr_fold, query, render, metasr_query = (
            ops.fold,
            ops.metasr_fold,
            ops.query,
            ops.render,
            ops.metasr_query,
        )

        def spy_fold(feat: Tensor, weight: Tensor, **flags: bool) -> Tensor:
            self.folds += 1
            return fold(feat, weight, **flags)

        def spy_metasr_fold(*args: Any) -> Tensor:
            self.folds += 1
            return metasr_fold(*args)

        def check(latent_map: Tensor | None, fresh: Tensor) -> None:
            self.handed.append(latent_map is not None)
            assert latent_map is None or torch.equal(latent_map, fresh), "a stale latent map"

        def spy_query(feat: Tensor, coord: Tensor, cell: Tensor, weights: Any, biases: Any, **args: Any) -> Tensor:
            check(args["latent_map"], fold(feat, weights[0], feat_unfold=args["feat_unfold"]))
            return query(feat, coord, cell, weights, biases, **args)

        def spy_render(feat: Tensor, size: Any, weights: Any, biases: Any, **args: Any) -> Tensor:
            check(args["latent_map"], fold(feat, weights[0], feat_unfold=args["feat_unfold"]))
            return render(feat, size, weights, biases, **args)

        def spy_metasr_query(
            feat: Tensor, coord: Tensor, cell: Tensor, weights: Any, biases: Any, **args: Any
        ) -> Tensor:
            check(args["latent_map"], metasr_fold(feat, weights, biases))
            return metasr_query(feat, coord, cell, weights, biases, **args)

        monkeypatch.setattr(ops, "fold", spy_fold)
        monkeypatch.setattr(ops, "metasr_fold", spy_metasr_fold)
        monkeypatch.setattr(ops, "query", spy_query)
        monkeypatch.setattr(ops, "render", spy_render)
        monkeypatch.setattr(ops, "metasr_query", spy_metasr_query)
        # The reference does not fold; the cache is there for every other backend, installed or not.
        monkeypatch.setattr(models, "choose_fused", lambda _problem, _backend: ("any that folds", True))


@pytest.fixture
def spy(monkeypatch: pytest.MonkeyPatch) -> Spy:
    return Spy(monkeypatch)


@pytest.mark.parametrize("make", [liif, metasr])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_chunks_of_queries_fold_once(make: Any, mode: Any, spy: Spy) -> None:
    model, (coord, cell) = make(), queries()
    expected = model(image(), coord, cell).detach()
    assert spy.folds == 0 and spy.handed == [False]
    with mode():
        model.gen_feat(image())
        parts = [model.query_rgb(coord[:, at : at + 10], cell[:, at : at + 10]) for at in (0, 10, 20)]
        torch.testing.assert_close(torch.cat(parts, 1), expected)
        model.render((9, 9))
    assert spy.folds == 1 and all(spy.handed[1:])


def test_the_reference_keeps_no_map(monkeypatch: pytest.MonkeyPatch) -> None:
    spy = Spy(monkeypatch)
    monkeypatch.setattr(models, "choose_fused", backends.choose_fused)
    model = liif()
    model.backend = "reference"
    with torch.no_grad():
        model(image(), *queries())
    assert spy.folds == 0


def _step(optimizer: Any) -> Any:
    def change(model: LIIF) -> None:
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        optimizer(model.imnet.parameters()).step()

    return change


def _swap_weight(model: LIIF) -> None:
    model.imnet.layers[0].weight = nn.Parameter(torch.randn_like(model.imnet.layers[0].weight))


def _load(model: LIIF) -> None:
    model.load_state_dict({key: tensor * 2 for key, tensor in model.state_dict().items()})


def _assign(model: LIIF) -> None:
    model.load_state_dict({key: tensor * 2 for key, tensor in model.state_dict().items()}, assign=True)


def _through_data(model: LIIF) -> None:
    model.imnet.layers[0].weight.data.mul_(2)


def _replace_data(model: LIIF) -> None:
    model.imnet.layers[0].weight.data = torch.randn_like(model.imnet.layers[0].weight)


def _round(model: LIIF) -> None:
    model.half().double()


CHANGES = {
    "adam": _step(lambda p: torch.optim.Adam(p, 0.1)),
    "fused adam": _step(lambda p: torch.optim.Adam(p, 0.1, fused=True)),
    "sgd": _step(lambda p: torch.optim.SGD(p, 0.1)),
    "another parameter": _swap_weight,
    "load_state_dict": _load,
    "load_state_dict, assigned": _assign,
    ".data in place": _through_data,
    ".data replaced": _replace_data,
    "to": _round,
}


def test_a_view_of_the_features_folds_again(spy: Spy) -> None:
    model, (coord, cell) = liif(), queries()
    with torch.no_grad():
        feat = model.gen_feat(image())
        model.query_rgb(coord, cell)
        model.feat = feat.transpose(2, 3)  # the same memory, the same count of changes
        model.query_rgb(coord, cell)
    assert spy.folds == 2


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_of_the_weights_folds_again(name: str, spy: Spy) -> None:
    model, (coord, cell) = liif(), queries()
    with torch.no_grad():
        model.gen_feat(image())
        before = model.query_rgb(coord, cell)
    CHANGES[name](model)
    with torch.no_grad():
        assert not torch.equal(model.query_rgb(coord, cell), before)  # Spy checks that the map is fresh
        model.query_rgb(coord, cell)
    assert spy.folds == 2


@pytest.mark.parametrize("part", ["weight", "bias"])
def test_metasr_folds_its_second_layer_again(part: str, spy: Spy) -> None:
    model, (coord, cell) = metasr(), queries()
    with torch.no_grad():
        model(image(), coord, cell)
        getattr(model.imnet.layers[2], part).mul_(3)
        model.query_rgb(coord, cell)
        model.imnet.layers[0].bias.mul_(3)  # not in the map
        model.query_rgb(coord, cell)
    assert spy.folds == 2


def test_a_change_of_the_features_folds_again(spy: Spy) -> None:
    model, (coord, cell) = liif(), queries()
    with torch.no_grad():
        feat = model.gen_feat(image())
        model.query_rgb(coord, cell)
        feat.mul_(2)
        model.query_rgb(coord, cell)
        model.feat = feat.clone()
        model.query_rgb(coord, cell)
        model.gen_feat(image())
        model.query_rgb(coord, cell)
    assert spy.folds == 4
    with torch.inference_mode():
        model.gen_feat(image()).mul_(2)
        model.query_rgb(coord, cell)
        model.feat.mul_(2)
        model.query_rgb(coord, cell)
        model.feat = model.feat.clone()  # an inference tensor: its changes cannot be seen, so nothing is kept
        model.query_rgb(coord, cell)
    assert spy.folds == 6 and spy.handed == [True] * 6 + [False]


def test_autocast_folds_again(spy: Spy) -> None:
    model, (coord, cell) = liif().float(), queries()
    with torch.no_grad():
        model.gen_feat(image().float())
        for enabled in (False, True, True, False):
            with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
                model.query_rgb(coord.float(), cell.float())
    assert spy.folds == 3 and all(spy.handed)


def kept_map(model: Any) -> weakref.ref[Tensor] | None:
    entry = model._latent_cache._entry
    return None if entry is None else weakref.ref(entry.latent_map)


def test_the_map_dies_with_its_features(spy: Spy) -> None:
    model, (coord, cell) = liif(), queries()

    def query() -> Any:
        with torch.no_grad():
            model(image(), coord, cell)
        latent_map = kept_map(model)
        assert latent_map is not None and latent_map() is not None
        return latent_map

    first = query()
    model.feat = None
    assert first() is None

    second = query()
    model.to(torch.float32).to(torch.float64)
    assert second() is None

    third = query()
    model.query_rgb(coord, cell)  # with gradients
    assert third() is None

    fourth = query()
    alive = []
    model.encoder.register_forward_pre_hook(lambda *_: alive.append((fourth() is not None, model.feat is not None)))
    query()
    assert alive == [(False, False)]  # nothing old is held while the next features are made


def test_the_map_dies_with_its_model(spy: Spy) -> None:
    def make_and_forget() -> weakref.ref[Tensor] | None:
        model = liif()
        with torch.no_grad():
            model(image(), *queries())
        return kept_map(model)

    latent_map = make_and_forget()
    gc.collect()
    assert latent_map is not None and latent_map() is None


@pytest.mark.parametrize("make", [liif, metasr])
def test_copies_and_pickles(make: Any, spy: Spy) -> None:
    model, (coord, cell) = make(), queries()
    keys = list(model.state_dict())
    expected = model(image(), coord, cell)  # features that carry gradients
    with torch.no_grad():
        model.query_rgb(coord, cell)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(buffer, weights_only=False)]
    for twin in copies:
        assert twin.feat is None and kept_map(twin) is None
        assert list(twin.state_dict()) == keys
        assert twin.spec == model.spec and twin.data_norm == model.data_norm
        torch.testing.assert_close(twin(image(), coord, cell), expected)
        with torch.no_grad():
            twin(image(), coord, cell)
            twin.imnet.layers[0].weight.mul_(2)
            twin.query_rgb(coord, cell)
    assert model.feat is not None and kept_map(model) is not None
    assert list(model.state_dict()) == keys
