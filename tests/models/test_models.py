"""LIIF, MetaSR and MLP: construction, decoding, rendering, compilation."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from liif_fast.models import LIIF, MLP, base, linear_layers, make_model, register
from liif_fast.models.coordinates import make_cell, make_coord
from liif_fast.ops import reference
from tests.helpers import FLAGS as FLAG_VALUES
from tests.models.small_models import ENCODER, IMNET, image, liif, metasr, queries

FLAGS = ("local_ensemble", "feat_unfold", "cell_decode")
COMBINATIONS = [dict(zip(FLAGS, values, strict=True)) for values in FLAG_VALUES]


# --- specs and construction


def test_make_model_overrides_and_leaves_the_spec_alone() -> None:
    spec = {"name": "mlp", "args": {"in_dim": 2, "out_dim": 3, "hidden_list": [4]}}
    kept = copy.deepcopy(spec)
    model = make_model(spec, args={"out_dim": 7, "hidden_list": []})
    assert model(torch.zeros(5, 2)).shape == (5, 7)
    assert spec == kept
    spec["args"]["hidden_list"].append(9)
    assert model.spec == {"name": "mlp", "args": {"in_dim": 2, "out_dim": 7, "hidden_list": []}}


def test_make_model_loads_weights_on_request() -> None:
    model = liif().float()
    spec = {**model.spec, "sd": model.state_dict()}
    loaded = make_model(spec, load_sd=True)
    assert all(torch.equal(loaded.state_dict()[key], tensor) for key, tensor in model.state_dict().items())
    assert not torch.equal(make_model(spec).state_dict()["imnet.layers.0.weight"], model.imnet.layers[0].weight)


@pytest.mark.parametrize(
    "spec, load_sd, error, words",
    [
        ({"name": "liff"}, False, ValueError, "no model is registered as 'liff': choose one of .*edsr.*liif.*metasr"),
        ({"args": {}}, False, ValueError, "a dictionary with 'name' and 'args'"),
        ("liif", False, ValueError, "not 'liif'"),
        ({"name": "mlp", "args": {"width": 3}}, False, TypeError, "width"),
        ({"name": "rdn"}, True, ValueError, "has no 'sd' to load"),
    ],
)
def test_specs_that_cannot_be_built(spec: Any, load_sd: bool, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        make_model(spec, load_sd=load_sd)


@pytest.mark.parametrize("flags", COMBINATIONS, ids=lambda flags: "".join("01"[value] for value in flags.values()))
def test_liif_attributes_and_in_dim(flags: dict[str, bool]) -> None:
    model = LIIF(ENCODER, IMNET, **flags)
    assert {name: getattr(model, name) for name in FLAGS} == flags
    assert isinstance(model.imnet, MLP) and model.encoder.out_dim == 4
    width = 4 * (9 if flags["feat_unfold"] else 1) + 2 + (2 if flags["cell_decode"] else 0)
    assert model.imnet.layers[0].in_features == width
    assert "in_dim" not in model.spec["args"]["imnet_spec"]["args"] and "in_dim" not in IMNET["args"]
    assert type(make_model(model.spec)) is LIIF


def test_users_own_encoders_and_imnets() -> None:
    @register("test-encoder")
    class Gradient(nn.Module):
        out_dim = 6

        def forward(self, x: Tensor) -> Tensor:
            return torch.cat([x, x.roll(1, -1) - x], 1)

    @register("test-imnet")
    class Sine(nn.Module):
        def __init__(self, in_dim: int) -> None:
            super().__init__()
            self.layer = nn.Linear(in_dim, 2)

        def forward(self, x: Tensor) -> Tensor:
            assert x.dim() == 2
            return torch.sin(self.layer(x))

    model = LIIF({"name": "test-encoder"}, {"name": "test-imnet"}).double()
    out = model(image(), *queries())
    assert out.shape == (2, 29, 2) and out.abs().max() <= 1


def test_mlp() -> None:
    model = MLP(3, 2, [5, 4])
    assert list(model.state_dict()) == [f"layers.{i}.{part}" for i in (0, 2, 4) for part in ("weight", "bias")]
    x = torch.randn(2, 7, 3)
    first, second, last = model.layers[0], model.layers[2], model.layers[4]
    torch.testing.assert_close(model(x), last(F.relu(second(F.relu(first(x))))))
    assert [type(layer) for layer in MLP(3, 2, []).layers] == [nn.Linear]


# --- decoding


def layers_of(model: Any) -> tuple[list[Tensor], list[Tensor]]:
    layers = linear_layers(model.imnet)
    assert layers is not None
    return [layer.weight for layer in layers], [layer.bias for layer in layers]


@pytest.mark.parametrize("flags", COMBINATIONS, ids=lambda flags: "".join("01"[value] for value in flags.values()))
def test_liif_is_the_reference_on_its_features(flags: dict[str, bool]) -> None:
    model = liif(**flags)
    inp, (coord, cell) = image(), queries()
    out = model(inp, coord, cell)
    expected = reference.query(model.encoder(inp), coord, cell, *layers_of(model), **flags)
    torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-10)
    assert torch.equal(model.feat, model.encoder(inp))
    if not flags["cell_decode"]:
        torch.testing.assert_close(model.query_rgb(coord), out)


def test_metasr_is_the_reference_on_its_features() -> None:
    model = metasr()
    coord, cell = queries()
    out = model(image(), coord, cell)
    expected = reference.metasr_query(model.encoder(image()), coord, cell, *layers_of(model))
    torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-10)


def test_without_imnet_the_nearest_feature_is_the_output() -> None:
    encoder = {"name": "edsr-baseline", "args": {"n_resblocks": 1, "n_feats": 4, "scale": 2}}
    model = LIIF(encoder).double()
    assert model.imnet is None
    coord = make_coord([12, 10], dtype=torch.float64).repeat(2, 1, 1)
    out = model(image(), coord)
    assert torch.equal(out, model.encoder(image()).flatten(2).transpose(1, 2))
    assert torch.equal(model.render((12, 10)), model.feat)
    assert (model.query_rgb(torch.full((2, 1, 2), 1.5, dtype=torch.float64)) == 0).all()
    assert model.query_rgb(coord[:, :0]).shape == (2, 0, 3)


@pytest.mark.parametrize("make", [liif, metasr])
def test_features_set_by_hand(make: Any) -> None:
    model, (coord, cell) = make(), queries()
    feat = torch.randn(2, 5, 6, 4, dtype=torch.float64).permute(0, 3, 1, 2)  # channels last
    model.feat = feat
    out = model.query_rgb(coord, cell)
    model.feat = feat.contiguous()
    torch.testing.assert_close(model.query_rgb(coord, cell), out)
    with torch.no_grad():
        torch.testing.assert_close(model.query_rgb(coord, cell), out)
        model.feat = feat * 2
        assert not torch.allclose(model.query_rgb(coord, cell), out)


@pytest.mark.parametrize("make", [liif, metasr])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bit_models(make: Any, dtype: torch.dtype) -> None:
    model, (coord, cell) = make(), queries()
    expected = model(image(), coord, cell)
    model.to(dtype)
    out = model(image().to(dtype), coord.float(), cell.float())
    assert out.dtype == dtype
    assert (out - expected).abs().max() < 0.05 * expected.abs().max()


@pytest.mark.parametrize("make", [liif, metasr])
def test_autocast_returns_float32(make: Any) -> None:
    model, (coord, cell) = make().float(), queries()
    expected = model(image().float(), coord.float(), cell.float())
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        out = model(image().float(), coord.float(), cell.float())
        again = model.query_rgb(coord.float(), cell.float())
    assert out.dtype == torch.float32 and torch.equal(out, again)
    assert (out - expected).abs().max() < 0.05 * expected.abs().max()


def test_queries_without_features_or_cells_are_refused() -> None:
    coord, cell = queries()
    with pytest.raises(RuntimeError, match="call gen_feat"):
        liif().query_rgb(coord, cell)
    with pytest.raises(RuntimeError, match="call gen_feat"):
        metasr().render((4, 4))
    for model in (liif(), metasr()):
        model.gen_feat(image())
        with pytest.raises(ValueError, match="cell"):
            model.query_rgb(coord)
    custom = liif()
    custom.imnet.layers[1] = nn.GELU()
    with pytest.raises(ValueError, match="decodes with cells"):
        custom(image(), coord)
    broken = metasr()
    broken.imnet = nn.Sequential(nn.Linear(3, 8), nn.GELU(), nn.Linear(8, 108)).double()
    with pytest.raises(TypeError, match="this Sequential is not"):
        broken(image(), coord, cell)


def test_an_explicit_backend_reaches_the_ops() -> None:
    for model in (liif(), metasr()):
        model.backend = "abacus"
        with pytest.raises(ValueError, match="abacus"):
            model(image(), *queries())


@pytest.mark.parametrize("make", [liif, metasr])
def test_copies_and_pickles_have_no_features(make: Any) -> None:
    model, (coord, cell) = make(), queries()
    keys = list(model.state_dict())
    expected = model(image(), coord, cell)  # features that carry gradients
    with torch.no_grad():
        model.query_rgb(coord, cell)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert twin.feat is None and list(twin.state_dict()) == keys
        assert twin.spec == model.spec and twin.data_norm == model.data_norm
        torch.testing.assert_close(twin(image(), coord, cell), expected)
    assert model.feat is not None and list(model.state_dict()) == keys


# --- other imnets


class Doubled(MLP):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


CHANGED_IMNETS: dict[str, Callable[[Any], object]] = {
    "gelu": lambda model: model.imnet.layers.__setitem__(1, nn.GELU()),
    "no bias": lambda model: setattr(model.imnet.layers[2], "bias", None),
    "own forward": lambda model: setattr(model.imnet, "__class__", Doubled),
    "hook": lambda model: model.imnet.layers[0].register_forward_hook(lambda _module, _args, out: out + 1),
    "pre-hook": lambda model: model.imnet.register_forward_pre_hook(lambda _module, args: (args[0] * 2,)),
    "parametrized": lambda model: parametrizations.weight_norm(model.imnet.layers[2]),
    "patched": lambda model: setattr(model.imnet, "forward", lambda x, plain=model.imnet.forward: plain(x) + 1),
}
OTHER_FLAGS = [{"local_ensemble": False}, {"feat_unfold": False, "cell_decode": False}]


@pytest.mark.parametrize(
    ("change", "flags"), [*((change, {}) for change in CHANGED_IMNETS), *(("gelu", flags) for flags in OTHER_FLAGS)]
)
def test_a_changed_imnet_is_run_as_it_is(change: str, flags: dict[str, bool]) -> None:
    model = liif(**flags)
    assert linear_layers(model.imnet) is not None
    CHANGED_IMNETS[change](model)
    assert linear_layers(model.imnet) is None
    coord, cell = queries()
    out = model(image(), coord, cell)

    switches = {name: getattr(model, name) for name in ("feat_unfold", "local_ensemble")}
    x, area_weight = reference.gather(model.encoder(image()), coord, cell if model.cell_decode else None, **switches)
    torch.testing.assert_close(out, (model.imnet(x) * area_weight.unsqueeze(-1)).sum(2), rtol=1e-10, atol=1e-12)
    out.sum().backward()
    assert model.encoder.head[0].weight.grad.abs().sum() > 0


def test_a_plain_sequential_is_as_good_as_ours() -> None:
    model = liif()
    expected = model(image(), *queries())
    model.imnet = nn.Sequential(*model.imnet.layers)
    assert linear_layers(model.imnet) is not None
    torch.testing.assert_close(model(image(), *queries()), expected)


# --- render


def any_imnet() -> LIIF:
    model = liif()
    CHANGED_IMNETS["gelu"](model)
    return model


def no_imnet() -> LIIF:
    torch.manual_seed(0)
    return LIIF(ENCODER).double()


MAKERS = [liif, metasr, any_imnet, no_imnet]


@pytest.mark.parametrize("make", MAKERS)
def test_render_is_query_on_a_grid(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base, "_RENDER_CHUNK", 40)  # several steps
    model = make()
    model.gen_feat(image())
    coord = make_coord([13, 17], dtype=torch.float64).repeat(2, 1, 1)
    for cell in (None, (0.3, 0.2)):
        cells = make_cell(coord, (13, 17)) if cell is None else coord.new_tensor(cell).expand(coord.shape)
        expected = model.query_rgb(coord, cells).transpose(1, 2).view(2, -1, 13, 17)
        out = model.render((13, 17), cell=cell)
        torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-10)
        window = model.render((13, 17), window=(4, 5, 6, 7), cell=cell)
        torch.testing.assert_close(window, expected[:, :, 4:10, 5:12], rtol=1e-10, atol=1e-10)
    outs = expected.shape[1]
    assert model.render((13, 17), window=(4, 5, 0, 7)).shape == (2, outs, 0, 7)
    assert model.render((13, 17), window=(13, 5, 0, 0)).shape == (2, outs, 0, 0)
    assert model.render((13, 17), window=(4, 5, 3, 0)).shape == (2, outs, 3, 0)
    model.feat = model.feat[:0]
    assert model.render((13, 17), window=(4, 5, 3, 2)).shape == (0, outs, 3, 2)


@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_render_from_a_part_of_the_features(make: Any, dtype: torch.dtype, tolerance: float) -> None:
    model = make().to(dtype)
    inp = torch.rand(1, 3, 24, 20, generator=torch.Generator().manual_seed(3), dtype=torch.float64).to(dtype)
    feat = model.gen_feat(inp)
    for size in ((70, 61), (72, 60), (24, 20)):
        whole = model.render(size)
        scale = size[0] / 24
        window = (round(8 * scale), round(5 * scale), round(6 * scale), round(7 * scale))
        model.feat = feat[:, :, 5:18, 2:16]
        part = model.render(size, window=window, feat_region=(5, 2, 24, 20))
        expected = whole[:, :, window[0] : window[0] + window[2], window[1] : window[1] + window[3]]
        torch.testing.assert_close(part, expected, rtol=0, atol=tolerance * whole.abs().max().item())
        model.feat = feat


@pytest.mark.parametrize("make", MAKERS)
def test_a_source_window_shows_a_part_of_the_input(make: Any) -> None:
    model = make()
    feat = model.gen_feat(image())
    rows, cols = feat.shape[-2:]
    # Half a pixel beyond the border, then a part of an image of twice the size.
    ranges = ((2 * -0.5 / rows - 1, 2 * 2.5 / rows - 1), (2 * 0.25 / cols - 1, 2 * 4.25 / cols - 1))
    coord = make_coord([6, 8], ranges, dtype=torch.float64).repeat(2, 1, 1)
    cells = make_cell(coord, (2 * rows, 2 * cols))
    expected = model.query_rgb(coord, cells).transpose(1, 2).view(2, -1, 6, 8)
    out = model.render((6, 8), source=(-0.5, 0.25, 3, 4))
    torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-10)
    part = model.render((2 * rows, 2 * cols), source=(1, 2, rows, cols), window=(0, 0, 2, 3))
    torch.testing.assert_close(part, model.render((2 * rows, 2 * cols), window=(2, 4, 2, 3)), rtol=1e-10, atol=1e-10)
    with pytest.raises(ValueError, match="source must be"):
        model.render((6, 8), source=(0, 0, 0, 4))


@pytest.mark.parametrize("make", [liif, metasr])
def test_scripting_is_one_sentence(make: Any) -> None:
    for module in (make(), nn.Sequential(make())):
        with pytest.raises(RuntimeError, match=r"torch\.jit\.script cannot compile a \w+: use torch"):
            torch.jit.script(module)


@pytest.mark.parametrize("make", MAKERS)
def test_arguments_that_render_refuses(make: Any) -> None:
    model = make()
    model.gen_feat(image())
    with pytest.raises(ValueError, match="0x4"):
        model.render((0, 4))
    with pytest.raises(ValueError, match=r"window \(0, 0, 5, 4\)"):
        model.render((4, 4), window=(0, 0, 5, 4))
    with pytest.raises(ValueError, match="feat_region"):
        model.render((4, 4), feat_region=(0, 0, 3, 3))
    with pytest.raises(ValueError, match="widen feat"):
        model.render((40, 40), feat_region=(4, 4, 40, 40))


# --- compilation, gradients


@pytest.mark.prove
@pytest.mark.parametrize(("make", "name"), [(liif, "reference"), *((make, None) for make in MAKERS)])
def test_compiled_models_give_the_same(make: Any, name: str | None) -> None:
    model, (coord, cell) = make(), queries()
    model.backend = name
    expected = model(image(), coord, cell)
    expected.sum().backward()
    gradients = {key: parameter.grad for key, parameter in model.named_parameters() if parameter.grad is not None}
    model.zero_grad()
    with torch.no_grad():
        model(image() / 2, coord, cell)  # features and a latent map that the compiled model must replace

    torch.compiler.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    out = compiled(image(), coord, cell)
    torch.testing.assert_close(out, expected)
    out.sum().backward()
    for key, parameter in model.named_parameters():
        if key in gradients:
            torch.testing.assert_close(parameter.grad, gradients[key])
    with torch.no_grad():
        torch.testing.assert_close(model.query_rgb(coord, cell), expected)
        torch.testing.assert_close(compiled(image(), coord, cell), expected)


@pytest.mark.parametrize("make", MAKERS)
def test_inputs_are_not_changed_and_gradients_reach_coordinates(make: Any) -> None:
    model = make()
    inp, (coord, cell) = image(), queries()
    kept = inp.clone(), coord.clone(), cell.clone()
    for tensor in (inp, coord, cell):
        tensor.requires_grad_()
    model(inp, coord, cell).square().sum().backward()
    assert all(torch.equal(now, before) for now, before in zip((inp, coord, cell), kept, strict=True))
    assert inp.grad.abs().sum() > 0
    if make is not no_imnet:
        assert coord.grad.abs().sum() > 0 and cell.grad.abs().sum() > 0
