"""Scores of loaders and of test configurations, compared with an independent computation."""

import math
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml
from PIL import Image
from torch import nn

from liif_fast import data
from liif_fast.cli import main as cli
from liif_fast.evaluation import eval_metrics_sum, eval_psnr, eval_psnr_sum, predict, psnr, ssim
from liif_fast.models import make_model

ENCODER = {"name": "edsr-baseline", "args": {"n_resblocks": 1, "n_feats": 8, "no_upsampling": True}}
LIIF = {"encoder_spec": ENCODER, "imnet_spec": {"name": "mlp", "args": {"out_dim": 3, "hidden_list": [16]}}}
NORM = {"inp": {"sub": [0.5], "div": [0.5]}, "gt": {"sub": [0.4], "div": [0.6]}}


@pytest.fixture
def folders(tmp_path):
    """Three images under HR/ and under LR/, where Pillow has shrunk them by 2."""
    rng = np.random.default_rng(0)
    for name in ("HR", "LR"):
        (tmp_path / name).mkdir()
    for index, (height, width) in enumerate([(48, 56), (61, 50), (52, 52)]):
        rows, columns = np.mgrid[:height, :width]
        waves = np.stack([np.sin(rows / (3 + color)) + np.cos(columns / 4) for color in range(3)], axis=-1)
        large = np.clip(128 + 50 * waves + rng.normal(0, 6, waves.shape), 0, 255).astype(np.uint8)
        Image.fromarray(large).save(tmp_path / "HR" / f"{index}.png")
        small = Image.fromarray(large[: height // 2 * 2, : width // 2 * 2])
        small.resize((width // 2, height // 2), Image.Resampling.BICUBIC).save(tmp_path / "LR" / f"{index}x2.png")
    return tmp_path


@pytest.fixture
def model():
    torch.manual_seed(0)
    return make_model({"name": "liif", "args": LIIF})


def paired(folders, batch_size=1, **wrapper):
    roots = {"root_path_1": str(folders / "LR"), "root_path_2": str(folders / "HR")}
    return {
        "dataset": {"name": "paired-image-folders", "args": roots},
        "wrapper": {"name": "sr-implicit-paired", "args": wrapper or None},
        "batch_size": batch_size,
    }


def by_hand(model, folders, eval_type):
    """Scores of the three images by the original's formula, from one render of each."""
    model.eval()
    model.data_norm = NORM
    scores = []
    for index in range(3):
        low = np.array(Image.open(folders / "LR" / f"{index}x2.png"))
        high = np.array(Image.open(folders / "HR" / f"{index}.png"))[: 2 * low.shape[0], : 2 * low.shape[1]]
        target = torch.from_numpy(high).permute(2, 0, 1) / 255
        difference = (predict(model, low, high.shape[:2]) - target).double()
        if eval_type == "benchmark-2":
            weights = torch.tensor([65.738, 129.057, 25.064], dtype=torch.float64).view(3, 1, 1) / 256
            difference = (difference * weights).sum(0)
        border = {"div2k-2": 8, "benchmark-2": 2, None: 0}[eval_type]
        inside = slice(border, -border or None)
        scores.append(-10 * math.log10(difference[..., inside, inside].square().mean()))
    return scores


@pytest.mark.parametrize("eval_type", ["div2k-2", "benchmark-2", None])
@pytest.mark.parametrize("eval_bsize", [None, 500])
def test_whole_images_by_hand(folders, model, eval_type, eval_bsize):
    loader = data.make_loader(paired(folders))
    model.train()
    score = eval_psnr(loader, model, NORM, eval_type, eval_bsize)
    assert model.training
    assert score == pytest.approx(np.mean(by_hand(model, folders, eval_type)), abs=1e-3)


def test_processes_add_their_sums(folders, model):
    loaders = [data.make_loader(paired(folders), split="items", rank=rank, world=2) for rank in range(2)]
    parts = [eval_psnr_sum(loader, model, NORM, "div2k-2") for loader in loaders]
    assert [count for _, count in parts] == [2, 1]
    assert sum(total for total, _ in parts) == pytest.approx(sum(by_hand(model, folders, "div2k-2")), abs=1e-3)


def test_scores_of_samples_do_not_depend_on_the_batch(folders, model):
    crops = {"inp_size": 12, "sample_q": 60}
    scores = [eval_psnr(data.make_loader(paired(folders, size, **crops)), model, NORM) for size in (1, 2, 3)]
    assert scores[0] == pytest.approx(scores[1], abs=1e-5) and scores[0] == pytest.approx(scores[2], abs=1e-5)
    model.eval()
    expected = []
    for item in data.make_loader(paired(folders, **crops)).epoch():
        with torch.no_grad():
            pred = model((item["inp"] - 0.5) / 0.5, item["coord"], item["cell"]) * 0.6 + 0.4
        expected.append(_psnr(pred, item["gt"]))
    assert scores[0] == pytest.approx(np.mean(expected), abs=1e-3)


def _psnr(pred, target):
    return -10 * math.log10((pred.clamp(0, 1) - target).double().square().mean())


class Nearest(nn.Module):
    """A user's model with only a forward and one parameter."""

    def __init__(self):
        super().__init__()
        self.gain = nn.Parameter(torch.ones(()))

    def forward(self, inp, coord, cell):
        return (
            F.grid_sample(inp, coord.flip(-1).unsqueeze(1), mode="nearest", align_corners=False)[:, :, 0].mT * self.gain
        )


def test_users_own_models_need_only_a_forward(folders):
    norm = {side: {"sub": [0.0], "div": [1.0]} for side in ("inp", "gt")}
    score = eval_psnr(data.make_loader(paired(folders)), Nearest(), norm, "benchmark-2")
    expected = []
    for index in range(3):
        low = np.array(Image.open(folders / "LR" / f"{index}x2.png"))
        high = np.array(Image.open(folders / "HR" / f"{index}.png"))[: 2 * low.shape[0], : 2 * low.shape[1]]
        pair = [torch.from_numpy(each.copy()).permute(2, 0, 1) / 255 for each in (low.repeat(2, 0).repeat(2, 1), high)]
        expected.append(psnr(*pair, "benchmark-2"))
    assert score == pytest.approx(np.mean(expected), abs=1e-4)


def test_without_torchmetrics_ssim_says_what_to_do(folders, model, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchmetrics.functional.image", None)
    with pytest.raises(RuntimeError, match="pip install torchmetrics"):
        eval_metrics_sum(data.make_loader(paired(folders)), model, NORM, "div2k-2", metrics=["ssim"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"eval_type": "set5-2"}, "set5-2"),
        ({"metrics": ["lpips"]}, "'lpips'"),
        ({"eval_bsize": 0}, "eval_bsize is 0"),
        ({"data_norm": {"inp": {"sub": [0.5]}}}, "data_norm"),
        ({"eval_type": "div2k-2"}, "60 of 24x24 pixels; leave sample_q out"),
    ],
)
def test_bad_arguments_get_a_sentence(folders, model, arguments, message):
    loader = data.make_loader(paired(folders, inp_size=12, sample_q=60))
    with pytest.raises(ValueError, match=message):
        eval_metrics_sum(loader, model, **arguments)
    with pytest.raises(ValueError, match="no items"):
        eval_psnr([], model)


@pytest.fixture
def checkpoint(folders, model):
    path = folders / "epoch-best.pth"
    torch.save({"model": {"name": "liif", "args": LIIF, "sd": model.state_dict()}, "epoch": 1}, path)
    return path


def test_command_runs_a_test_file_of_the_originals_schema(folders, model, checkpoint, capsys):
    test = {"test_dataset": paired(folders), "eval_type": "div2k-2", "eval_bsize": 30000, "data_norm": NORM}
    (folders / "test.yaml").write_text(yaml.safe_dump(test))
    assert cli.main(["evaluate", "--config", str(folders / "test.yaml"), "--model", str(checkpoint)]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("result: ") and printed.count("\n") == 1
    assert float(printed.split()[1]) == pytest.approx(np.mean(by_hand(model, folders, "div2k-2")), abs=2e-4)


def test_command_shrinks_images_for_a_wrapper_that_downsamples(folders, model, checkpoint, capsys):
    wrapper = {"name": "sr-implicit-downsampled", "args": {"scale_min": 6, "scale_max": 6}}
    dataset = {"name": "image-folder", "args": {"root_path": str(folders / "HR")}}
    section = {"dataset": dataset, "wrapper": wrapper, "batch_size": 1}
    test = {"test_dataset": section, "eval_type": "div2k-6", "eval_bsize": 900, "data_norm": NORM}
    (folders / "test.yaml").write_text(yaml.safe_dump(test))
    arguments = ["evaluate", "--config", str(folders / "test.yaml"), "--model", str(checkpoint)]
    assert cli.main([*arguments, "--metrics", "psnr", "ssim"]) == 0
    lines = capsys.readouterr().out.splitlines()
    model.eval()
    model.data_norm = NORM
    pairs = []
    for index in range(3):
        low, high = data.shrink_whole(data.read_rgb(folders / "HR" / f"{index}.png"), 6)
        pairs.append((predict(model, low, high.shape[:2]), data.to_tensor(high)))
    assert lines[0] == f"result: {np.mean([psnr(*pair, 'div2k-6') for pair in pairs]):.4f}"
    assert lines[1] == f"ssim: {np.mean([ssim(*pair, 'div2k-6') for pair in pairs]):.4f}"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"eval_type": "set5-2"}, "eval_type is 'set5-2'"),
        ({"eval_size": 3}, "eval_size is not a known key; did you mean eval_bsize?"),
    ],
)
def test_command_names_file_and_key(folders, checkpoint, capsys, change, message):
    (folders / "test.yaml").write_text(yaml.safe_dump({"test_dataset": paired(folders), **change}))
    assert cli.main(["evaluate", "--config", str(folders / "test.yaml"), "--model", str(checkpoint)]) == 1
    error = capsys.readouterr().err
    assert "test.yaml: " in error and message in error and error.count("\n") == 1


def test_command_needs_one_model(folders, capsys):
    (folders / "test.yaml").write_text(yaml.safe_dump({"test_dataset": paired(folders)}))
    assert cli.main(["evaluate", "--config", str(folders / "test.yaml")]) == 1
    assert "give one --model FILE" in capsys.readouterr().err


def test_scores_that_do_not_exist_name_the_image(folders, model):
    for eval_type, message in (("div2k-30", "removes a border of 36 pixels"), ("benchmark-40", "a border of 40")):
        with pytest.raises(ValueError, match=rf"^0x2\.png: the image has 48x56 pixels, .*{message}"):
            eval_metrics_sum(data.make_loader(paired(folders)), model, NORM, eval_type)
