"""`upscale`: the result has the input's type, tiles change nothing, memory is bounded, errors give the reason."""

import os
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import torch
from PIL import Image

from liif_fast.cli import demo
from liif_fast.images import tiles
from liif_fast.images.picture import ImageError, Picture
from liif_fast.images.tiles import Window
from liif_fast.images.upscaling import output_size, upscale
from liif_fast.models import checkpoints, make_model
from liif_fast.models import liif as liif_module
from liif_fast.utils import memory
from tests.helpers import psnr, reason_against

NEEDS_CPU = pytest.mark.skipif(
    bool(reason_against("cpu", "render", torch.float32)), reason=reason_against("cpu", "render", torch.float32) or "-"
)
WHOLE = 1 << 40  # working memory in which the image is one tile
SMALL = 100_000  # working memory for small tiles, with several rows per decoding step


def encoder_spec(name="edsr-baseline", **args):
    own = {"rcan": {"n_resgroups": 1, "reduction": 4}}.get(name, {})
    return {"name": name, "args": {"n_resblocks": 2, "n_feats": 8, "no_upsampling": True, **own, **args}}


def liif(encoder=None, hidden=(16, 16), **flags):
    imnet_spec = {"name": "mlp", "args": {"out_dim": 3, "hidden_list": list(hidden)}}
    return make("liif", encoder_spec=encoder or encoder_spec(), imnet_spec=imnet_spec, **flags)


def metasr():
    return make("metasr", encoder_spec=encoder_spec())


def nearest():
    return make("liif", encoder_spec=encoder_spec(no_upsampling=False, scale=2))


def make(name, **args):
    """A model whose outputs spread over [0, 1], so that errors are visible; those of new weights are nearly equal."""
    torch.manual_seed(3)
    model = make_model({"name": name, "args": args}).eval()
    with torch.no_grad():
        model.gen_feat(2 * photo(1, 24, 24) - 1)
        deviation, mean = torch.std_mean(model.render((48, 48)))
    div = 0.2 / deviation.item()
    model.data_norm = {"inp": {"sub": [0.5], "div": [0.5]}, "gt": {"sub": [0.5 - mean.item() * div], "div": [div]}}
    return model


def photo(batch, height, width, seed=0):
    return torch.rand(batch, 3, height, width, generator=torch.Generator().manual_seed(seed))


def untiled(model, images, size):
    """The whole image at once, by the model's own methods."""
    sub, div, out_sub, out_div = (
        torch.tensor(model.data_norm[side][key]).view(-1, 1, 1) for side in ("inp", "gt") for key in ("sub", "div")
    )
    with torch.no_grad():
        model.gen_feat((images - sub) / div)
        return (model.render(size) * out_div + out_sub).clamp(0, 1)


def steps(image, **options):
    """In how many steps an image is upscaled."""
    calls = []
    upscale(image, progress=lambda done, total: calls.append((done, total)), **options)
    assert [done for done, _ in calls] == sorted({done for done, _ in calls})
    assert calls[-1][0] == calls[-1][1]
    return len(calls)


MODELS = {
    "edsr": liif,
    "rcan": lambda: liif(encoder_spec("rcan")),
    "single-corner": lambda: liif(local_ensemble=False),
    "no-unfold": lambda: liif(feat_unfold=False),
    "no-cell": lambda: liif(cell_decode=False),
    "metasr": metasr,
    "nearest": nearest,
}


@pytest.mark.parametrize(
    ("name", "scale"),
    [*((name, 2.7) for name in MODELS), *(("edsr", scale) for scale in ((3, 2), 0.5, 1, (0.37, 5.3))),
     *((name, scale) for name in ("metasr", "nearest") for scale in ((3, 2), 0.5))],
)  # fmt: skip
def test_tiles_change_nothing(name, scale):
    model, images = MODELS[name](), photo(1, 67, 43)
    size = output_size((67, 43), scale=scale)
    expected = untiled(model, images, size)
    assert expected.std() > 0.05
    result = upscale(images, scale=scale, model=model, working_memory=SMALL)
    assert result.shape == (1, 3, *size)
    assert (result - expected).abs().max() <= 1e-5


@pytest.mark.parametrize(("name", "size"), [("edsr", (1200, 4)), ("edsr", (4, 1200)), ("metasr", (1200, 4))])
def test_tiles_of_long_images(name, size):
    """Many tiles, and coordinates with the coarsest last bit."""
    model, images = MODELS[name](), photo(1, *size)
    whole = upscale(images, scale=3, model=model, working_memory=WHOLE)
    assert (upscale(images, scale=3, model=model, working_memory=SMALL) - whole).abs().max() <= 1e-5


def test_tiles_of_a_wide_receptive_field():
    model, images = liif(encoder_spec(n_resblocks=60, n_feats=4)), photo(1, 4, 300)
    assert model.encoder.halo > 100
    done = []
    result = upscale(images, scale=1, model=model, working_memory=SMALL, progress=lambda *pixels: done.append(pixels))
    assert len(done) > 1
    assert (result - untiled(model, images, (4, 300))).abs().max() <= 1e-5


def test_less_memory_means_more_steps():
    model, images = liif(), photo(1, 130, 100)
    counts = [steps(images, scale=1, model=model, working_memory=memory) for memory in (WHOLE, 2_000_000, SMALL)]
    assert counts[0] == 1 < counts[1] < counts[2]


@pytest.mark.parametrize(
    ("size", "latents", "halo", "area"),
    [
        ((100, 90), (50, 45), 5, 1),
        ((7, 2000), (7, 2000), 18, 3000),
        ((2000, 7), (4000, 14), 3, 500),
        ((3, 2), (300, 200), 4, 900),
        ((641, 479), (64, 48), None, 1),
        ((64, 48), (64, 48), 10, 64 * 48),
    ],
)
def test_windows_cover_the_output_once(size, latents, halo, area):
    covered = np.zeros(size, int)
    windows = tiles.plan(size, latents, halo=halo, area=area)
    for top, left, height, width in windows:
        assert height > 0 and width > 0
        covered[top : top + height, left : left + width] += 1
    assert (covered == 1).all()
    if halo is None or latents[0] * latents[1] <= area:
        assert windows == [Window(0, 0, *size)]


def test_tiles_are_whole_rows_if_memory_allows():
    windows = tiles.plan((400, 400), (200, 200), halo=10, area=200 * 70)
    assert windows == [Window(top, 0, 100, 400) for top in range(0, 400, 100)]
    assert {window.width < 4000 for window in tiles.plan((400, 4000), (200, 2000), halo=10, area=200 * 70)} == {True}


def test_a_batch_is_its_images():
    model, images = liif(), photo(2, 19, 23)
    both = upscale(images, scale=1.7, model=model, working_memory=100_000)
    for index in range(2):
        alone = upscale(images[index], scale=1.7, model=model)
        assert alone.shape == (3, 32, 39)
        assert (both[index] - alone).abs().max() <= 1e-6


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_tensors_keep_dtype_and_channels(dtype):
    model, images = liif(), photo(1, 12, 9)
    expected = untiled(model, images.to(dtype).float(), (24, 18))
    result = upscale(images.to(dtype).requires_grad_(), scale=2, model=model)
    assert result.dtype == dtype and not result.requires_grad
    assert (result.float() - expected).abs().max() <= (1e-6 if dtype in (torch.float32, torch.float64) else 4e-3)
    gray = images[:, :1].to(dtype)
    as_rgb = untiled(model, gray.float().expand(1, 3, 12, 9), (24, 18))
    result = upscale(gray[0], scale=2, model=model)
    assert result.shape == (1, 24, 18) and result.dtype == dtype
    assert (result.float() - as_rgb[0].mean(0)).abs().max() <= (
        1e-6 if dtype in (torch.float32, torch.float64) else 4e-3
    )


def test_strided_tensors():
    model, images = liif(), photo(1, 12, 9)
    expected = upscale(images, scale=2, model=model)
    turned = images.permute(0, 3, 2, 1).contiguous().permute(0, 3, 2, 1)
    assert torch.equal(upscale(turned, scale=2, model=model), expected)
    expanded = upscale(images.expand(2, -1, -1, -1), scale=2, model=model)
    assert (expanded[1:] - expected).abs().max() <= 1e-6


@pytest.mark.parametrize(
    ("dtype", "channels"),
    [*(("uint8", channels) for channels in (None, 1, 2, 3, 4)), ("uint16", 4), (">u2", 3), (">u2", 2), ("float16", 4),
     ("float32", None), ("float32", 4), ("float64", 3), ("float64", 2)],
)  # fmt: skip
def test_arrays_keep_type_and_channels(channels, dtype):
    model = liif()
    floats = photo(1, 11, 14)[0].permute(1, 2, 0).numpy()
    floats = np.concatenate([floats, floats[::-1, :, :1]], -1)
    values = floats[..., 0] if channels is None else floats[..., :channels]
    kind, largest = np.dtype(dtype).kind, 1 if "f" in dtype else np.iinfo(dtype).max
    values = (values * largest).round().astype(dtype) if kind == "u" else values.astype(dtype)
    values.flags.writeable = False
    result = upscale(values, size=(23, 17), model=model)
    assert result.shape == (23, 17, *values.shape[2:])
    assert result.dtype == np.dtype(dtype).newbyteorder("=") or result.dtype == np.dtype(dtype)

    color = values.astype(np.float32) / largest
    color = color[..., None] if channels is None else color[..., : 3 if channels > 2 else 1]
    tensor = torch.from_numpy(np.ascontiguousarray(color)).permute(2, 0, 1)[None].expand(-1, 3, -1, -1)
    expected = untiled(model, tensor, (23, 17))[0]
    expected = expected if color.shape[2] == 3 else expected.mean(0, keepdim=True)
    found = result[..., None] if channels is None else result[..., : color.shape[2]]
    error = np.abs(found.astype(np.float64) / largest - expected.permute(1, 2, 0).numpy())
    assert error.max() <= {"uint8": 0.501 / 255, "float16": 5e-4}.get(dtype, 1e-5)
    if channels in (2, 4):
        alpha = Image.fromarray(values[..., -1].astype(np.float32) / largest).resize((17, 23), Image.Resampling.BICUBIC)
        error = np.abs(result[..., -1].astype(np.float64) / largest - np.clip(np.asarray(alpha), 0, 1))
        assert error.max() <= {"uint8": 0.501 / 255, "float16": 5e-4}.get(dtype, 1e-5)


def test_arrays_of_any_strides():
    model = liif()
    values = (photo(1, 11, 14)[0].permute(1, 2, 0).numpy() * 255).astype(np.uint8)
    expected = upscale(values[::-1, ::2].copy(), scale=2, model=model)
    np.testing.assert_array_equal(upscale(values[::-1, ::2], scale=2, model=model), expected)
    np.testing.assert_array_equal(upscale(np.asfortranarray(values[::-1, ::2]), scale=2, model=model), expected)


@pytest.mark.parametrize("mode", ["L", "LA", "RGB", "RGBA", "I;16", "F"])
def test_pillow_images_keep_their_mode(mode):
    rgb = Image.fromarray((photo(1, 11, 14)[0].permute(1, 2, 0).numpy() * 255).astype(np.uint8))
    if mode == "I;16":
        image = Image.fromarray(np.asarray(rgb.convert("L")).astype(np.uint16) * 257)
    elif mode == "F":
        image = Image.fromarray(np.asarray(rgb.convert("L")).astype(np.float32) / 255)
    else:
        image = rgb.convert(mode)
    image.info["dpi"] = (72, 72)
    result = upscale(image, scale=2, model=liif())
    assert (result.mode, result.size) == (mode, (28, 22))
    assert result.info["dpi"] == (72, 72)
    values = np.asarray(image)
    np.testing.assert_array_equal(np.asarray(result), upscale(values, scale=2, model=liif()))


def test_other_pillow_modes_become_rgb_or_gray():
    rgb = Image.fromarray((photo(1, 11, 14)[0].permute(1, 2, 0).numpy() * 255).astype(np.uint8))
    model = liif()
    for image, mode in ((rgb.quantize(8), "RGB"), (rgb.convert("CMYK"), "RGB"), (rgb.convert("1"), "L")):
        result = upscale(image, scale=2, model=model)
        assert result.mode == mode
        np.testing.assert_array_equal(
            np.asarray(result), upscale(np.asarray(image.convert(mode)), scale=2, model=model)
        )
    palette = rgb.quantize(8)
    palette.info["transparency"] = 0
    result = upscale(palette, scale=2, model=model)
    assert result.mode == "RGBA" and "transparency" not in result.info


def test_pictures_keep_profile_and_exif():
    color = np.zeros((4, 5, 3), np.uint8)
    result = upscale(Picture(color, color[..., 0], b"profile", b"exif"), scale=3, model=liif())
    assert (result.icc_profile, result.exif) == (b"profile", b"exif")
    assert (result.color.shape, result.alpha.shape) == ((12, 15, 3), (12, 15))


def test_opaque_alpha_stays_opaque():
    for dtype, largest in ((np.uint8, 255), (np.uint16, 65535), (np.float32, 1)):
        image = np.full((9, 7, 4), largest, dtype)
        for scale in (2.7, 0.5):
            assert (upscale(image, scale=scale, model=liif())[..., 3] == largest).all()


@pytest.mark.parametrize(("height", "width", "scale"), [(300, 3, 2.7), (7, 5, 90), (900, 4, 0.6)])
def test_alpha_has_no_seams(height, width, scale):
    alpha = np.random.default_rng(0).random((height, width)).astype(np.float32)
    rows, cols = output_size((height, width), scale=scale)
    result = upscale(np.stack([alpha, alpha], -1), scale=scale, model=liif())[..., 1]
    expected = Image.fromarray(alpha).resize((cols, rows), Image.Resampling.BICUBIC)
    # Pillow keeps a box in float32, hence not 1e-5; a seam would be a hundred times more.
    assert np.abs(result - np.clip(np.asarray(expected), 0, 1)).max() <= 1e-4


def test_normalization_of_the_model_is_applied():
    model, images = liif(), photo(1, 12, 9)
    model.data_norm = {
        "inp": {"sub": [0.4488, 0.4371, 0.404], "div": [1.0, 0.9, 0.8]},
        "gt": {"sub": [0.3, 0.5, 0.7], "div": [0.2, 0.1, 0.05]},
    }
    result = upscale(images, scale=2, model=model)
    assert (result - untiled(model, images, (24, 18))).abs().max() <= 1e-6
    default = upscale(images, scale=2, model=liif())
    assert (result - default).abs().max() > 0.05


def test_results_are_clipped():
    model = liif()
    model.data_norm["gt"] = {"sub": [0.5], "div": [100.0]}
    result = upscale(photo(1, 12, 9), scale=2, model=model)
    assert result.min() == 0 and result.max() == 1


@pytest.mark.parametrize(("dtype", "least"), [("bfloat16", 30), (torch.float16, 45)])
def test_16_bit_computation_stays_close(dtype, least):
    model, images = liif(hidden=(32, 32)), photo(1, 40, 30)
    exact = upscale(images, scale=2.7, model=model)
    result = upscale(images, scale=2.7, model=model, dtype=dtype, working_memory=400_000)
    assert result.dtype == torch.float32
    assert not torch.equal(result, exact)
    assert psnr(result, exact) > least


def test_models_of_other_dtypes():
    images = photo(1, 12, 9)
    exact = upscale(images, scale=2, model=liif())
    assert (upscale(images, scale=2, model=liif().double()) - exact).abs().max() <= 1e-5
    assert psnr(upscale(images, scale=2, model=liif().bfloat16()), exact) > 30
    with pytest.raises(ValueError, match=r"dtype is float32, but the model's weights are torch\.bfloat16"):
        upscale(images, scale=2, model=liif().bfloat16(), dtype="float32")


def test_a_model_is_restored(monkeypatch):
    model = liif().train()
    model.backend = "reference"
    upscale(photo(1, 6, 5), scale=2, model=model, backend="reference")
    assert model.training and model.backend == "reference" and model.feat is None
    assert all(parameter.requires_grad for parameter in model.imnet.parameters())

    def fail(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(model, "render", fail)
    with pytest.raises(KeyboardInterrupt):
        upscale(photo(1, 6, 5), scale=2, model=model)
    assert model.training and model.feat is None
    assert torch.is_grad_enabled()


def test_inside_inference_mode():
    model = liif()
    with torch.inference_mode():
        images = photo(1, 12, 9)
        result = upscale(images, scale=2, model=model)
        assert torch.is_inference_mode_enabled()
    assert images.is_inference()
    assert (result - untiled(model, images, (24, 18))).abs().max() <= 1e-6


@NEEDS_CPU
def test_the_first_layer_is_folded_once_per_tile(monkeypatch):
    folds, fold = [], liif_module.latent_map_for
    monkeypatch.setattr(
        liif_module, "latent_map_for", lambda *args, **options: folds.append(1) or fold(*args, **options)
    )
    model = liif()
    with torch.inference_mode():
        count = steps(photo(1, 20, 200), scale=(8, 1), model=model, working_memory=SMALL, backend="cpu")
    assert count > 2 * len(folds) > 0


def test_models_by_path(tmp_path):
    model, image = liif(), photo(1, 6, 5)
    checkpoints.save(model, tmp_path / "model.safetensors")
    expected = upscale(image, scale=2, model=model)
    assert torch.equal(upscale(image, scale=2, model=tmp_path / "model.safetensors"), expected)
    assert torch.equal(upscale(image, scale=2, model=str(tmp_path / "model.safetensors"), device="cpu"), expected)


@pytest.mark.parametrize("scale", [2, 3, 4])
def test_the_shipped_model_is_better_than_bicubic(scale):
    photo = Image.open(demo.PHOTO)
    small = photo.resize((photo.width // scale, photo.height // scale), Image.Resampling.BICUBIC)
    truth = torch.from_numpy(np.asarray(photo.resize((small.width * scale, small.height * scale))) / 255.0)
    size = truth.shape[:2]
    bicubic = torch.from_numpy(np.asarray(small.resize(size[::-1], Image.Resampling.BICUBIC)) / 255.0)
    inside = slice(scale + 6, -scale - 6)
    result = torch.from_numpy(np.asarray(upscale(small, size=size)) / 255.0)
    assert (
        psnr(result[inside, inside], truth[inside, inside]) > psnr(bicubic[inside, inside], truth[inside, inside]) + 0.2
    )


@pytest.mark.parametrize(
    ("side", "scale", "expected"),
    [(10, 2.7, 27), (10, 0.01, 1), (3, 1.5, 4), (5, 0.5, 2), (1, 1e-9, 1), (1000, 3, 3000), (7, 1 / 7, 1)],
)
def test_output_size(side, scale, expected):
    assert output_size((side, 2), scale=scale)[0] == expected
    assert output_size((2, side), scale=(1, np.float32(scale)))[1] == expected
    assert output_size((side, side), size=(5, 6)) == (5, 6)


@pytest.mark.parametrize("scale", [0, -1, float("nan"), float("inf"), -float("inf"), 1e30, (2, 0), (1, float("nan"))])
def test_scales_that_are_refused(scale):
    with pytest.raises(ValueError, match="but must be a positive number with a result of fewer than"):
        output_size((10, 10), scale=scale)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "give exactly one of scale and size"),
        ({"scale": 2, "size": (3, 3)}, "give exactly one of scale and size"),
        ({"scale": "2"}, "scale is '2', but must be a number"),
        ({"scale": (1, 2, 3)}, r"scale is \(1, 2, 3\), but must be a number or one each"),
        ({"size": (0, 3)}, r"size is \(0, 3\), but must be \(rows, columns\)"),
        ({"size": (2.5, 3)}, r"size is \(2\.5, 3\)"),
        ({"size": (3,)}, r"size is \(3,\)"),
        ({"size": (float("nan"), 3)}, "size is"),
        ({"scale": 2, "backend": "gpu"}, "backend is 'gpu', but must be one of"),
        ({"scale": 2, "dtype": "int8"}, "dtype is 'int8', but must be one of float32, bfloat16, float16"),
        ({"scale": 2, "dtype": torch.float64}, "dtype is torch.float64"),
        ({"scale": 2, "device": "nonsense"}, "device 'nonsense' cannot be used here"),
        ({"scale": 2, "device": "cuda:99"}, "device 'cuda:99' cannot be used here"),
    ],
)
def test_options_that_are_refused(options, message):
    model = liif()
    for image in (photo(1, 4, 4), np.zeros((4, 4, 3), np.uint8)):
        with pytest.raises(ValueError, match=message):
            upscale(image, **{"model": model, **options})


@pytest.mark.parametrize(
    ("image", "error", "message"),
    [
        ([[1, 2]], TypeError, "must be a Pillow image, a numpy array or a tensor, not list"),
        (torch.zeros(3, 4, 4, dtype=torch.uint8), TypeError, r"floats in \[0, 1\], not torch.uint8"),
        (torch.zeros(4, 4), ValueError, r"\[C, H, W\] or \[B, C, H, W\] with C = 1 or 3, not \(4, 4\)"),
        (torch.zeros(2, 4, 4), ValueError, r"not \(2, 4, 4\)"),
        (torch.zeros(3, 0, 4), ValueError, r"not \(3, 0, 4\)"),
        (torch.full((3, 4, 4), 255.0), ValueError, r"not 255\.\.255: rescale"),
        (torch.full((3, 4, 4), float("nan")), ValueError, "nan"),
        (np.zeros((4, 4, 3), np.int32), TypeError, "must be uint8, uint16 or float, not int32"),
        (np.zeros((4, 4, 5), np.uint8), ValueError, r"C = 1, 2, 3 or 4, not \(4, 4, 5\)"),
        (np.zeros((0, 4, 3), np.uint8), ValueError, r"not \(0, 4, 3\)"),
        (np.zeros(4, np.uint8), ValueError, r"not \(4,\)"),
        (np.full((4, 4), -1.0), ImageError, r"holds -1\.\.-1"),
        (np.full((4, 4), np.inf), ImageError, "inf"),
    ],
)
def test_images_that_are_refused(image, error, message):
    with pytest.raises(error, match=message):
        upscale(image, scale=2, model=liif())


def test_models_that_are_refused(tmp_path):
    with pytest.raises(TypeError, match="must have an encoder and render, as LIIF and MetaSR do, not Linear"):
        upscale(photo(1, 4, 4), scale=2, model=torch.nn.Linear(2, 2))
    with pytest.raises(TypeError, match="not int"):
        upscale(photo(1, 4, 4), scale=2, model=3)
    with pytest.raises(FileNotFoundError, match="nothere"):
        upscale(photo(1, 4, 4), scale=2, model=tmp_path / "nothere.pth")


def test_results_beyond_memory_are_refused(monkeypatch):
    with pytest.raises(memory.NotEnoughMemory, match="400000000x400000000 pixels needs about 480 PB of memory, but"):
        upscale(np.zeros((4, 4, 3), np.uint8), scale=1e8, model=liif())
    monkeypatch.setattr(memory, "available", lambda: 1000)
    with pytest.raises(MemoryError, match=r"A result of 20x20 pixels needs about 4\.8 kB of memory, but 1 kB are"):
        upscale(photo(1, 10, 10), scale=2, model=liif())
    monkeypatch.setattr(memory, "available", lambda: None)
    upscale(photo(1, 10, 10), scale=2, model=liif())


@NEEDS_CPU
@pytest.mark.parametrize(
    ("side", "scale", "working_memory", "limit", "counts_python"),
    [
        (384, 1, 32 << 20, 100e6, False),  # 211 MB without tiles
        pytest.param(1024, 4, tiles.DEFAULT_MEMORY, 1.5e9, True, marks=pytest.mark.prove),  # a megapixel enlarged by 4
    ],
)
def test_memory_is_bounded(side, scale, working_memory, limit, counts_python):
    """The peak of a process with the shipped model, input and result, with or without Python and PyTorch."""
    script = textwrap.dedent(
        f"""
        import resource, numpy, torch
        from liif_fast import load, upscale

        def peak():
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

        torch.set_num_threads(2)
        model = load()
        image = numpy.random.default_rng(0).integers(0, 256, ({side}, {side}, 3), dtype=numpy.uint8)
        upscale(image[:16, :16], scale={scale}, model=model, backend="cpu")
        before = 0 if {counts_python} else peak()
        upscale(image, scale={scale}, model=model, backend="cpu", working_memory={working_memory})
        print(peak() - before)
        """
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "2"}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment, timeout=600)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < limit
