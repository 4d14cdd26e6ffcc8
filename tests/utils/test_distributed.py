"""Two processes under torchrun give the results of one: training, validation, upscaling a folder."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image

from liif_fast import training
from liif_fast.cli import main as cli
from liif_fast.models import checkpoints
from liif_fast.training import config
from liif_fast.utils import distributed
from tests.models import small_models
from tests.training.training_data import CONFIGS, QUICK, make_folders

LIIF = CONFIGS / "train_edsr-baseline-liif.yaml"
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return make_folders(tmp_path_factory.mktemp("data"))


def torchrun(folder, *arguments):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [*launcher, "-m", "liif_fast", *arguments]
    done = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def numbers(folder):
    rows = [line.split(",")[:4] for line in (folder / "log.csv").read_text().splitlines()[1:]]
    return torch.tensor([[float(value) for value in row] for row in rows], dtype=torch.float64)


@pytest.mark.prove
def test_two_processes_train_as_one(tmp_path, folders, monkeypatch):
    """The same global batches, gradients averaged: the same losses, PSNR and weights up to rounding; then a resume."""
    # Gradient descent, because Adam makes a full step even from a gradient of rounding errors only.
    plain = ["optimizer={name: sgd, args: {lr: 0.1}}", "epoch_max=3", "accumulate=2", "ema=0.9", "clip_grad=0.5"]
    settings = [*QUICK, *plain]
    monkeypatch.chdir(folders)
    # One validation image, so that the second process has none.
    one_item = ["val_dataset.dataset.args.first_k=1", "val_dataset.dataset.args.repeat=1"]
    for resume, more in ((None, ["epoch_max=2"]), ("auto", one_item)):
        content = config.load(LIIF, overrides=[*settings, *more])
        training.train(content, tmp_path / "one", resume=resume, device="cpu", report=lambda line: None)
    shared = ["train", "--config", str(LIIF), "--save", str(tmp_path), "--name", "two", "--device", "cpu", "--set"]
    printed = torchrun(folders, *shared, *settings, "epoch_max=2")
    assert printed.count("epoch 1/2") == 1 and printed.count("wrote") == 1
    states = torch.load(tmp_path / "two" / "state.pth", weights_only=True)["random"]
    assert len(states) == 2 and not torch.equal(states[0]["torch"], states[1]["torch"])
    torchrun(folders, *shared, *settings, *one_item, "--resume", "auto")
    assert torch.allclose(numbers(tmp_path / "two"), numbers(tmp_path / "one"), rtol=1e-5, atol=1e-7)
    for name in ("epoch-last.safetensors", "epoch-best.safetensors"):
        two, one = (safetensors.torch.load_file(tmp_path / each / name) for each in ("two", "one"))
        for key, value in one.items():
            assert torch.allclose(two[key], value, rtol=1e-4, atol=1e-6), key


@pytest.mark.prove
def test_two_processes_share_a_folder_of_images(tmp_path, capsys):
    checkpoints.save(small_models.liif().float(), tmp_path / "small.safetensors")
    (tmp_path / "in").mkdir()
    rng = np.random.default_rng(0)
    for number in range(5):
        Image.fromarray(rng.integers(0, 256, (7, 9, 3), dtype=np.uint8)).save(tmp_path / "in" / f"{number}.png")
    arguments = ["upscale", str(tmp_path / "in"), "--scale", "2", "--model", str(tmp_path / "small.safetensors")]
    arguments += ["--device", "cpu", "-o"]
    printed = torchrun(tmp_path, *arguments, str(tmp_path / "two") + os.sep)
    assert printed.count(" -> ") == 5
    assert cli.main([*arguments, str(tmp_path / "one") + os.sep]) == 0
    for number in range(5):
        two, one = (Image.open(tmp_path / each / f"{number}.png") for each in ("two", "one"))
        assert np.array_equal(np.asarray(two), np.asarray(one))


def test_a_single_process_needs_no_launcher(monkeypatch):
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    with distributed.setup("cpu") as device:
        assert device == torch.device("cpu") and not distributed.is_launched()
        assert (distributed.rank(), distributed.world_size(), distributed.is_main()) == (0, 1, True)
        assert distributed.sum_over_ranks([1, 2.5]) == [1, 2.5] and distributed.gather("a") == ["a"]
        distributed.barrier()


def test_a_missing_gpu_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(RuntimeError, match=r"cuda:3 was .*, but PyTorch .* 0 GPUs"), distributed.setup("cuda:3"):
        pass
