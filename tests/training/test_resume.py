"""Runs that stop, are killed or reach their time limit, and how they resume."""

import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
import yaml

from liif_fast import training
from liif_fast.training.run import learning_rate
from liif_fast.training.step import Stepper
from tests.training.runs import LIIF, assert_same, read, run, table, without_times
from tests.training.training_data import QUICK

ROOT = Path(__file__).resolve().parents[2]
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
        pytest.param(["ema=0.9", "clip_grad=0.1", "accumulate=2", "seed=7", "num_workers=2"], marks=pytest.mark.prove),
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


@pytest.mark.prove
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
        (finished, ["optimizer.args.lr=0.5"], "auto", r"made with the optimizer adam \{'lr': 0\.0001\}.* has adam"),
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
