"""`liif_fast.patch`: which classes it replaces, what their models compute afterwards, and when their own code runs."""

from __future__ import annotations

import copy
import logging
import pickle
import threading
import types
import warnings
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import liif_fast
from liif_fast.integrations import patching
from tests.helpers import FLAGS, needs_cpu
from tests.integrations import original_classes as classes
from tests.integrations.original_classes import Clamped, EDSRGenerator, Generator, Upscaler
from tests.models.small_models import image, liif, queries
from tests.models.test_latent_map import CountFolds

BOTH = [Upscaler, EDSRGenerator]
COORD, CELL = (tensor.float() for tensor in queries())
INP = image().float()


@pytest.fixture(autouse=True)
def nothing_stays_patched() -> Iterator[None]:
    yield
    liif_fast.unpatch()
    classes.calls.clear()


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
    finally:
        torch.distributed.destroy_process_group()
    torch.testing.assert_close([out.detach(), *(each.grad for each in model.parameters())], expected[1:])


def compiled(model: nn.Module) -> Any:
    torch.compiler.reset()
    return torch.compile(model, fullgraph=True, backend="aot_eager")


@needs_cpu
@pytest.mark.parametrize("cls", BOTH)
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


# ------------------------------------------------------------------------------------- when the class's own code runs


def add_hook(model: Any) -> None:
    model.imnet.layers[2].register_forward_hook(lambda module, args, out: out * 2)


def parametrize(model: Any) -> None:
    nn.utils.parametrizations.weight_norm(model.imnet.layers[2])


def replace_imnet(model: Any) -> None:
    model.imnet.layers[1] = nn.LeakyReLU()


def wrap_imnet(model: Any) -> None:
    model.imnet = nn.Sequential(model.imnet, nn.Identity())


@pytest.mark.parametrize("change", [add_hook, parametrize, replace_imnet, wrap_imnet])
@pytest.mark.parametrize("cls", BOTH)
def test_what_the_ops_cannot_run_is_said_once(cls: type, change: Any, caplog: pytest.LogCaptureFixture) -> None:
    model = make(cls)
    change(model)
    expected = results(model)
    liif_fast.patch(cls)
    with caplog.at_level(logging.WARNING, "liif_fast"):
        outs = results(model)
    assert all(map(torch.equal, outs, expected))
    (record,) = caplog.records
    assert record.name == "liif_fast" and "is not Linear and ReLU without hooks or param" in record.message
    assert cls.__qualname__ in record.message


def test_where_only_the_reference_may_run_the_code_is_kept(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model = make(Upscaler)
    expected = results(model)
    monkeypatch.setattr(patching, "choose", lambda request: "reference")
    liif_fast.patch(Upscaler)
    assert all(map(torch.equal, results(model), expected))
    assert "LIIF_FAST_BACKEND is 'reference'" in caplog.text


@needs_cpu
@pytest.mark.parametrize("cls", [classes.TwiceTheCell, classes.Detached, classes.WithResidual])
def test_another_formula_is_found_out(cls: type) -> None:
    model = make(cls)
    expected = results(model)
    liif_fast.patch(cls)
    with pytest.warns(RuntimeWarning, match=f"{cls.__name__} keeps its own query_rgb") as caught:
        outs = results(model)
    assert len(caught) == 1 and all(map(torch.equal, outs, expected))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        results(model)  # said once


@needs_cpu
@pytest.mark.parametrize("wrong", [float("nan"), 0.0])
def test_a_wrong_kernel_is_found_out(wrong: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison tests the machine's kernels too: here one value of one gradient is wrong."""
    model = make(Upscaler)
    expected = results(model)
    query = liif_fast.ops.query

    def broken(*args: Any, **options: Any) -> Tensor:
        out = query(*args, **options)
        if out.requires_grad:
            out.register_hook(lambda grad: grad * torch.ones(3).index_fill(0, torch.tensor(1), wrong))
        return out

    monkeypatch.setattr(liif_fast.ops, "query", broken)
    liif_fast.patch(Upscaler)
    with pytest.warns(RuntimeWarning, match="relative error of"):
        assert all(map(torch.equal, results(model), expected))


@needs_cpu
@pytest.mark.parametrize("cls", [classes.TwiceTheCell, Upscaler])
def test_compile_traces_the_own_code_where_it_must(cls: type, caplog: pytest.LogCaptureFixture) -> None:
    model = make(cls)
    if cls is Upscaler:
        replace_imnet(model)
    liif_fast.patch(cls)
    with warnings.catch_warnings(record=True) as caught, torch.no_grad():
        out = compiled(model)(INP, COORD, CELL)
    assert "keeps its own query_rgb" in caplog.text + "".join(str(warning.message) for warning in caught)
    liif_fast.unpatch()
    torch.testing.assert_close(out, model(INP, COORD, CELL).detach())


@pytest.mark.parametrize("cls", BOTH)
def test_wrong_calls_fail_as_before(cls: type) -> None:
    model = make(cls)
    first = [torch.rand(2, 4, 6, 5)] if cls is EDSRGenerator else []
    bad: list[tuple[list[Any], dict[str, Any]]] = [
        (first, {}),
        ([*first, COORD, CELL, 1], {}),
        ([*first, COORD], {"x": 1}),
    ]
    for args, kwargs in bad:
        with pytest.raises(TypeError, match="query_rgb"):
            model.query_rgb(*args, **kwargs)
        with liif_fast.patched(cls), pytest.raises(TypeError, match="query_rgb"):
            model.query_rgb(*args, **kwargs)
    with liif_fast.patched(Upscaler), pytest.raises(AttributeError, match="feat"):
        make(Upscaler).query_rgb(COORD, CELL)


@needs_cpu
def test_arguments_by_name_and_an_upscaling_encoder() -> None:
    model = make(EDSRGenerator)
    feature = model.gen_feature(INP)
    expected = model.query_rgb(feature, COORD, CELL)
    with liif_fast.patched(Generator):
        torch.testing.assert_close(model.query_rgb(cell=CELL, feature=feature, coord=COORD), expected)
        model.cell_decode, model.imnet = False, None
        with pytest.raises(TypeError, match="NoneType"):
            model.query_rgb(feature, COORD)  # its own code, which has no nearest sampling


@needs_cpu
@pytest.mark.parametrize("cls", BOTH)
def test_exports_and_function_transforms_run_the_own_code(cls: type) -> None:
    model = make(cls)
    expected = model(INP, COORD, CELL).detach()
    liif_fast.patch(cls)
    program = torch.export.export(model, (INP, COORD, CELL))
    assert "liif_fast" not in str(program.graph)
    torch.testing.assert_close(program.module()(INP, COORD, CELL), expected)
    torch.testing.assert_close(torch.jit.trace(model, (INP, COORD, CELL))(INP, COORD, CELL), expected)

    def decode(coord: Tensor) -> Tensor:
        return model(INP[:1], coord[None], CELL[:1])[0]

    with torch.no_grad():
        torch.testing.assert_close(torch.func.vmap(decode)(COORD)[0], expected[0])

    def with_bias(bias: Tensor) -> Tensor:
        return torch.func.functional_call(model, {"imnet.layers.4.bias": bias}, (INP, COORD, CELL))

    _, tangent = torch.func.jvp(with_bias, (torch.zeros(3),), (torch.ones(3),))
    torch.testing.assert_close(tangent, torch.ones(2, 29, 3))


# ------------------------------------------------------------------------------------------------------- the latent map


def held() -> Tensor | None:
    """The latent map of this thread."""
    holder = patching._thread.__dict__.get("holder")
    return holder and holder.latent_map


@needs_cpu
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("cls", BOTH)
def test_a_loop_over_chunks_folds_once(cls: type, mode: Any) -> None:
    model = make(cls)
    liif_fast.patch(cls)
    expected = decoded(model)  # and compares
    for _ in range(2):
        with mode(), CountFolds() as counted:
            torch.testing.assert_close(decoded(model), expected)
        assert counted.count == 2, "one convolution of the encoder and one of the features"
    assert "holder" not in repr(model.__dict__) and list(model.state_dict()) == list(make(cls).state_dict())


@needs_cpu
def test_the_latent_map_is_never_stale() -> None:
    model, other = make(EDSRGenerator), make(EDSRGenerator)
    nn.init.normal_(other.imnet.layers[0].weight)
    with torch.no_grad():
        feature = model.gen_feature(INP)

    own = Generator.query_rgb
    liif_fast.patch(Generator)

    def check(decoder: Any) -> None:
        with torch.no_grad():
            decoder.query_rgb(feature, COORD, CELL)  # may compare, may fold
            with CountFolds() as counted:
                out = decoder.query_rgb(feature, COORD, CELL)
            torch.testing.assert_close(out, own(decoder, feature, COORD, CELL))
        assert counted.count == 0

    check(model)
    check(other)
    check(model)
    feature.mul_(2)
    check(model)
    with torch.no_grad():
        model.imnet.layers[0].weight.mul_(2)
    check(model)
    model.imnet.layers[0].weight.data.mul_(2)
    check(model)


@needs_cpu
@pytest.mark.parametrize("cls", BOTH)
def test_the_latent_map_is_dropped_with_its_features_and_by_training(cls: type) -> None:
    model = make(cls)
    liif_fast.patch(cls)
    decoded(model)
    if cls is Upscaler:
        latent_map = held()
        assert latent_map is not None
        dropped = weakref.ref(latent_map)
        del latent_map
        model.feat = None
        assert dropped() is None
    assert held() is None
    with torch.no_grad():
        feat = model.encoder(INP)
        model.feat = feat
        args = [feat] if cls is EDSRGenerator else []
        model.query_rgb(*args, COORD, CELL)
        assert held() is not None
    model(INP, COORD, CELL)
    assert held() is None


@needs_cpu
def test_every_thread_has_its_own_latent_map() -> None:
    model = make(Upscaler)
    liif_fast.patch(Upscaler)
    decoded(model)
    ours, theirs = held(), []

    def work() -> None:
        assert held() is None
        with torch.no_grad():
            model.query_rgb(COORD, CELL)
        theirs.append(weakref.ref(held()))  # type: ignore[arg-type]
        assert held() is not ours

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert ours is not None and held() is ours and theirs[0]() is None, "a map outlives its thread"
