"""Runs from configurations: their files, how they resume after a stop or a kill, and errors that stop them."""

import csv
import math
import os
import random
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
import yaml

from liif_fast import data, evaluation, training
from liif_fast.cli import main as cli
from liif_fast.models import checkpoints, make_model
from liif_fast.training import config
from liif_fast.training.run import learning_rate
from liif_fast.training.step import Stepper
from tests.training.training_data import CONFIGS, NAMES, QUICK, make_folders

LIIF = CONFIGS / "train_edsr-baseline-liif.yaml"
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module", autouse=True)
def folders(tmp_path_factory):
    """The folders of the configurations, as the working directory."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(make_folders(tmp_path_factory.mktemp("data")))
        yield Path.cwd()


@pytest.fixture(scope="module")
def finished(folders, tmp_path_factory):
    """A finished run of two epochs; tests must not change it."""
    folder = tmp_path_factory.mktemp("runs") / "finished"
    run(folder)
    return folder


def run(folder, *overrides, source=LIIF, resume=None):
    lines: list[str] = []
    content = config.load(source, overrides=[*QUICK, *overrides])
    training.train(content, folder, resume=resume, device="cpu", source=str(source), report=lines.append)
    return lines


def read(folder, name="state.pth"):
    return torch.load(folder / name, weights_only=True)


def table(folder):
    """The rows of log.csv without the columns of times."""
    with open(folder / "log.csv", newline="") as file:
        return [{key: row[key] for key in ("epoch", "lr", "loss", "psnr")} for row in csv.DictReader(file)]


def assert_same(ours, theirs):
    """The same numbers, bit for bit, in the same containers."""
    assert type(ours) is type(theirs)
    if isinstance(ours, dict):
        assert ours.keys() == theirs.keys()
        for key in ours:
            assert_same(ours[key], theirs[key])
    elif isinstance(ours, (list, tuple)):
        assert len(ours) == len(theirs)
        for mine, other in zip(ours, theirs):
            assert_same(mine, other)
    elif isinstance(ours, torch.Tensor):
        assert torch.equal(ours, theirs)
    else:
        assert ours == theirs or (ours != ours and theirs != theirs)


def without_times(state):
    """A state without the times of its epochs."""
    history = [{key: row[key] for key in ("epoch", "lr", "loss", "psnr") if key in row} for row in state["history"]]
    return {**{key: state[key] for key in state if key != "seconds"}, "history": history}


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
    monkeypatch.setattr(evaluation, "eval_psnr_sum", lambda *args, **kwargs: (6 * next(values), 6))
    run(tmp_path / "run", "epoch_max=3", "epoch_save=null")
    assert read(tmp_path / "run", "epoch-best.pth")["epoch"] == 2 and read(tmp_path / "run")["best"] == 25
    values = iter([24.0, 26.0])
    run(tmp_path / "run", "epoch_max=4", resume="auto")
    assert read(tmp_path / "run", "epoch-best.pth")["epoch"] == 2
    run(tmp_path / "run", "epoch_max=5", resume="auto")
    assert read(tmp_path / "run", "epoch-best.pth")["epoch"] == 5


USERS_CODE = '''
import random
import numpy as np
import torch
from torch import nn
from liif_fast import register
from liif_fast.data import register as register_data
from liif_fast.models import LIIF

@register("own-encoder")
class OwnEncoder(nn.Module):
    """Draws random numbers in training, and has buffers."""
    def __init__(self, width: int = 6):
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(3, width, 3, padding=1), nn.BatchNorm2d(width), nn.Dropout2d(0.3))
        self.out_dim = width
    def forward(self, x):
        return self.layers(x)

@register("own-liif")
class OwnLIIF(LIIF):
    def query_rgb(self, coord, cell=None):
        out = super().query_rgb(coord, cell)
        if self.training:
            out = out * (1 + 0.01 * random.random() + 0.01 * float(np.random.rand()))
        return out

@register_data("own-folder")
class OwnFolder:
    def __init__(self, size: int, seed: int = 3):
        self.images = np.random.default_rng(seed).random((4, 3, size, size)).astype(np.float32)
    def __len__(self):
        return len(self.images)
    def __getitem__(self, index):
        return torch.from_numpy(self.images[index])

@register_data("own-wrapper")
class OwnWrapper:
    def __init__(self, dataset, count: int = 10):
        self.dataset, self.count = dataset, count
    def __len__(self):
        return len(self.dataset)
    def __getitem__(self, index):
        image = self.dataset[index]
        coord = torch.rand(self.count, 2) * 2 - 1 + 0.001 * random.random()
        return {"inp": image, "coord": coord, "cell": torch.full((self.count, 2), 0.1 * np.random.rand()),
                "gt": torch.rand(self.count, 3)}
'''


@pytest.fixture
def own(tmp_path):
    """A configuration with a user's model, encoder, dataset and wrapper, all of which draw random numbers."""
    (tmp_path / "own.py").write_text(USERS_CODE)
    content = yaml.safe_load(LIIF.read_text())
    section = {
        "dataset": {"name": "own-folder", "args": {"size": 8}},
        "wrapper": {"name": "own-wrapper", "args": {"count": 12}},
        "batch_size": 2,
    }
    encoder = {"name": "own-encoder", "args": {"width": 5}}
    imnet = content["model"]["args"]["imnet_spec"]
    model = {"name": "own-liif", "args": {"encoder_spec": encoder, "imnet_spec": imnet}}
    content |= {"imports": ["own.py"], "train_dataset": section, "val_dataset": section, "model": model, "epoch_max": 4}
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(content))
    return tmp_path / "own.yaml"


class Stopped(Exception):
    pass


def stop_at(monkeypatch, number):
    """Let the step of that number, counted over all epochs from 0, fail."""
    plain = Stepper.step

    def step(self, batch):
        if self.steps == number:
            raise Stopped
        return plain(self, batch)

    monkeypatch.setattr(Stepper, "step", step)


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["ema=0.9", "clip_grad=0.1", "accumulate=2", "seed=7", "num_workers=2"],
        ["optimizer={name: sgd, args: {lr: 0.01, momentum: 0.9}}", "channels_last=true", "autocast=bf16"],
        ["autocast=fp16", "multi_step_lr.milestones=[1, 3]", "multi_step_lr.gamma=0.3"],
    ],
    ids=["plain", "ema", "sgd", "fp16"],
)
def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path, own, monkeypatch, overrides):
    """With users' code that draws from Python's, numpy's and PyTorch's generators, in the items and in the model."""
    run(tmp_path / "whole", *overrides, source=own)
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        stop_at(patch, 5)  # in the middle of the third epoch
        run(tmp_path / "cut", *overrides, source=own)
    assert read(tmp_path / "cut")["epoch"] == 2
    random.seed(99)
    np.random.seed(99)  # noqa: NPY002
    torch.manual_seed(99)
    lines = run(tmp_path / "cut", *overrides, source=own, resume="auto")
    assert lines[0] == f"resumed from {tmp_path / 'cut' / 'state.pth'} after epoch 2"
    assert_same(without_times(read(tmp_path / "cut")), without_times(read(tmp_path / "whole")))
    assert table(tmp_path / "cut") == table(tmp_path / "whole")
    for name in ("epoch-last.safetensors", "epoch-best.safetensors"):
        assert_same(*(safetensors.torch.load_file(tmp_path / each / name) for each in ("cut", "whole")))


@pytest.mark.parametrize("schedule", ["multi_step_lr=null", "multi_step_lr={milestones: [1, 3], gamma: 0.3}"])
def test_max_minutes_stops_after_an_epoch_and_resume_continues(tmp_path, schedule):
    overrides = [schedule, *(["cosine_lr={min_lr: 1e-6, warmup: 3}"] if "null" in schedule else []), "epoch_max=3"]
    run(tmp_path / "whole", *overrides)
    for epoch in (1, 2, 3):
        lines = run(tmp_path / "cut", *overrides, "max_minutes=1e-6", resume="auto")
        assert read(tmp_path / "cut")["epoch"] == epoch
        stop = f"stopped after epoch {epoch}/3: another epoch would exceed max_minutes 1e-06; continue with"
        assert lines[-1].startswith(stop) if epoch < 3 else lines[-1].startswith("epoch 3/3")
    assert_same(without_times(read(tmp_path / "cut")), without_times(read(tmp_path / "whole")))
    assert table(tmp_path / "cut") == table(tmp_path / "whole")


def test_a_cosine_rises_over_the_warmup_and_falls_to_its_minimum(tmp_path):
    content = {"epoch_max": 5, "cosine_lr": {"min_lr": 0.1, "warmup": 4}}
    assert learning_rate(content, 1.0, 0, 20) == 0.25
    assert learning_rate(content, 1.0, 50, 20) == pytest.approx(0.55)
    assert learning_rate(content, 1.0, 100, 20) == pytest.approx(0.1)
    run(tmp_path / "run", "multi_step_lr=null", "cosine_lr={}", "epoch_val=null")
    each = [float(row["lr"]) for row in table(tmp_path / "run")]
    assert each == pytest.approx([1e-4, 0.5e-4])
    assert read(tmp_path / "run")["optimizer"]["sd"]["param_groups"][0]["lr"] == pytest.approx(0)


KILLED = """
import os, signal, sys
from liif_fast.cli import main as cli
from liif_fast.training.step import Stepper
from liif_fast.utils import files

target, count = sys.argv[1], int(sys.argv[2])
calls = 0

def kill_at(function, before):
    def wrapped(*arguments):
        global calls
        calls += 1
        if before and calls == count:
            os.kill(os.getpid(), signal.SIGKILL)
        result = function(*arguments)
        if calls == count:
            os.kill(os.getpid(), signal.SIGKILL)
        return result
    return wrapped

if target == "step":
    Stepper.step = kill_at(Stepper.step, True)
else:
    files.os.replace = kill_at(files.os.replace, target == "before-rename")
sys.exit(cli.main(sys.argv[3:]))
"""


def test_a_kill_at_any_moment_loses_at_most_the_current_epoch(tmp_path, folders):
    """A real SIGKILL: in a step, before and after the renames that put an epoch's files in place."""
    save, settings = tmp_path / "save", [*QUICK, "epoch_max=4", "epoch_save=1"]
    arguments = ["train", "--config", str(LIIF), "--save", str(save), "--name", "run", "--threads", "2"]
    arguments += ["--device", "cpu", "--resume", "auto", "--set", *settings]

    # Renames: config.yaml, then state.pth, epoch-last.pth, its .safetensors, the best two, epoch-N.pth and log.csv in
    # every epoch; a resumed run begins with config.yaml and the last six files of an epoch.
    for target, count, epoch in (("before-rename", 9, 1), ("after-rename", 8, 2), ("step", 4, 3)):
        command = [sys.executable, "-c", KILLED, target, str(count), *arguments]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, cwd=folders)
        assert done.returncode == -signal.SIGKILL, done.stderr
        assert read(save / "run")["epoch"] == epoch
        for file in (save / "run").glob("*.pth"):  # every file with its final name is complete
            torch.load(file, weights_only=True)
    run(save / "run", *settings, resume="auto")
    run(tmp_path / "whole", *settings)
    assert_same(without_times(read(save / "run")), without_times(read(tmp_path / "whole")))
    names = [sorted(path.name for path in folder.iterdir()) for folder in (save / "run", tmp_path / "whole")]
    assert names[0] == names[1]


def test_an_existing_folder_is_resumed_or_refused(tmp_path, finished):
    before = {path.name: path.read_bytes() for path in finished.iterdir()}
    (tmp_path / "broken.pth").write_bytes(b"PK nothing")
    (tmp_path / "run").mkdir()
    torch.save({"state_dict": {}}, tmp_path / "foreign.pth")
    new = tmp_path / "new"
    for folder, overrides, resume, message in (
        (finished, [], None, "finished exists already: resume it with --resume auto"),
        (tmp_path / "run", [], finished / "state.pth", "is not in it"),
        (finished, [], tmp_path / "nothing.pth", r"nothing\.pth does not exist"),
        (finished, ["optimizer.args.lr=0.5"], "auto", r"made with the optimizer adam \{'lr': 0\.0001\}.* says adam"),
        (finished, ["model.args.cell_decode=false"], "auto", "made with the model liif"),
        (new, [], tmp_path / "broken.pth", r"broken\.pth cannot be read as a checkpoint"),
        (new, [], tmp_path / "foreign.pth", "holds no model, optimizer and epoch"),
    ):
        with pytest.raises(training.ResumeError, match=message):
            run(folder, *overrides, resume=resume)
    assert {path.name: path.read_bytes() for path in finished.iterdir()} == before
    assert not new.exists()


def test_a_run_resumes_from_a_checkpoint_of_the_original(tmp_path):
    """Its dictionary holds model, optimizer and epoch; the learning rate follows from the epoch."""
    milestones = ["multi_step_lr.milestones=[1, 3]", "epoch_max=4", "epoch_save=2"]
    run(tmp_path / "whole", *milestones)
    lines = run(tmp_path / "new", *milestones, f"resume={tmp_path / 'whole' / 'epoch-2.pth'}")
    assert lines[0].endswith("epoch-2.pth after epoch 2") and len(lines) == 3
    assert [float(row["lr"]) for row in table(tmp_path / "new")] == [5e-5, 2.5e-5]
    assert_same(read(tmp_path / "new", "epoch-last.pth"), read(tmp_path / "whole", "epoch-last.pth"))


def test_resume_auto_starts_a_new_run_in_an_empty_folder(tmp_path):
    (tmp_path / "run").mkdir()
    lines = run(tmp_path / "run", "epoch_max=1", resume="auto")
    assert lines[0].startswith("model: liif")
    assert run(tmp_path / "run", "epoch_max=1", resume="auto")[1:] == []


def test_a_loss_that_is_not_finite_stops_the_run_and_saves_the_batch(tmp_path, monkeypatch):
    plain = Stepper.step

    def step(self, batch):
        if len(bad) == 3:
            batch = {**batch, "gt": batch["gt"].clone()}
            batch["gt"][1, 2] = math.nan
        bad.append(batch)
        return plain(self, batch)

    bad: list = []
    monkeypatch.setattr(Stepper, "step", step)
    with pytest.raises(training.TrainingError, match="the loss is nan in epoch 2") as stopped:
        run(tmp_path / "run", "epoch_max=3")
    name = tmp_path / "run" / "bad-batch-rank0.pth"
    assert str(name) in str(stopped.value) and "\n" not in str(stopped.value)
    saved = torch.load(name, weights_only=True)
    assert saved.keys() == bad[3].keys() and torch.equal(saved["inp"], bad[3]["inp"])
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


def test_a_validation_set_without_images_is_named(tmp_path):
    with pytest.raises(config.ConfigError, match=r"val_dataset: .*first_k"):
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
