"""The ComfyUI nodes on the real spandrel and on stand-ins for ComfyUI's modules, since ComfyUI is no package.

The stand-ins have the documented interface of folder_paths, comfy.utils.ProgressBar and comfy.model_management.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

import liif_fast
from tests.integrations import real_spandrel
from tests.models import small_models

FOLDER = Path(__file__).resolve().parents[2] / "examples" / "comfyui_node"
IMAGES = torch.rand(2, 9, 7, 3, generator=torch.Generator().manual_seed(0))


class ProgressBar:
    """comfy.utils.ProgressBar."""

    seen: list[tuple[int, int]] = []  # noqa: RUF012

    def __init__(self, total):
        self.total = total

    def update_absolute(self, value, total=None, preview=None):
        self.seen.append((value, total))


def module(**names):
    made = ModuleType("stand-in")
    made.__dict__.update(names)
    return made


@pytest.fixture
def nodes(monkeypatch, tmp_path):
    """The module of the nodes, loaded as ComfyUI does: from its folder, under another name."""
    package = real_spandrel.import_or_skip(monkeypatch)
    monkeypatch.setattr(package.ModelLoader, "load_from_file", package.ModelLoader.load_from_file)
    state = dict(package.MAIN_REGISTRY.__dict__)
    paths = module(
        get_filename_list=lambda kind: sorted(file.name for file in (tmp_path / kind).iterdir()),
        get_full_path_or_raise=lambda kind, name: str(tmp_path / kind / name),
    )
    management = module(
        get_torch_device=lambda: torch.device("cpu"), throw_exception_if_processing_interrupted=lambda: None
    )
    utils = module(ProgressBar=ProgressBar)
    comfy = module(utils=utils, model_management=management)
    stand_ins = {"comfy": comfy, "comfy.utils": utils, "comfy.model_management": management, "folder_paths": paths}
    for name, stand_in in stand_ins.items():
        monkeypatch.setitem(sys.modules, name, stand_in)
    (tmp_path / "upscale_models").mkdir()
    model = small_models.liif().float()
    model.data_norm["inp"]["sub"] = [0.4]
    liif_fast.save(model, tmp_path / "upscale_models" / "small.safetensors")
    spec = importlib.util.spec_from_file_location("comfyui_node", FOLDER / "__init__.py")
    assert spec is not None and spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    yield loaded
    package.MAIN_REGISTRY.__dict__.update(state)


def node(nodes, name):
    """(the node's function, its inputs)."""
    kind = nodes.NODE_CLASS_MAPPINGS[name]
    assert name in nodes.NODE_DISPLAY_NAME_MAPPINGS
    return getattr(kind(), kind.FUNCTION), kind.INPUT_TYPES()


def load(nodes, name="small.safetensors"):
    function, inputs = node(nodes, "LoadLIIF")
    assert name in inputs["required"]["model_name"][0]
    return function(name)[0]


@pytest.mark.parametrize(
    ("asked", "size"),
    [
        ({"scale": 2.7}, (24, 19)),
        ({"scale": 0.5}, (4, 4)),
        ({"scale": 2.0, "width": 14}, (18, 14)),
        ({"scale": 2.0, "height": 30}, (30, 23)),
        ({"scale": 2.0, "width": 31, "height": 11}, (11, 31)),
    ],
)
def test_any_scale_and_size(nodes, tmp_path, asked, size):
    function, inputs = node(nodes, "UpscaleWithLIIF")
    assert set(asked) <= {*inputs["required"], *inputs["optional"]}
    (large,) = function(upscale_model=load(nodes), image=IMAGES, **asked)
    assert large.shape == (2, *size, 3) and large.is_contiguous()
    model = liif_fast.load(tmp_path / "upscale_models" / "small.safetensors")
    expected = liif_fast.upscale(IMAGES.permute(0, 3, 1, 2), size=size, model=model)
    assert torch.equal(large, expected.permute(0, 2, 3, 1))
    assert ProgressBar.seen[-1] == (2 * size[0] * size[1],) * 2


def test_the_default_model_and_comfyuis_own_node(nodes):
    descriptor = load(nodes, nodes.SHIPPED)
    out = descriptor(IMAGES[:1].permute(0, 3, 1, 2))  # what "Upscale Image (using Model)" calls
    assert out.shape == (1, 3, 9 * descriptor.scale, 7 * descriptor.scale)


def test_another_model_is_refused(nodes):
    function, _ = node(nodes, "UpscaleWithLIIF")
    other = module(architecture=module(name="ESRGAN"))
    with pytest.raises(ValueError, match="the model is a ESRGAN, not a LIIF"):
        function(upscale_model=other, image=IMAGES, scale=2.0)
