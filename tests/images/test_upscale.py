"""`upscale`: the result has the type of the input, options and wrong inputs get their reasons."""

import io
import platform

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from liif_fast.cli import demo
from liif_fast.images import upscaling
from liif_fast.images.picture import Description, ImageError, Picture
from liif_fast.images.upscaling import output_size, upscale
from liif_fast.models import checkpoints
from liif_fast.models import liif as liif_module
from liif_fast.utils import hardware, memory
from tests.helpers import needs_cpu, psnr
from tests.images.upscaling import SMALL, liif, photo, steps, untiled


def rgb_image():
    return Image.fromarray((photo(1, 11, 14)[0].permute(1, 2, 0).numpy() * 255).astype(np.uint8))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_tensors_keep_dtype_and_channels(dtype):
    model, images, limit = liif(), photo(1, 12, 9), 4e-3 if dtype.itemsize == 2 else 1e-6
    expected = untiled(model, images.to(dtype).float(), (24, 18))
    result = upscale(images.to(dtype).requires_grad_(), scale=2, model=model)
    assert result.dtype == dtype and not result.requires_grad
    assert (result.float() - expected).abs().max() <= limit
    gray = images[:, :1].to(dtype)
    as_rgb = untiled(model, gray.float().expand(1, 3, 12, 9), (24, 18))
    result = upscale(gray[0], scale=2, model=model)
    assert result.shape == (1, 24, 18) and result.dtype == dtype
    assert (result.float() - as_rgb[0].mean(0)).abs().max() <= limit


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
    floats = np.concatenate([floats, 0.01 + 0.99 * floats[::-1, :, :1]], -1)  # alpha above 0
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
    values = np.asarray(rgb_image())
    expected = upscale(values[::-1, ::2].copy(), scale=2, model=model)
    np.testing.assert_array_equal(upscale(values[::-1, ::2], scale=2, model=model), expected)
    np.testing.assert_array_equal(upscale(np.asfortranarray(values[::-1, ::2]), scale=2, model=model), expected)


@pytest.mark.parametrize("mode", ["L", "LA", "RGB", "RGBA", "I;16", "F"])
def test_pillow_images_keep_their_mode(mode):
    rgb = rgb_image()
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
    rgb = rgb_image()
    model = liif()
    for image, mode in ((rgb.quantize(8), "RGB"), (rgb.convert("CMYK"), "RGB"), (rgb.convert("1"), "L")):
        result = upscale(image, scale=2, model=model)
        assert result.mode == mode
        expected = upscale(np.asarray(image.convert(mode)), scale=2, model=model)
        np.testing.assert_array_equal(np.asarray(result), expected)
    palette = rgb.quantize(8)
    palette.info["transparency"] = 0
    result = upscale(palette, scale=2, model=model)
    assert result.mode == "RGBA" and "transparency" not in result.info


@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_orientation_is_applied(orientation):
    image, model = rgb_image(), liif()
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = orientation, "a description"
    file = io.BytesIO()
    image.save(file, "PNG", exif=exif)
    with Image.open(file) as opened:
        upright = ImageOps.exif_transpose(opened)
        result = upscale(opened, size=(20, 30), model=model)
    assert result.size == (30, 20) and result.getexif() == {0x010E: "a description"} | (
        {0x0112: 1} if orientation == 1 else {}
    )
    np.testing.assert_array_equal(np.asarray(result), upscale(np.asarray(upright), size=(20, 30), model=model))


def test_broken_exif_is_passed_over():
    image = rgb_image()
    image.info["exif"] = b"no exif at all"
    assert upscale(image, scale=2, model=liif()).size == (28, 22)


def test_pictures_keep_profile_and_exif():
    color = np.zeros((4, 5, 3), np.uint8)
    about = Description(b"profile", b"exif")
    result = upscale(Picture(color, color[..., 0], about), scale=3, model=liif())
    assert result.description == about
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
    # Pillow keeps a box in float32, so 1e-5 is too strict. A seam is a hundred times larger.
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
def test_16_bit_computation_stays_close(dtype, least, monkeypatch):
    monkeypatch.setattr(upscaling, "emulates", lambda *_: False)
    model, images = liif(hidden=(32, 32)), photo(1, 40, 30)
    exact = upscale(images, scale=2.7, model=model)
    result = upscale(images, scale=2.7, model=model, dtype=dtype, working_memory=400_000)
    assert result.dtype == torch.float32
    assert not torch.equal(result, exact)
    assert psnr(result, exact) > least


@pytest.mark.parametrize("dtype", ["bfloat16", torch.float16])
def test_an_emulated_dtype_is_replaced_once_said(dtype, monkeypatch, caplog):
    monkeypatch.setattr(upscaling, "emulates", lambda *_: True)
    upscaling._report_emulation.cache_clear()
    images = photo(1, 12, 9)
    expected = upscale(images, scale=2, model=liif())
    with caplog.at_level("INFO", "liif_fast"):
        results = [upscale(images, scale=2, model=liif(), dtype=dtype) for _ in range(2)]
    assert all(torch.equal(result, expected) for result in results)
    name = str(dtype).removeprefix("torch.")
    said = f"this processor has no {name} products and would emulate them slowly: float32 is used instead"
    assert [record.getMessage() for record in caplog.records] == [said]


@pytest.mark.parametrize(
    ("has", "dtype", "expected"),
    [({"avx2": True}, "bfloat16", True), ({"avx512_bf16": True}, "bfloat16", False), ({}, "float32", False),
     ({"amx_bf16": True}, "float16", True), ({"avx512_fp16": True}, "float16", False)],
)  # fmt: skip
def test_a_processor_without_products_emulates(has, dtype, expected, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: has, raising=False)
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    assert hardware.emulates(torch.device("cpu"), upscaling.DTYPES[dtype]) == expected
    assert not hardware.emulates(torch.device("meta"), upscaling.DTYPES[dtype])


def test_models_of_other_dtypes():
    images = photo(1, 12, 9)
    exact = upscale(images, scale=2, model=liif())
    assert (upscale(images, scale=2, model=liif().double()) - exact).abs().max() <= 1e-5
    assert psnr(upscale(images, scale=2, model=liif().bfloat16()), exact) > 30
    with pytest.raises(ValueError, match=r"dtype is float32, but the model's weights are torch\.bfloat16"):
        upscale(images, scale=2, model=liif().bfloat16(), dtype="float32")


def test_a_model_is_not_written_to(monkeypatch):
    """Not while it runs either, whatever a callback does with it."""
    model = liif().train()
    model.backend, model.feat = "reference", photo(1, 3, 3)
    before = {**vars(model)}

    def look(*_):
        assert all(value is before[name] for name, value in vars(model).items())
        assert all(module.training for module in model.modules()) and not torch.is_grad_enabled()
        with torch.enable_grad():
            model(photo(1, 3, 3), torch.zeros(1, 1, 2), torch.ones(1, 1, 2)).sum().backward()
        model.feat = before["feat"]

    images = photo(1, 20, 15)
    expected = upscale(images, scale=2, model=model, backend="reference", working_memory=SMALL)
    assert torch.equal(
        upscale(images, scale=2, model=model, backend="reference", working_memory=SMALL, progress=look), expected
    )
    assert all(parameter.requires_grad for parameter in model.imnet.parameters())

    def fail(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(model, "render", fail)
    with pytest.raises(KeyboardInterrupt):
        upscale(images, scale=2, model=model)
    assert all(module.training for module in model.modules()) and model.feat is before["feat"]
    assert torch.is_grad_enabled()


def test_inside_inference_mode():
    model = liif()
    with torch.inference_mode():
        images = photo(1, 12, 9)
        result = upscale(images, scale=2, model=model)
        assert torch.is_inference_mode_enabled()
    assert images.is_inference()
    assert (result - untiled(model, images, (24, 18))).abs().max() <= 1e-6


@needs_cpu
def test_the_first_layer_is_folded_once_per_tile(monkeypatch):
    folds, fold = [], liif_module.latent_map_for
    monkeypatch.setattr(liif_module, "latent_map_for", lambda *args, **more: folds.append(1) or fold(*args, **more))
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
    result = torch.from_numpy(np.asarray(upscale(small, size=size)) / 255.0)
    inside = (slice(scale + 6, -scale - 6),) * 2
    assert psnr(result[inside], truth[inside]) > psnr(bicubic[inside], truth[inside]) + 0.2


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
        (torch.zeros(3, 4, 4, dtype=torch.uint8), TypeError, "must hold floats, not torch.uint8"),
        (torch.zeros(4, 4), ValueError, r"\[C, H, W\] or \[B, C, H, W\], not \(4, 4\)"),
        (torch.zeros(2, 4, 4), ValueError, "takes images of 3 channels, but this one has 2"),
        (torch.zeros(3, 0, 4), ValueError, r"not \(3, 0, 4\)"),
        (torch.full((3, 4, 4), 255.0), ImageError, r"not 255\.\.255: rescale it, or give data_range=\(low, high\)"),
        (torch.full((3, 4, 4), float("nan")), ImageError, "nan"),
        (np.zeros((4, 4, 3), np.int32), TypeError, "must be uint8, uint16 or float, not int32"),
        (np.zeros((4, 4, 3), np.uint32), TypeError, "must be uint8, uint16 or float, not uint32"),
        (np.zeros((4, 4, 5), np.uint8), ValueError, "takes images of 3 channels, but this one has 5"),
        (np.zeros((0, 4, 3), np.uint8), ValueError, r"not \(0, 4, 3\)"),
        (np.zeros(4, np.uint8), ValueError, r"not \(4,\)"),
        (np.full((4, 4), -1.0), ImageError, r"not -1\.\.-1: rescale it, or give data_range=\(low, high\)"),
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
