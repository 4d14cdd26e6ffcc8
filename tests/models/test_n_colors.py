"""Images of one and four channels, from the file through training to the enlarged picture and the table."""

import numpy as np
import pytest
import torch
from PIL import Image

from liif_fast import data, upscale
from liif_fast.cli import main as cli
from liif_fast.evaluation import predict
from liif_fast.models import checkpoints, make_model


def model_of(n_colors, name="liif"):
    encoder = {"n_resblocks": 1, "n_feats": 4, "no_upsampling": True, "n_colors": n_colors}
    args = {"encoder_spec": {"name": "edsr-baseline", "args": encoder}}
    if name == "liif":
        args["imnet_spec"] = {"name": "mlp", "args": {"out_dim": n_colors, "hidden_list": [8]}}
    torch.manual_seed(n_colors)
    return make_model({"name": name, "args": args}).eval()


@pytest.fixture
def folder(tmp_path):
    images = tmp_path / "images"
    images.mkdir()
    rng = np.random.default_rng(0)
    for index in range(2):
        small = Image.fromarray(rng.integers(0, 256, (6, 8, 4), dtype=np.uint8))
        small.resize((40, 32), Image.Resampling.BICUBIC).save(images / f"{index}.png")
    return images


@pytest.mark.parametrize(("n_colors", "name"), [(1, "liif"), (4, "liif"), (1, "metasr"), (4, "metasr")])
def test_a_model_learns_and_is_saved(folder, tmp_path, n_colors, name):
    model = model_of(n_colors, name).train()
    section = {
        "dataset": {"name": "image-folder", "args": {"root_path": str(folder), "repeat": 8, "n_colors": n_colors}},
        "wrapper": {"name": "sr-implicit-downsampled", "args": {"inp_size": 8, "scale_min": 2, "sample_q": 80}},
        "batch_size": 4,
    }
    optimizer = torch.optim.Adam([each for each in model.parameters() if each.requires_grad], lr=1e-2)
    losses = []
    for epoch in range(2):
        for batch in data.make_loader(section, shuffle=True).epoch(epoch):
            assert batch["inp"].shape == (4, n_colors, 8, 8)
            loss = (model(batch["inp"] * 2 - 1, batch["coord"], batch["cell"]) - (batch["gt"] * 2 - 1)).abs().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    assert losses[-1] < losses[0]
    checkpoints.save(model.eval(), tmp_path / "model.safetensors")
    low = data.read_pixels(folder / "0.png", n_colors)
    again = predict(checkpoints.load(tmp_path / "model.safetensors"), low, (48, 60))
    assert again.shape == (n_colors, 48, 60) and torch.equal(again, predict(model, low, (48, 60)))


def test_a_gray_model_enlarges_gray_images(folder):
    model = model_of(1)
    gray = Image.open(folder / "0.png").convert("L")
    result = upscale(gray, scale=1.5, model=model)
    expected = predict(model, np.asarray(gray)[..., None], (48, 60))[0] * 255
    assert result.mode == "L" and np.abs(np.asarray(result) - expected.numpy()).max() <= 0.51
    tensor = data.to_tensor(np.asarray(gray)[..., None])
    assert torch.allclose(upscale(tensor, scale=1.5, model=model)[0] * 255, expected, atol=1e-3)
    with pytest.raises(ValueError, match="takes images of 1 channels, but this one has 3"):
        upscale(gray.convert("RGB"), scale=2, model=model)


def test_tables_of_gray_images(folder, tmp_path, capsys):
    for n_colors in (1, 3):
        checkpoints.save(model_of(n_colors), tmp_path / f"{n_colors}.safetensors")
    out = str(tmp_path / "out")
    arguments = ["evaluate", "--images", str(folder), "--out", out, "--scales", "2", "--n-colors", "1"]
    assert cli.main([*arguments, "--model", f"gray={tmp_path / '1.safetensors'}"]) == 0
    assert (tmp_path / "out" / "scores.csv").read_text().count("\n") == 1 + 4
    with Image.open(tmp_path / "out" / "comparison-x2.png") as picture:
        pixels = np.asarray(picture)
    assert np.array_equal(pixels[-32:, -40:], np.asarray(Image.open(folder / "0.png").convert("L").convert("RGB")))
    assert cli.main([*arguments, "--model", f"rgb={tmp_path / '3.safetensors'}"]) == 1
    assert "for images of 3 channels, not 1: set --n-colors" in capsys.readouterr().err
