"""scripts/tiny_weights: the recipe trains, and the model card holds the numbers of its run."""

import csv
import importlib.util
import re
from pathlib import Path

import pytest

from liif_fast import training
from liif_fast.cli import main as cli
from liif_fast.training import config
from tests.training.training_data import QUICK

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts" / "tiny_weights"
RECIPE = SCRIPTS / "tiny.yaml"


@pytest.fixture
def model_card():
    spec = importlib.util.spec_from_file_location("model_card", SCRIPTS / "model_card.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def manifest(path, names, columns=("file", "author", "licence", "source_package", "source_version", "transform")):
    with open(path, "w", newline="") as file:
        csv.writer(file).writerows([columns, *([name, "Ada | Bob", "CC0-1.0", "p", "1.0", "none"] for name in names)])
    return str(path)


def test_the_recipe_trains_and_its_card_holds_the_numbers_of_the_run(capsys, model_card):
    folders = ["train_dataset.dataset.args.root_path=load/HR", "val_dataset.dataset.args.root_path=load/HR"]
    small = ["train_dataset.dataset.args.repeat=1", "epoch_max=1", "epoch_val=1"]
    small.append("train_dataset.wrapper.args={inp_size: 8, scale_max: 4, scale_min: 1, sample_q: 32}")
    small.append("model.args.encoder_spec.args={n_resblocks: 1, n_feats: 8, no_upsampling: true}")
    content = config.load(RECIPE, overrides=[*QUICK, *folders, *small])
    training.train(content, "run", device="cpu", report=lambda line: None)
    weights = Path("run/epoch-last.safetensors").rename("small.safetensors")
    arguments = ["--images", "load/HR", "--model", f"small={weights}", "--scales", "2", "--out", "out"]
    assert cli.main(["evaluate", *arguments]) == 0
    manifests = ["--train-manifest", manifest("train.csv", ["0.png"]), "--val-manifest", manifest("val.csv", ["1.png"])]
    arguments = [
        "--weights",
        str(weights),
        "--run",
        "run",
        "--scores",
        "out/scores.csv",
        "--out",
        "card.md",
        *manifests,
    ]
    assert model_card.main(arguments) == 0
    card = Path("card.md").read_text()
    assert Path("out/table.md").read_text().strip() in card
    assert card.count("Ada \\| Bob | CC0-1.0 |") == 2 and re.search(r"A LIIF of \d+,\d{3} parameters: edsr", card)
    assert "1 epochs in" in card and "| init | bilinear |" in card and "| train_dataset.batch_size | 16 |" in card
    manifest("val.csv", [], columns=("file", "author"))
    capsys.readouterr()
    assert model_card.main(arguments) == 1
    assert "no column licence, source_package" in capsys.readouterr().err
