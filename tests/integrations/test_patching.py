"""`liif_fast.patch`: which classes it replaces, and what their models compute afterwards."""

from __future__ import annotations

import copy
import pickle
import threading
import types
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import liif_fast
from liif_fast.integrations import patching
from tests.helpers import FLAGS, needs_cpu
from tests.integrations import original_classes as classes
from tests.integrations.original_classes import Clamped, EDSRGenerator, Generator, Upscaler
from tests.integrations.patched_models import BOTH, CELL, COORD, INP, checked, compiled, decoded, make, results
from tests.models.small_models import liif

# ---------------------------------------------------------------------------------------------------- what is patched


def test_classes_are_found_by_their_shape() -> None:
    own = {cls: cls.__dict__["query_rgb"] for cls in (Upscaler, Clamped, Generator, classes.LIIF, classes.Field)}
    found = liif_fast.patch()
    assert {Upscaler, Generator} <= set(found)
    assert not {Clamped, classes.LIIF, classes.Field, liif_fast.LIIF, liif_fast.MetaSR} & set(found)
    assert Clamped.query_rgb is own[Clamped] and classes.LIIF.query_rgb is own[classes.LIIF]
    assert "query_rgb" not in EDSRGenerator.__dict__
    replaced = Upscaler.query_rgb
    assert liif_fast.patch() == found and Upscaler.query_rgb is replaced, "a second call changed something"
    assert set(liif_fast.unpatch()) == set(found)
    assert all(cls.__dict__["query_rgb"] is function for cls, function in own.items())
    assert liif_fast.unpatch() == ()


def test_a_class_or_a_model_is_patched_where_query_rgb_is_defined() -> None:
    assert liif_fast.patch(EDSRGenerator) == (Generator,)
    assert liif_fast.patch(nn.Sequential(classes.Wrapped()), make(classes.WithNewEncoder)) == (Generator, Upscaler)
    assert liif_fast.patch(classes.Field) == (classes.Field,)
    assert liif_fast.unpatch(EDSRGenerator) == (Generator,)
    assert liif_fast.unpatch(Clamped) == ()
    assert set(liif_fast.unpatch()) == {Upscaler, classes.Field}


def test_with_patched_restores_only_what_it_changed() -> None:
    own = Upscaler.query_rgb
    with liif_fast.patched(Upscaler) as outer:
        assert outer == (Upscaler,) and Upscaler.query_rgb is not own
        with pytest.raises(KeyError), liif_fast.patched(Upscaler, Generator):
            raise KeyError
        assert Upscaler.query_rgb is not own and not hasattr(Generator.query_rgb, "__wrapped__")
    assert Upscaler.query_rgb is own


def test_a_replacement_by_others_stays(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    liif_fast.patch(Upscaler)
    own = Upscaler.query_rgb.__wrapped__
    other = lambda self, coord, cell=None: own(self, coord, cell)  # noqa: E731
    Upscaler.query_rgb = other
    try:
        assert liif_fast.unpatch() == () and Upscaler.query_rgb is other
        assert "was replaced after" in caplog.text
    finally:
        Upscaler.query_rgb = own


def test_what_cannot_be_patched_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for target, message in [
        (classes.LIIF, "LIIF has no query_rgb"),
        (nn.Linear(2, 2), "Linear has no query_rgb"),
        (liif(), "LIIF of liif_fast runs the ops already"),
        ("LIIF", "patch takes a LIIF class or a model, not 'LIIF'"),
        (int, "not <class 'int'>"),
    ]:
        with pytest.raises(TypeError, match=message):
            liif_fast.patch(target)  # type: ignore[arg-type]
    monkeypatch.setattr(patching, "sys", types.SimpleNamespace(modules={"torch": torch, "odd": None}))
    with pytest.raises(LookupError, match="import your models before"):
        liif_fast.patch()


# --------------------------------------------------------------------------------------------------- what is computed


@needs_cpu
@pytest.mark.parametrize("switches", FLAGS)
@pytest.mark.parametrize("cls", BOTH)
def test_outputs_and_gradients_are_those_of_the_class(cls: type, switches: tuple[bool, ...]) -> None:
    model = make(cls, *switches)
    expected = results(model)
    liif_fast.patch(cls)
    checked(model, expected)
    liif_fast.unpatch()
    assert all(map(torch.equal, results(model), expected))


@needs_cpu
@pytest.mark.parametrize("cls", [classes.WithNewEncoder, Clamped, classes.Wrapped, classes.OnGPU])
def test_relatives_of_the_classes(cls: type) -> None:
    """A subclass, an overriding subclass, a model inside a model, and code that needs a GPU until it is patched."""
    model = make(cls)
    model = getattr(model, "generator", model)
    expected = results(make(Upscaler) if cls is classes.OnGPU else model)
    liif_fast.patch(*([cls] if cls is classes.OnGPU else []))
    checked(model, expected)


@needs_cpu
@pytest.mark.parametrize("cls", BOTH)
def test_models_are_saved_and_copied_as_before(cls: type, tmp_path: Path) -> None:
    model = make(cls)
    expected, keys = results(model), list(model.state_dict())
    model.__dict__.pop("feat", None)  # a tensor with a history cannot be copied, patched or not
    pickled = pickle.dumps(model)
    liif_fast.patch(cls)
    decoded(model)
    model.__dict__.pop("feat", None)
    assert list(model.state_dict()) == keys and pickle.dumps(model) == pickled
    torch.save(model, tmp_path / "model.pth")
    for copied in (pickle.loads(pickled), copy.deepcopy(model), torch.load(tmp_path / "model.pth", weights_only=False)):
        checked(copied, expected)
    assert pickle.loads(pickle.dumps(model.query_rgb)).__func__ is cls.query_rgb


@needs_cpu
@pytest.mark.parametrize("cls", BOTH)
def test_distributed_data_parallel(cls: type) -> None:
    model = make(cls)
    expected = results(model)
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        parallel = DistributedDataParallel(model)
        assert liif_fast.patch(parallel) == liif_fast.patch(cls)
        model.zero_grad()
        out = parallel(INP, COORD, CELL)
        out.square().sum().backward()
        del parallel  # as the last owner of the group, it would wait with the GIL held for a thread that wants the GIL
    finally:
        torch.distributed.destroy_process_group()
    torch.testing.assert_close([out.detach(), *(each.grad for each in model.parameters())], expected[1:])


@needs_cpu
@pytest.mark.parametrize("cls", [pytest.param(BOTH[0], marks=pytest.mark.prove), *BOTH[1:]])
def test_compile_traces_the_ops(cls: type) -> None:
    """Without an eager call before it: the comparison runs while the model is traced."""
    model = make(cls)
    expected = results(model)
    liif_fast.patch(cls)
    classes.calls.clear()
    model.zero_grad()
    out = compiled(model)(INP, COORD, CELL)
    out.square().sum().backward()
    torch.testing.assert_close([out.detach(), *(each.grad for each in model.parameters())], expected[1:])
    assert classes.calls == [cls.__name__], "only the comparison runs the class's own code"


@needs_cpu
@pytest.mark.parametrize("cls", BOTH)
def test_autocast(cls: type) -> None:
    model = make(cls)
    with torch.autocast("cpu", torch.bfloat16):
        expected = results(model)[:2]
        liif_fast.patch(cls)
        outs = results(model)[:2]
        classes.calls.clear()
        decoded(model)
    assert classes.calls == [] and [out.dtype for out in outs] == [out.dtype for out in expected]
    for out, each in zip(outs, expected):
        assert (out - each).abs().max() < 0.02 * each.abs().max()
    torch.testing.assert_close(decoded(model), model(INP, COORD, CELL).detach())


@needs_cpu
def test_threads() -> None:
    models = [make(cls) for cls in BOTH * 2]
    for model in models:
        nn.init.normal_(model.imnet.layers[0].weight)
    expected = [decoded(model) for model in models]
    liif_fast.patch()
    outs: list[Tensor | None] = [None] * len(models)

    def work(number: int) -> None:
        for _ in range(20):
            outs[number] = decoded(models[number], chunk=3)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(len(models))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    torch.testing.assert_close(outs, expected)
