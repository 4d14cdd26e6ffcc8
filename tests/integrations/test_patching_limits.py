"""`liif_fast.patch`: when a class's own code runs, and how long a latent map is kept."""

from __future__ import annotations

import logging
import threading
import warnings
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import liif_fast
from liif_fast.integrations import patching
from tests.helpers import needs_cpu
from tests.integrations import original_classes as classes
from tests.integrations.original_classes import EDSRGenerator, Generator, Upscaler
from tests.integrations.patched_models import BOTH, CELL, COORD, INP, compiled, decoded, make, results
from tests.models.test_latent_map import CountFolds

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


@pytest.mark.prove
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


@pytest.mark.prove
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
