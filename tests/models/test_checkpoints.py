"""Loading other projects' checkpoints, saving and loading ours, and one sentence for any other file."""

from __future__ import annotations

import os
import pickle
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from liif_fast.images.upscaling import upscale
from liif_fast.models import LIIF, catalog, make_model, register
from liif_fast.models.checkpoints import CheckpointError, load, save
from liif_fast.models.coordinates import make_cell, make_coord

EDSR = {"name": "edsr-baseline", "args": {"n_resblocks": 2, "n_feats": 8, "no_upsampling": True}}
MLP = {"name": "mlp", "args": {"out_dim": 3, "hidden_list": [16, 24]}}


def liif(encoder: dict[str, Any] = EDSR, **flags: bool) -> nn.Module:
    return make_model({"name": "liif", "args": {"encoder_spec": encoder, "imnet_spec": MLP, **flags}})


def original(model: nn.Module, prefix: str = "", **more: Any) -> dict[str, Any]:
    """A checkpoint as the original's trainer writes it."""
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad])
    sum(parameter.sum() for parameter in model.parameters()).backward()
    optimizer.step()
    weights = OrderedDict((prefix + key, tensor) for key, tensor in model.state_dict().items())
    state = {"name": "adam", "args": {"lr": 1e-4}, "sd": optimizer.state_dict()}
    return {"model": {**model.spec, "sd": weights}, "optimizer": state, "epoch": 3, **more}


def assert_same(loaded: nn.Module, model: nn.Module) -> None:
    assert type(loaded) is type(model)
    assert not loaded.training
    weights = loaded.state_dict()
    assert list(weights) == list(model.state_dict())
    for key, tensor in model.state_dict().items():
        assert torch.equal(weights[key], tensor), key
    loaded.backend = model.backend = "reference"
    coord = make_coord([5, 7]).repeat(1, 1, 1)
    cell = make_cell(coord, (5, 7))
    inp = torch.rand(1, 3, 6, 4)
    with torch.no_grad():
        assert torch.equal(loaded(inp, coord, cell), model(inp, coord, cell))


@pytest.mark.parametrize(("prefix", "zipped"), [("", True), ("module.", False), ("_orig_mod.module.", True)])
def test_the_originals_checkpoints(tmp_path: Path, prefix: str, zipped: bool) -> None:
    model = liif()
    torch.save(original(model, prefix), tmp_path / "epoch-last.pth", _use_new_zipfile_serialization=zipped)
    loaded = load(tmp_path / "epoch-last.pth")
    assert_same(loaded, model)
    assert loaded.spec == model.spec
    assert loaded.data_norm == {"inp": {"sub": [0.5], "div": [0.5]}, "gt": {"sub": [0.5], "div": [0.5]}}


def test_metasr_and_the_flags_of_an_originals_checkpoint(tmp_path: Path) -> None:
    for model in (
        make_model({"name": "metasr", "args": {"encoder_spec": EDSR}}),
        liif(local_ensemble=False, feat_unfold=False, cell_decode=False),
        make_model({"name": "liif", "args": {"encoder_spec": EDSR}}),
    ):
        torch.save(original(model), tmp_path / "model.pth")
        assert_same(load(str(tmp_path / "model.pth")), model)


def test_a_checkpoint_may_have_a_normalization(tmp_path: Path) -> None:
    norm = {"inp": {"sub": [0], "div": [1]}, "gt": {"sub": [0.1, 0.2, 0.3], "div": [1, 1, 1]}}
    torch.save(original(liif(), data_norm=norm), tmp_path / "model.pth")
    assert load(tmp_path / "model.pth").data_norm == norm


@pytest.mark.parametrize("make", [liif, lambda: make_model({"name": "metasr", "args": {"encoder_spec": EDSR}})])
def test_save_and_load(tmp_path: Path, make: Any) -> None:
    model = make()
    model.data_norm = {"inp": {"sub": [0.1], "div": [0.2]}, "gt": {"sub": [0.3], "div": [0.4]}}
    save(model, tmp_path / "model.safetensors", metadata={"trained_on": "photos"})
    loaded = load(tmp_path / "model.safetensors")
    assert_same(loaded, model)
    assert loaded.data_norm == model.data_norm
    assert loaded.spec == model.spec
    with safetensors.safe_open(tmp_path / "model.safetensors", "pt") as handle:
        assert handle.metadata()["trained_on"] == "photos"
    assert os.listdir(tmp_path) == ["model.safetensors"]


@pytest.mark.parametrize(
    "stored, back", [(torch.float16, torch.float32), (torch.float64, torch.float64), (None, torch.float32)]
)
def test_stored_dtypes(tmp_path: Path, stored: torch.dtype | None, back: torch.dtype) -> None:
    model = liif()
    save(model, tmp_path / "model.safetensors", dtype=stored)
    loaded = load(tmp_path / "model.safetensors").state_dict()
    for key, tensor in model.state_dict().items():
        assert loaded[key].dtype == back
        assert torch.equal(loaded[key], tensor.to(stored or back).to(back))
    assert next(model.parameters()).dtype == torch.float32


def test_save_a_model_made_by_hand_wrapped_and_with_changed_switches(tmp_path: Path) -> None:
    model = LIIF(EDSR, MLP, feat_unfold=False)
    model.local_ensemble = False
    save(torch.compile(nn.DataParallel(model)), tmp_path / "model.safetensors")
    loaded = load(tmp_path / "model.safetensors")
    assert_same(loaded, model)
    assert (loaded.local_ensemble, loaded.feat_unfold, loaded.cell_decode) == (False, False, True)


def test_users_own_models_are_saved_too(tmp_path: Path) -> None:
    @register("test-own")
    class Own(LIIF):
        def __init__(self, encoder_spec: dict[str, Any], width: int) -> None:
            super().__init__(encoder_spec, {"name": "mlp", "args": {"out_dim": 1, "hidden_list": [width]}})

    model = make_model({"name": "test-own", "args": {"encoder_spec": EDSR}}, args={"width": 5})
    save(model, tmp_path / "own.safetensors")
    assert_same(load(tmp_path / "own.safetensors"), model)


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "model.safetensors"
    save(liif(), file)
    before = file.read_bytes()

    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        save(liif(), file)
    assert file.read_bytes() == before
    assert os.listdir(tmp_path) == ["model.safetensors"]


def test_loading_uses_up_no_random_numbers(tmp_path: Path) -> None:
    save(liif(), tmp_path / "model.safetensors")
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    load(tmp_path / "model.safetensors")
    assert torch.equal(torch.rand(3), expected)


def test_models_in_the_package_are_found_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(catalog, "WEIGHTS", tmp_path)
    model = liif()
    save(model, tmp_path / "tiny.safetensors")
    assert_same(load(), model)
    assert_same(load("tiny"), model)
    with pytest.raises(FileNotFoundError, match=r"huge does not exist.*choose one of edsr-baseline-liif, tiny"):
        load("huge")


def test_equal_models_are_equal_files(tmp_path: Path) -> None:
    model, names = liif(), [f"key{number}" for number in range(20)]
    for order in (names, names[::-1]):
        save(model, tmp_path / f"{order[0]}.safetensors", metadata={name: "ä" * 3 + name for name in order})
    one, two = (path.read_bytes() for path in tmp_path.iterdir())
    assert one == two
    assert int.from_bytes(one[:8], "little") % 8 == 0
    with safetensors.safe_open(tmp_path / "key0.safetensors", "pt") as handle:
        assert handle.metadata()["key7"] == "äääkey7"
    assert_same(load(tmp_path / "key0.safetensors"), model)


class Bomb:
    """A pickle that runs a command when it is read."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.system, (f"touch {self.target}",))


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_nothing_but_tensors_is_unpickled(tmp_path: Path, zipped: bool) -> None:
    target = tmp_path / "ran"
    file = tmp_path / "model.pth"
    torch.save({**original(liif()), "extra": Bomb(target)}, file, _use_new_zipfile_serialization=zipped)
    assert refusal(file) == (
        f"{file} contains posix.system, but only tensors and plain containers are unpickled: "
        "save only the model's spec and state_dict"
    )
    file.write_bytes(pickle.dumps(Bomb(target)))
    assert refusal(file) == f"{file} is a broken pickle, or has another protocol than torch.save's default"
    assert not target.exists()


def refusal(file: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        load(file)
    message = str(caught.value)
    assert "\n" not in message and str(file) in message
    return message


def test_a_whole_pickled_model_is_refused_by_its_class(tmp_path: Path) -> None:
    torch.save(liif(), tmp_path / "model.pth")
    assert "contains liif_fast.models.liif.LIIF, but only tensors" in refusal(tmp_path / "model.pth")


@pytest.mark.parametrize(
    "content, words",
    [
        (b"", "neither a .safetensors nor a .pth file"),
        (b"hello world", "neither a .safetensors nor a .pth file"),
        (b"\x89PNG\r\n\x1a\n" + bytes(50), "neither a .safetensors nor a .pth file"),
        (b"PK\x03\x04" + bytes(100), "is a broken .pth file"),
        (b"\x80\x02", "is a broken .pth file: EOFError"),
        (bytes([255, 0, 0, 0, 0, 0, 0, 0]) + b"{}", "is a broken .safetensors file"),
    ],
)
def test_files_that_are_no_model(tmp_path: Path, content: bytes, words: str) -> None:
    file = tmp_path / "file.pth"
    file.write_bytes(content)
    assert words in refusal(file)


def test_truncated_files(tmp_path: Path) -> None:
    save(liif(), tmp_path / "a.safetensors")
    torch.save(original(liif()), tmp_path / "b.pth")
    for file in tmp_path.iterdir():
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
        assert f"{file} is a broken {file.suffix} file" in refusal(file)


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda c: [1, 2], "it has neither 'model' with name, args and sd (yinboc/liif) nor 'state_dict' (MMagic)"),
        (lambda c: c["model"]["sd"], "it has neither 'model'"),
        (lambda c: {"model": "liif"}, "it has neither 'model'"),
        (lambda c: {"model": {**c["model"], "sd": {"a": 1}}}, "it has neither 'model'"),
        (lambda c: {"model": {**c["model"], "name": "lte"}}, "no model is registered as 'lte'"),
        (lambda c: {"model": {**c["model"], "args": {"depth": 3}}}, "unexpected keyword argument 'depth'"),
        (lambda c: {**c, "data_norm": {"inp": 3}}, "has a normalization other than"),
    ],
)
def test_pth_files_without_a_model(tmp_path: Path, change: Any, words: str) -> None:
    torch.save(change(original(liif())), tmp_path / "model.pth")
    assert words in refusal(tmp_path / "model.pth")


def test_missing_unexpected_and_misshapen_weights_are_named(tmp_path: Path) -> None:
    content = original(liif())
    weights = content["model"]["sd"]
    file = tmp_path / "model.pth"

    def refusal_of(changed: dict[str, Tensor]) -> str:
        torch.save({"model": {**content["model"], "sd": changed}}, file)
        return refusal(file).removeprefix(f"the weights in {file} do not fit its spec: ")

    moved = dict(weights)
    moved["imnet.layers.9.weight"] = moved.pop("imnet.layers.0.weight")
    assert refusal_of(moved) == "missing 'imnet.layers.0.weight', unexpected 'imnet.layers.9.weight'"
    short = {**weights, "imnet.layers.0.bias": torch.zeros(3)}
    assert refusal_of(short) == "'imnet.layers.0.bias' is [3] instead of [16]"
    assert refusal_of({}).startswith("missing 'encoder.head.0.weight', 'encoder.head.0.bias'")
    assert refusal_of({}).endswith("more keys")


def test_safetensors_of_others(tmp_path: Path) -> None:
    save_file = safetensors.torch.save_file
    file = tmp_path / "model.safetensors"
    save_file(dict(liif().state_dict()), file)
    assert "its metadata has no liif_fast spec" in refusal(file)
    save_file(dict(liif().state_dict()), file, {"format": "liif_fast", "spec": "{"})
    assert "has a broken spec in its metadata" in refusal(file)
    save_file(dict(liif().state_dict()), file, {"format": "liif_fast", "spec": "[]"})
    assert "describes a model that cannot be built" in refusal(file)


def test_paths_that_lead_nowhere(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"gone\.pth does not exist"):
        load(tmp_path / "gone.pth")
    with pytest.raises(CheckpointError, match="is a folder, not a model"):
        load(tmp_path)


def test_models_that_save_refuses(tmp_path: Path) -> None:
    changed = liif()
    changed.imnet = make_model({"name": "mlp", "args": {"in_dim": 76, "out_dim": 3, "hidden_list": [16]}})

    @register("test-unwritable")
    def build(scales: set[int]) -> nn.Module:
        return nn.Linear(len(scales), 1)

    unwritable = make_model({"name": "test-unwritable", "args": {"scales": {1, 2}}})
    for model, suffix, metadata, message in (
        (liif(), "pth", None, r"saved as \.safetensors, not as 'model\.pth'"),
        (nn.Linear(2, 2), "safetensors", None, "this Linear has no spec"),
        (liif(), "safetensors", {"spec": "mine"}, "not 'spec': 'mine'"),
        (liif(), "safetensors", {"steps": 7}, "not 'steps': 7"),
        (changed, "safetensors", None, r"no longer matches its spec: missing 'imnet\.layers\.4\.weight'"),
        (unwritable, "safetensors", None, "its spec is not plain numbers and strings"),
    ):
        with pytest.raises(ValueError, match=message):
            save(model, tmp_path / f"model.{suffix}", metadata=metadata)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("suffix", ["safetensors", "pth"])
def test_torchs_defaults_have_no_influence(tmp_path: Path, suffix: str) -> None:
    model = liif()
    if suffix == "pth":
        torch.save(original(model), tmp_path / "model.pth")
    else:
        save(model, tmp_path / "model.safetensors")
    pixels = torch.rand(3, 6, 5)
    expected = upscale(pixels, scale=2, model=model.eval())
    for dtype, device in ((torch.float64, "cpu"), (torch.float16, "meta")):
        torch.set_default_dtype(dtype)
        torch.set_default_device(device)
        try:
            loaded = load(tmp_path / f"model.{suffix}")
            result = upscale(pixels, scale=2, model=loaded)
            again = upscale(pixels, scale=2, model=tmp_path / f"model.{suffix}", device="cpu")
        finally:
            torch.set_default_dtype(torch.float32)
            torch.set_default_device(None)
        assert torch.equal(result, expected) and torch.equal(again, expected)
        assert_same(loaded, model)


@pytest.mark.parametrize("number", [float("nan"), float("inf"), 1e300])
@pytest.mark.parametrize("key", ["encoder.body.0.body.0.weight", "imnet.layers.2.bias"])
def test_weights_that_are_not_finite_are_refused(tmp_path: Path, number: float, key: str) -> None:
    content = original(liif())
    weights = content["model"]["sd"]
    weights[key] = weights[key].double()  # with the others in float32, the model is
    weights[key].view(-1)[1] = number
    torch.save(content, tmp_path / "model.pth")
    with pytest.raises(CheckpointError, match=rf"model\.pth has NaN or infinite numbers in {key}: its training"):
        load(tmp_path / "model.pth")
