"""Runs from configurations: their files, their starting weights, and errors that stop them."""

import math
import re
import sys
from pathlib import Path

import pytest
import torch
import yaml

from liif_fast import data, evaluation, training
from liif_fast.cli import main as cli
from liif_fast.models import checkpoints, make_model
from liif_fast.training import config
from liif_fast.training.step import Stepper
from tests.training.runs import LIIF, assert_same, read, run, table
from tests.training.training_data import CONFIGS, NAMES, QUICK

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("name", [name for name in NAMES if "rdn" not in name])  # rdn takes half a minute
def test_every_family_of_the_original_trains(tmp_path, name):
    lines = run(tmp_path / "run", source=CONFIGS / name)
    assert [line.split(",")[0] for line in lines if line.startswith("epoch")] == ["epoch 1/2", "epoch 2/2"]
    assert all(re.search(r"train: loss=0\.\d{4}, val: psnr=\d+\.\d{4}, ", line) for line in lines[1:])
    model = checkpoints.load(tmp_path / "run" / "epoch-last.safetensors")
    assert model.spec["name"] == ("metasr" if "metasr" in name else "liif")
    rates = [float(row["lr"]) for row in table(tmp_path / "run")]
    assert rates == pytest.approx([1e-4, 1e-4 * (0.1 if "celeb" in name else 0.5)])


def test_a_run_learns(tmp_path):
    faster = ["optimizer.args.lr=1e-2", "multi_step_lr=null", "epoch_val=6", "epoch_save=null"]
    run(tmp_path / "run", "epoch_max=18", *faster)
    rows = table(tmp_path / "run")
    losses = [float(row["loss"]) for row in rows]
    assert sum(losses[-3:]) < 0.8 * sum(losses[:3])
    validated = [(int(row["epoch"]), float(row["psnr"])) for row in rows if row["psnr"]]
    assert [epoch for epoch, _ in validated] == [6, 12, 18] and validated[-1][1] > validated[0][1]


def test_checkpoints_have_the_originals_format(finished):
    names = sorted(path.name for path in finished.iterdir())
    best = ["epoch-best.pth", "epoch-best.safetensors"]
    last = ["epoch-last.pth", "epoch-last.safetensors"]
    assert names == ["config.yaml", "epoch-2.pth", *best, *last, "log.csv", "log.txt", "state.pth"]
    content = config.load(LIIF)
    assert yaml.safe_load((finished / "config.yaml").read_text()).items() >= content.items()
    for name in ("epoch-2.pth", "epoch-best.pth", "epoch-last.pth"):
        found = read(finished, name)
        assert list(found) == ["model", "optimizer", "epoch"]
        assert list(found["model"]) == list(found["optimizer"]) == ["name", "args", "sd"]
        assert found["model"]["args"] == content["model"]["args"] and found["optimizer"]["args"] == {"lr": 1e-4}
        # As the original reads them: a model and an optimizer of all its parameters, made from the specs.
        model = make_model(found["model"], load_sd=True)
        optimizer = torch.optim.Adam(model.parameters(), **found["optimizer"]["args"])
        optimizer.load_state_dict(found["optimizer"]["sd"])
        assert optimizer.param_groups[0]["lr"] == 5e-5 or found["epoch"] == 1
    assert read(finished, "epoch-2.pth")["epoch"] == 2
    ours = checkpoints.load(finished / "epoch-last.safetensors")
    assert_same(dict(ours.state_dict()), dict(read(finished, "epoch-last.pth")["model"]["sd"]))
    assert ours.data_norm == content["data_norm"]


def test_the_best_epoch_is_kept(tmp_path, monkeypatch):
    values = iter([20.0, 25.0, 23.0])
    monkeypatch.setattr(evaluation, "eval_metrics_sum", lambda *args, **kwargs: ({"psnr": 6 * next(values)}, 6))
    run(tmp_path / "run", "epoch_max=3", "epoch_save=null")
    assert read(tmp_path / "run", "epoch-best.pth")["epoch"] == 2 and read(tmp_path / "run")["best"] == 25
    values = iter([24.0, 26.0])
    run(tmp_path / "run", "epoch_max=4", resume="auto")
    assert read(tmp_path / "run", "epoch-best.pth")["epoch"] == 2
    run(tmp_path / "run", "epoch_max=5", resume="auto")
    assert read(tmp_path / "run", "epoch-best.pth")["epoch"] == 5


def test_a_loss_that_is_not_finite_stops_the_run_and_saves_the_batch(tmp_path, monkeypatch):
    plain = Stepper.step

    def step(self, batch):
        if len(bad) == 3:
            batch = {**batch, "inp": batch["inp"].clone()}
            batch["inp"][1, 2] = math.nan
        bad.append(batch)
        return plain(self, batch)

    bad: list = []
    monkeypatch.setattr(Stepper, "step", step)
    with pytest.raises(training.TrainingError, match="the loss is nan in epoch 2") as stopped:
        run(tmp_path / "run", "epoch_max=3")
    name = tmp_path / "run" / "bad-batch-rank0.pth"
    assert str(name) in str(stopped.value) and "\n" not in str(stopped.value)
    saved = torch.load(name, weights_only=True)
    assert saved.keys() == bad[3].keys() and torch.equal(saved["gt"], bad[3]["gt"])
    assert read(tmp_path / "run")["epoch"] == 1


STILL = "optimizer={name: sgd, args: {lr: 0.0}}"


def test_init_starts_from_the_weights_of_a_file(tmp_path, finished):
    run(tmp_path / "run", "epoch_max=1", STILL, f"init={finished / 'epoch-last.safetensors'}")
    first, second = (checkpoints.load(each / "epoch-last.safetensors") for each in (finished, tmp_path / "run"))
    assert_same(dict(second.state_dict()), dict(first.state_dict()))
    with pytest.raises(config.ConfigError, match="init: the weights of tiny do not fit this model"):
        run(tmp_path / "other", "init=tiny")


def test_init_bilinear_starts_close_to_bilinear_interpolation(tmp_path, folders):
    run(tmp_path / "run", "epoch_max=1", STILL, "init=bilinear", "val_dataset=null")
    image = data.read_rgb(folders / "load/HR/0.png")[:32, :32]
    model = checkpoints.load(tmp_path / "run" / "epoch-last.safetensors")
    pixels = data.to_tensor(image)[None]
    bilinear = torch.nn.functional.interpolate(pixels, scale_factor=2, mode="bilinear", align_corners=False)[0]
    assert evaluation.psnr(evaluation.predict(model, image, (64, 64)), bilinear) > 25
    with pytest.raises(config.ConfigError, match=r"x2\.yaml: init is 'bilinear', which needs a liif"):
        run(tmp_path / "other", "init=bilinear", source=CONFIGS / "train_edsr-baseline-x2.yaml")


def test_a_configuration_that_cannot_be_trained_is_named(tmp_path):
    encoder = "model={name: edsr-baseline, args: {no_upsampling: true}}"
    with pytest.raises(config.ConfigError, match="model: edsr-baseline cannot be trained"):
        run(tmp_path / "run", encoder)
    with pytest.raises(config.ConfigError, match="cuda_graphs needs one GPU"):
        run(tmp_path / "run", "cuda_graphs=true")
    assert not (tmp_path / "run").exists()
    with pytest.raises(config.ConfigError, match=r"val_dataset: .*first_k"):  # a validation set without images
        run(tmp_path / "run", "val_dataset.dataset.args.first_k=0")


def test_curves_are_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    from PIL import Image

    run(tmp_path / "run", "plots=true")
    for name in ("loss.png", "psnr.png"):
        with Image.open(tmp_path / "run" / name) as picture:
            assert picture.size == (720, 480)
            assert len(picture.convert("L").getcolors()) > 20


def test_tensorboard_gets_the_numbers(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run(tmp_path / "run", "tensorboard=true")
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    for column in ("loss", "psnr", "lr"):
        logged = [(event.step, event.value) for event in events.Scalars(column)]
        expected = [(int(row["epoch"]), pytest.approx(float(row[column]), rel=1e-5)) for row in table(tmp_path / "run")]
        assert logged == expected


@pytest.mark.parametrize(("switch", "library"), [("tensorboard", "tensorboard"), ("plots", "matplotlib")])
def test_a_missing_library_is_one_sentence(tmp_path, monkeypatch, switch, library):
    for name in ("torch.utils.tensorboard", "matplotlib", "matplotlib.figure"):
        monkeypatch.setitem(sys.modules, name, None)
    lines = run(tmp_path / "run", "epoch_max=1", f"{switch}=null")
    assert f"without {switch}: {library} is not installed (pip install {library})" in lines
    with pytest.raises(ValueError, match=f"{switch} is true, but {library} is not installed"):
        run(tmp_path / "other", "epoch_max=1", f"{switch}=true")


def test_the_command_prints_its_folder_and_its_errors(tmp_path, capsys):
    def command(*more):
        code = cli.main(["train", "--config", str(LIIF), "--save", str(tmp_path), "--device", "cpu", *more])
        return code, capsys.readouterr()

    code, said = command("--tag", "first", "--set", *QUICK, "--set", "epoch_max=1")
    folder = tmp_path / "_train_edsr-baseline-liif_first"
    assert code == 0 and folder.is_dir() and said.out.endswith(f"wrote {folder}\n") and said.err == ""
    assert (folder / "log.txt").read_text() in said.out
    assert command("--name", "own", "--set", *QUICK, "epoch_max=1")[0] == 0 and (tmp_path / "own").is_dir()
    for more, sentence in (
        (["--name", "own"], "own exists already"),
        (["--name", "a/b"], "'a/b' must be the name of one folder"),
        (["--set", "epochs=3"], f"{LIIF}: epochs is not a known key"),
    ):
        code, said = command(*more)
        assert code == 1 and sentence in said.err and said.err.count("\n") == 1
