"""Training and evaluation with data of several channels, of any range and with masks."""

import csv
import math

import numpy as np
import pytest
import torch
import yaml

from liif_fast import data, training
from liif_fast.cli import main as cli
from liif_fast.models import checkpoints
from liif_fast.training import config
from liif_fast.training.step import StepOptions, Stepper
from tests.models.small_models import liif

LOW, HIGH, CHANNELS = -40.0, 60.0, 5


@pytest.fixture
def folder(tmp_path):
    """Two fields of temperatures [40, 44, 5], with a coast of missing values."""
    (tmp_path / "fields").mkdir()
    rows, columns, bands = np.mgrid[:40, :44, :CHANNELS]
    for number in range(2):
        field = (30 * np.sin(rows / 6 + bands + number) + columns).astype(np.float32)
        field[rows + columns < 25] = np.nan
        np.save(tmp_path / "fields" / f"{number}.npy", field)
    return tmp_path


def settings(folder, **encoder):
    args = {"root_path": str(folder / "fields"), "n_colors": CHANNELS, "data_range": [LOW, HIGH]}
    dataset = {"name": "image-folder", "args": args}
    crop = {"name": "sr-implicit-downsampled", "args": {"inp_size": 12, "scale_max": 3, "sample_q": 60}}
    whole = {"name": "sr-implicit-downsampled", "args": {"scale_min": 4}}
    encoder = {"no_upsampling": True, "n_resblocks": 1, "n_feats": 4, "n_colors": CHANNELS, **encoder}
    imnet = {"name": "mlp", "args": {"out_dim": CHANNELS, "hidden_list": [8]}}
    spec = {"encoder_spec": {"name": "edsr-baseline", "args": encoder}, "imnet_spec": imnet}
    norm = {side: {"sub": [0.5], "div": [0.5]} for side in ("inp", "gt")}
    return {
        "train_dataset": {"dataset": dataset, "wrapper": crop, "batch_size": 2},
        "val_dataset": {"dataset": dataset, "wrapper": whole, "batch_size": 1},
        "data_norm": norm,
        "model": {"name": "liif", "args": spec},
        "optimizer": {"name": "adam", "args": {"lr": 1e-3}},
        "epoch_max": 1,
        "epoch_val": 1,
        "num_workers": 0,
        "tensorboard": False,
        "plots": False,
    }


def test_a_run_and_the_command_score_valid_pixels_in_the_datas_unit(folder, capsys):
    content = settings(folder)
    lines: list[str] = []
    training.train(content, folder / "run", device="cpu", report=lines.append)
    model = checkpoints.load(folder / "run" / "epoch-last.safetensors").eval()
    psnr, rmse = [], []
    for item in data.make_loader(content["val_dataset"]).epoch():
        with torch.no_grad():
            pred = model((item["inp"] - 0.5) / 0.5, item["coord"], item["cell"])[0] * 0.5 + 0.5
        valid = ~item["gt"][0].isnan()
        assert 0.5 < valid.float().mean() < 0.9
        error = (pred - item["gt"][0])[valid].double().square().mean().item()
        psnr.append(-10 * math.log10(error))
        rmse.append(math.sqrt(error) * (HIGH - LOW))
    with open(folder / "run" / "log.csv", newline="") as file:
        row = next(csv.DictReader(file))
    assert float(row["psnr"]) == pytest.approx(np.mean(psnr), abs=1e-4)
    assert float(row["rmse"]) == pytest.approx(np.mean(rmse), rel=1e-5)
    assert f"val: psnr={np.mean(psnr):.4f}, rmse={np.mean(rmse):.4g}, " in lines[-1]
    test = {"test_dataset": content["val_dataset"], "data_norm": content["data_norm"]}
    (folder / "test.yaml").write_text(yaml.safe_dump(test))
    file = str(folder / "run" / "epoch-last.safetensors")
    assert cli.main(["evaluate", "--config", str(folder / "test.yaml"), "--model", file, "--device", "cpu"]) == 0
    printed = dict(line.split(": ") for line in capsys.readouterr().out.splitlines())
    assert float(printed["result"]) == pytest.approx(np.mean(psnr), abs=1e-3)
    assert float(printed["rmse"]) == pytest.approx(np.mean(rmse), rel=1e-3)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (
            lambda content: content["model"]["args"]["encoder_spec"]["args"].update(n_colors=3),
            "the encoder's n_colors is 3",
        ),
        (lambda content: content["model"]["args"]["imnet_spec"]["args"].update(out_dim=3), "the imnet's out_dim is 3"),
        (lambda content: content["data_norm"]["inp"].update(sub=[0.5] * 3), r"the length of data_norm\.inp\.sub is 3"),
    ],
)
def test_a_model_of_other_channels_is_refused_before_training(folder, change, reason):
    content = settings(folder)
    change(content)
    with pytest.raises(config.ConfigError, match=f"train_dataset has 5 channels, but {reason}: correct it$") as found:
        training.train(content, folder / "run", device="cpu", report=lambda line: None)
    assert "\n" not in str(found.value) and not (folder / "run").exists()


@pytest.mark.parametrize("chunks", [1, 3])
def test_values_without_a_target_do_not_change_the_step(chunks):
    generator = torch.Generator().manual_seed(1)
    shapes = {"inp": (3, 3, 8, 8), "coord": (3, 20, 2), "cell": (3, 20, 2), "gt": (3, 20, 3)}
    batch = {key: torch.rand(shape, generator=generator) for key, shape in shapes.items()}
    batch["gt"][0, :15], batch["gt"][1, 3, 1] = math.nan, math.nan
    net, norm = liif().float(), {side: {"sub": [0.5], "div": [0.5]} for side in ("inp", "gt")}
    stepper = Stepper(net, torch.optim.SGD(net.parameters(), lr=0.0), StepOptions(accumulate=chunks), norm)
    loss = stepper.step(batch)
    found = [parameter.grad.clone() for parameter in net.parameters() if parameter.grad is not None]
    net.zero_grad()
    valid = ~batch["gt"].isnan()
    pred = net((batch["inp"] - 0.5) / 0.5, batch["coord"], batch["cell"])
    expected = (pred - (batch["gt"] - 0.5) / 0.5)[valid].abs().mean()
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    for ours, parameter in zip(found, [each for each in net.parameters() if each.grad is not None], strict=True):
        assert torch.allclose(ours, parameter.grad, atol=1e-6)
    batch["gt"][:] = math.nan
    assert stepper.step(batch).item() == 0
