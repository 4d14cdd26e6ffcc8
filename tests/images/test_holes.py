"""Pixels without a value: colors under alpha 0, and NaN in data."""

import numpy as np
import pytest
import torch
from PIL import Image

from liif_fast.images.fill import fill_from_nearest
from liif_fast.images.upscaling import upscale
from tests.images.upscaling import SMALL, WHOLE, liif, photo
from tests.models.test_n_colors import model_of


def brute_force(values, valid, reach):
    out = np.where(valid, values, 0.0)
    rows, cols = np.nonzero(valid)
    for row, col in np.argwhere(~valid):
        near = (abs(rows - row) <= reach) & (abs(cols - col) <= reach)
        if near.any():
            distance = np.where(near, (rows - row) ** 2 + (cols - col) ** 2, 1 << 30)
            best = np.argmin(distance)  # the first in order of rows, then columns
            out[row, col] = values[rows[best], cols[best]]
    return out


@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 9), (13, 1), (11, 14)])
@pytest.mark.parametrize("reach", [0, 1, 3, 30])
@pytest.mark.parametrize("share", [0, 0.02, 0.1, 0.7, 1])
def test_the_nearest_value_is_taken(height, width, reach, share):
    rng = np.random.default_rng(0)
    values = rng.random((2, 3, height, width))
    for planes in (1, 3):
        valid = rng.random((2, planes, height, width)) < share
        holes = np.where(valid, values, np.nan)
        found = fill_from_nearest(torch.from_numpy(holes), torch.from_numpy(valid), reach)
        for batch in range(2):
            for channel in range(3):
                plane = valid[batch, channel % planes]
                expected = brute_force(values[batch, channel], plane, reach)
                assert np.array_equal(found[batch, channel].numpy(), expected)


def sprite(mode, hidden, dtype=np.uint8):
    """A disk with a soft edge, whose invisible pixels have the color `hidden`, of 255."""
    row, col = np.mgrid[0:40, 0:33] + 0.5
    alpha = np.clip(12.5 - np.hypot(row - 20, col - 16), 0, 1)
    color = np.where(alpha[..., None] > 0, np.stack([row * 6, col * 7, row + col], -1), hidden) / 255
    samples = np.dstack([color[..., :1] if mode == "LA" else color, alpha])
    return (samples if dtype == np.float32 else np.rint(samples * np.iinfo(dtype).max)).astype(dtype)


@pytest.mark.parametrize(
    ("mode", "dtype", "scale", "working_memory"),
    [("RGBA", np.uint8, 2.7, WHOLE), ("RGBA", np.uint8, 0.6, SMALL), ("RGBA", np.uint16, 1.3, SMALL),
     ("RGBA", np.float32, 1.3, WHOLE), ("LA", np.uint8, 1.3, WHOLE)],
)  # fmt: skip
def test_invisible_colors_have_no_influence(mode, dtype, scale, working_memory):
    model = liif()
    results = [
        upscale(sprite(mode, hidden, dtype), scale=scale, model=model, working_memory=working_memory)
        for hidden in (0, 255, 90)
    ]
    assert all(np.array_equal(result, results[0]) for result in results)
    assert 0 < (results[0][..., -1] == 0).mean() < 1


def test_a_hole_takes_the_color_next_to_it():
    """The result is that of the picture filled by hand; tiles find the same colors."""
    model, image = liif(), sprite("RGBA", 0, np.float32)
    valid = torch.from_numpy(image[..., 3] > 0)[None, None]
    filled = fill_from_nearest(torch.from_numpy(image[..., :3]).permute(2, 0, 1)[None], valid, 60)
    expected = upscale(filled, scale=2, model=model)[0].permute(1, 2, 0).numpy()
    for working_memory in (SMALL, WHOLE):
        result = upscale(image, scale=2, model=model, working_memory=working_memory)
        visible = result[..., 3] > 0
        assert np.abs(result[..., :3] - expected)[visible].max() <= 1e-5


def test_palettes_and_animations():
    opaque = Image.fromarray(sprite("RGBA", 0)[..., :3]).quantize(16)
    results = []
    for hidden in (0, 255):
        image = opaque.copy()
        image.putpalette([hidden, 255 - hidden, hidden, *opaque.getpalette()[3:]])
        image.info["transparency"] = 0
        results.append(np.asarray(upscale(image, scale=2, model=liif())))
    assert results[0].shape[2] == 4 and np.array_equal(*results)


def fields(channels, height=31, width=26):
    """Data of several units, [H, W, C]."""
    unit = photo(1, height, width).repeat(1, 2, 1, 1)[0, :channels].permute(1, 2, 0).double().numpy()
    return unit * 40 + 250


@pytest.mark.parametrize("channels", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("as_tensor", [False, True])
def test_data_of_any_channels_and_range(channels, as_tensor):
    """data_range is a change of units: no channel is alpha, and nothing is clipped."""
    model, values = model_of(channels), fields(channels)
    plain = torch.from_numpy((values - 250) / 40).permute(2, 0, 1)[None]
    model.feat = None
    twin = model.encode((plain.float() - 0.5) / 0.5)
    with torch.no_grad():
        expected = (twin.render((62, 39)) * 0.5 + 0.5).double()[0].permute(1, 2, 0).numpy() * 40 + 250
    given = torch.from_numpy(values).permute(2, 0, 1) if as_tensor else values
    result = upscale(given, size=(62, 39), model=model, data_range=(250, 290), working_memory=SMALL)
    assert result.dtype == given.dtype
    result = result.permute(1, 2, 0).numpy() if as_tensor else result
    assert np.abs(result - expected).max() < 1e-3
    # Values beyond the range are not clipped: another range is another unit, with a model that does not depend on it.
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        model.imnet.layers[-1].bias.fill_(7)
    result = upscale(given, scale=2, model=model, data_range=(0, 1))
    assert np.allclose(np.asarray(result), 4)


def test_one_channel_of_data_with_a_model_of_three():
    model, values = liif(), fields(1)[..., 0]
    result = upscale(values.astype(np.float32), scale=2, model=model, data_range=(250, 290))
    gray = upscale(((values - 250) / 40).astype(np.float32), scale=2, model=model)
    inside = (gray > 0) & (gray < 1)
    assert result.shape == (62, 52) and np.abs(result - (gray * 40 + 250))[inside].max() < 1e-3
    heights = (values * 7).astype(np.int16)
    result = upscale(heights, scale=2, model=model, data_range=(1750, 2030))
    assert result.dtype == np.int16 and np.abs(result - 7 * (gray * 40 + 250))[inside].max() < 9


def test_the_normalization_of_the_model_is_a_range_too():
    values = fields(2)
    model = model_of(2)
    expected = upscale(values, scale=1.5, model=model, data_range=(250, 290))
    model.data_norm = {side: {"sub": [270.0, 270.0], "div": [20.0, 20.0]} for side in ("inp", "gt")}
    assert np.allclose(upscale(values, scale=1.5, model=model), expected, atol=1e-3)
    tensor = torch.from_numpy(values).permute(2, 0, 1)[None]
    assert np.allclose(upscale(tensor, scale=1.5, model=model)[0].permute(1, 2, 0), expected, atol=1e-3)


@pytest.mark.parametrize("as_tensor", [False, True])
@pytest.mark.parametrize("size", [(70, 41), (20, 60)])
def test_missing_data_stays_missing(as_tensor, size):
    """Outputs nearest to NaN are NaN, channel by channel; the others are those of the filled field."""
    model, values = model_of(2), fields(2)
    values[5:12, 3:9, 0] = values[20:, :, :] = np.nan
    valid = ~np.isnan(values)
    given = torch.from_numpy(values).permute(2, 0, 1) if as_tensor else values
    filled = fill_from_nearest(
        torch.from_numpy(values).permute(2, 0, 1)[None], torch.from_numpy(valid).permute(2, 0, 1)[None], 40
    )
    expected = upscale(filled[0], size=size, model=model, data_range=(250, 290)).permute(1, 2, 0).numpy()
    rows, cols = (
        np.floor((np.arange(count) + 0.5) * length / count).astype(int)
        for count, length in zip(size, values.shape, strict=False)
    )
    for working_memory in (SMALL // 4, WHOLE):
        result = upscale(given, size=size, model=model, data_range=(250, 290), working_memory=working_memory)
        result = result.permute(1, 2, 0).numpy() if as_tensor else result
        assert np.array_equal(np.isnan(result), ~valid[rows][:, cols])
        known = ~np.isnan(result)
        assert np.abs(result - expected)[known].max() < 1e-3


def test_data_without_any_value():
    result = upscale(np.full((5, 4, 3), np.nan), scale=2, model=liif(), data_range=(0, 5))
    assert np.isnan(result).all()


@pytest.mark.parametrize(
    ("image", "data_range", "error", "message"),
    [
        (np.full((4, 4, 3), np.inf), (0, 1), ValueError, "holds infinite numbers: replace them"),
        (torch.full((3, 4, 4), -np.inf), (0, 1), ValueError, "holds infinite numbers: replace them"),
        (np.zeros((4, 4, 4)), (0, 1), ValueError, "takes images of 3 channels, but this one has 4"),
        (np.zeros((4, 4, 2)), (0, 1), ValueError, "takes images of 3 channels, but this one has 2"),
        (np.zeros((4, 4, 3), complex), (0, 1), TypeError, "not complex128"),
        (np.zeros((4, 4, 3)), (1, 1), ValueError, r"data_range is \(1, 1\), but must be two numbers"),
        (np.zeros((4, 4, 3)), (0, np.inf), ValueError, "data_range is"),
        (np.zeros((4, 4, 3)), (np.nan, 1), ValueError, "data_range is"),
        (np.zeros((4, 4, 3)), (1,), ValueError, "data_range is"),
        (Image.new("RGB", (4, 4)), (0, 255), TypeError, "data_range is for arrays and tensors, not for a Image"),
    ],
)
def test_data_that_is_refused(image, data_range, error, message):
    with pytest.raises(error, match=message):
        upscale(image, scale=2, model=liif(), data_range=data_range)


def test_pictures_with_alpha_for_a_model_of_four_channels():
    """A model that was trained on RGBA takes alpha as its fourth channel, of arrays and of Pillow images."""
    model, image = model_of(4), sprite("RGBA", 90)
    expected = upscale(torch.from_numpy(image / 255.0).permute(2, 0, 1), scale=2, model=model).permute(1, 2, 0) * 255
    for given in (image, Image.fromarray(image)):
        assert np.abs(np.asarray(upscale(given, scale=2, model=model)) - expected.numpy()).max() <= 0.51
