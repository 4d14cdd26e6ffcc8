"""Short training runs and their files, for the tests of runs."""

import csv

import torch

from liif_fast import training
from liif_fast.training import config
from tests.training.training_data import CONFIGS, QUICK

LIIF = CONFIGS / "train_edsr-baseline-liif.yaml"


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
