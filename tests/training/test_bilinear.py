"""A run learns, resumes bit for bit, stops at a loss that is no number, and starts as bilinear interpolation."""

import csv
import dataclasses
import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from liif_fast import evaluation, model_card
from liif_fast.initialization import start_as_bilinear
from liif_fast.models import checkpoints, make_model
from liif_fast.models.coordinates import make_cell, make_coord
from liif_fast.training import budget
from liif_fast.training.budget import Budget, Settings, Trainer, small_spec, train

SPEC = small_spec(1, 8, (8, 8))
SMALL = Settings(batch_size=2, inp_size=8, sample_q=32, warmup=2, workers=0, autocast=False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two pictures of 96x80 pixels with sharp edges, which bilinear interpolation blurs."""
    path = tmp_path_factory.mktemp("images")
    rows, columns = np.mgrid[:96, :80]
    for name, width in (("a.png", 7), ("b.png", 11)):
        stripes = ((rows + columns // 2) // width % 2)[..., None] * np.array([200, 120, 60]) + 20
        Image.fromarray(stripes.astype(np.uint8)).save(path / name)
    return path


@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize("flags", [{}, {"feat_unfold": False}, {"cell_decode": False}])
@pytest.mark.parametrize("hidden", [(6,), (16, 12, 9)])
def test_bilinear_start_is_bilinear_interpolation(flags, hidden, backend):
    torch.manual_seed(3)
    spec = small_spec(2, 12, hidden)
    model = make_model(spec, {**spec["args"], **flags})
    start_as_bilinear(model, residual=0.0)
    model.backend = backend
    inp = torch.rand(2, 3, 7, 9) * 2 - 1
    coord = make_coord((19, 23)).expand(2, -1, 2)
    with torch.no_grad():
        out = model(inp, coord, make_cell(coord, (19, 23)))
    expected = F.grid_sample(inp, coord.flip(-1)[:, None], mode="bilinear", padding_mode="border", align_corners=False)[
        :, :, 0
    ]
    inside = (coord[0, :, 0].abs() < 1 - 1 / 7) & (coord[0, :, 1].abs() < 1 - 1 / 9)
    # At the image's own border LIIF weights corners that fall on one latent; the colours agree there too.
    assert torch.allclose(out.transpose(1, 2)[..., inside], expected[..., inside], atol=1e-5)


def test_bilinear_start_leaves_room_to_learn():
    """Beside the colours' own path the random weights stay, so every parameter gets a gradient."""
    torch.manual_seed(0)
    model = make_model(SPEC)
    start_as_bilinear(model)
    coord = torch.rand(1, 40, 2) * 2 - 1
    out = model(torch.rand(1, 3, 8, 8) * 2 - 1, coord, make_cell(coord, (20, 20)))
    (out - torch.rand_like(out)).abs().mean().backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None and float(parameter.grad.abs().sum()) > 0, name


@pytest.mark.parametrize(
    "args",
    [{"local_ensemble": False}, {"imnet_spec": {"name": "mlp", "args": {"out_dim": 3, "hidden_list": [5]}}}],
)
def test_bilinear_start_refuses_models_it_cannot_set(args):
    with pytest.raises(ValueError, match="bilinear_start=False"):
        start_as_bilinear(make_model(SPEC, args))


def test_a_run_lowers_the_loss_and_writes_its_results(folder, tmp_path, capsys):
    settings = dataclasses.replace(SMALL, batch_size=4, scale_min=2, scale_max=2, lr=3e-3)
    weights = train(SPEC, folder, val=folder, out=tmp_path, steps=80, settings=settings, log_steps=10, validations=4)
    with open(tmp_path / "model-curve.csv", newline="") as file:
        curve = list(csv.DictReader(file))
    assert [int(row["step"]) for row in curve] == list(range(10, 81, 10))
    losses = [float(row["loss"]) for row in curve]
    assert sum(losses[-2:]) < 0.9 * sum(losses[:2])
    validated = [(int(row["step"]), float(row["psnr_x2"])) for row in curve if row["psnr_x2"]]
    assert [step for step, _ in validated] == [20, 40, 60, 80] and validated[-1][1] > validated[0][1]
    run = json.loads((tmp_path / "model-run.json").read_text())
    assert run["steps"] == 80 and run["spec"] == SPEC and run["stored_as"] in ("float16", "float32")
    saved = evaluation.read_csv(tmp_path / "model-psnr.csv")
    again = evaluation.evaluate(checkpoints.load(weights), evaluation.read_folder(folder), budget.TABLE_SCALES)
    assert [row.model for row in saved] == pytest.approx([row.model for row in again], abs=1e-3)
    assert f"wrote {weights}" in capsys.readouterr().out


@pytest.mark.parametrize("workers", [0, 1])
def test_resumed_run_equals_an_uninterrupted_one(folder, tmp_path, workers):
    settings = dataclasses.replace(SMALL, workers=workers, autocast=True)
    whole = train(SPEC, folder, out=tmp_path / "whole", steps=12, settings=settings, report=lambda line: None)

    class Killed(Exception):
        pass

    update = Trainer.update

    def killed_at_step_7(self, batch, fraction):
        if self.step == 7:
            raise Killed
        update(self, batch, fraction)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        patch.setattr(Trainer, "update", killed_at_step_7)
        arguments = {"out": tmp_path / "cut", "steps": 12, "settings": settings, "checkpoint_seconds": 0}
        train(SPEC, folder, **arguments, report=lambda line: None)
    assert not (tmp_path / "cut" / "model.safetensors").exists()
    lines: list[str] = []
    cut = train(SPEC, folder, **arguments, resume=True, report=lines.append)
    assert lines[0].startswith("resumed at step 7 ")
    assert_same_tensors(checkpoints.load(cut).state_dict(), checkpoints.load(whole).state_dict())
    ours, theirs = (torch.load(path.parent / "checkpoint.pt", weights_only=True) for path in (cut, whole))
    assert [row[0] for row in ours["curve"]] == [row[0] for row in theirs["curve"]]
    assert [row[3] for row in ours["curve"]] == [row[3] for row in theirs["curve"]]  # losses
    assert_same_tensors(ours["model"], theirs["model"])
    for key, moments in theirs["optimizer"]["state"].items():
        assert_same_tensors(ours["optimizer"]["state"][key], moments)


def assert_same_tensors(ours, theirs):
    assert ours.keys() == theirs.keys()
    for key, value in theirs.items():
        assert torch.equal(ours[key], value), key


def test_a_checkpoint_is_neither_overwritten_nor_mixed_with_other_settings(folder, tmp_path):
    train(SPEC, folder, out=tmp_path, steps=1, settings=SMALL, report=lambda line: None)
    before = (tmp_path / "checkpoint.pt").read_bytes()
    with pytest.raises(ValueError, match="--resume"):
        train(SPEC, folder, out=tmp_path, steps=2, settings=SMALL)
    other = dataclasses.replace(SMALL, lr=0.5)
    with pytest.raises(ValueError, match=r"lr 0\.001 -> 0\.5"):
        train(SPEC, folder, out=tmp_path, steps=2, settings=other, resume=True)
    with pytest.raises(ValueError, match="model's spec"):
        train(small_spec(2, 8, (8, 8)), folder, out=tmp_path, steps=2, settings=SMALL, resume=True)
    assert (tmp_path / "checkpoint.pt").read_bytes() == before


@pytest.mark.parametrize("lr", [math.inf, 1e25])
def test_a_loss_that_is_no_number_stops_the_run_before_it_is_saved(folder, tmp_path, lr):
    with pytest.raises(RuntimeError, match="lower lr") as stopped:
        settings = dataclasses.replace(SMALL, lr=lr, warmup=0)
        train(SPEC, folder, out=tmp_path, steps=50, settings=settings, report=lambda line: None)
    assert "\n" not in str(stopped.value)
    assert not (tmp_path / "model.safetensors").exists()


def test_learning_rate_warms_up_and_falls_with_the_budget():
    trainer = Trainer(SPEC, dataclasses.replace(SMALL, lr=1.0, warmup=4, final_lr=0.1))
    assert [trainer.learning_rate(0.0)] == [0.25]
    trainer.step = 100
    assert trainer.learning_rate(0.0) == 1
    assert trainer.learning_rate(0.5) == pytest.approx(0.55)
    assert trainer.learning_rate(1.0) == pytest.approx(0.1)


def test_budget_counts_minutes_or_steps():
    assert Budget(None, 10).fraction(4, 1e9) == 0.4
    assert Budget(2, None).fraction(1000, 30) == 0.25
    assert Budget(2, None).fraction(0, 1e9) == 1
    for minutes, steps in ((None, None), (1, 1), (0, None), (None, -1), (math.nan, None)):
        with pytest.raises(ValueError, match=r"budget"):
            Budget(minutes, steps)


def test_averaged_weights_follow_the_model():
    trainer = Trainer(SPEC, dataclasses.replace(SMALL, ema=0.5))
    batch = {"inp": torch.rand(1, 3, 8, 8), "coord": torch.rand(1, 9, 2), "cell": torch.full((1, 9, 2), 0.1)}
    batch["gt"] = torch.rand(1, 9, 3)
    key = "imnet.layers.0.weight"
    start = trainer.average.state_dict()[key].clone()
    trainer.update(batch, 0.0)
    first = trainer.model.state_dict()[key].clone()
    mean = start + 0.9 * (first - start)  # the first step weighs 1 / 10
    assert torch.allclose(trainer.average.state_dict()[key], mean, atol=1e-7)
    for _ in range(10):
        trainer.update(batch, 0.0)
    before = trainer.average.state_dict()[key].clone()
    trainer.update(batch, 0.0)
    assert torch.allclose(trainer.average.state_dict()[key], (before + trainer.model.state_dict()[key]) / 2, atol=1e-7)


def test_command_trains_within_minutes_and_refuses_nonsense(folder, tmp_path, capsys):
    small = ["--blocks", "1", "--feats", "8", "--hidden", "8", "--inp-size", "8", "--sample-q", "32", "--workers", "0"]
    arguments = ["--images", str(folder), "--val", str(folder), "--out", str(tmp_path / "run"), *small]
    assert budget.main([*arguments, "--minutes", "0.02", "--shrink", "1", "--no-augment"]) == 0
    assert (tmp_path / "run" / "tiny.safetensors").exists() and (tmp_path / "run" / "tiny-psnr.csv").exists()
    settings = json.loads((tmp_path / "run" / "tiny-run.json").read_text())["settings"]
    assert settings["inp_size"] == 8 and settings["augment"] is False and settings["shrink"] == [1]
    capsys.readouterr()
    assert budget.main([*arguments, "--minutes", "1"]) == 1
    message = capsys.readouterr().err
    assert "--resume" in message and message.count("\n") == 1
    with pytest.raises(SystemExit):
        budget.main([*arguments, "--minutes", "1", "--steps", "1"])


def manifest(path, names):
    columns = ("file", "author", "licence", "source_package", "source_version", "transform")
    with open(path, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow([*columns, "sha256"])
        writer.writerows([name, "Ada | Bob", "CC0-1.0", "package", "1.0", "none", "00"] for name in names)
    return path


def test_model_card_says_what_the_run_saved(folder, tmp_path, capsys):
    train(SPEC, folder, val=folder, out=tmp_path, steps=2, settings=SMALL, name="small", report=lambda line: None)
    manifests = [manifest(tmp_path / name, ["a.png", "b.png"]) for name in ("train.csv", "val.csv")]
    arguments = ["--run", str(tmp_path), "--name", "small", "--out", str(tmp_path / "small.md")]
    arguments += ["--train-manifest", str(manifests[0]), "--val-manifest", str(manifests[1])]
    assert model_card.main(arguments) == 0
    card = (tmp_path / "small.md").read_text()
    means = evaluation.mean_scores(evaluation.read_csv(tmp_path / "small-psnr.csv"))
    assert evaluation.markdown_table(means) in card
    assert card.count("| a.png | Ada \\| Bob | CC0-1.0 | package | 1.0 | none |") == 2
    parameters = sum(value.numel() for value in make_model(SPEC).parameters() if value.requires_grad)
    assert f"{parameters:,} parameters" in card and "| inp_size | 8 |" in card and "| shrink | 1 |" in card
    assert "The start is exact bilinear interpolation" in card
    for part in ("run.json", "curve.csv"):
        (tmp_path / f"small-{part}").rename(tmp_path / f"small-start-{part}")
    onward = dataclasses.replace(SMALL, init=str(tmp_path / "small.safetensors"), lr=0.0005)
    train(
        SPEC, folder, val=folder, out=tmp_path / "on", steps=3, settings=onward, name="small", report=lambda line: None
    )
    for part in ("run.json", "curve.csv"):
        (tmp_path / f"small-start-{part}").rename(tmp_path / "on" / f"small-start-{part}")
    arguments[1] = str(tmp_path / "on")
    assert model_card.main(arguments) == 0
    now, before = (tmp_path / "small.md").read_text().split("### The earlier run")
    assert "3 steps in" in now and "averaged weights of an earlier run" in now and "| lr | 0.0005 |" in now
    assert "2 steps in" in before and "exact bilinear interpolation" in before and "| lr | 0.001 |" in before
    (tmp_path / "val.csv").write_text("file,author\n")
    assert model_card.main(arguments) == 1
    assert "no column licence, source_package" in capsys.readouterr().err


@pytest.mark.parametrize("spec", [SPEC, {"name": "metasr", "args": {"encoder_spec": SPEC["args"]["encoder_spec"]}}])
def test_a_run_can_begin_with_a_trained_model_or_its_encoder(tmp_path, spec):
    torch.manual_seed(5)
    trained = make_model(SPEC)
    checkpoints.save(trained, tmp_path / "trained.safetensors")
    begin = dataclasses.replace(SMALL, init=str(tmp_path / "trained.safetensors"), init_part="encoder")
    assert_same_tensors(Trainer(spec, begin).model.encoder.state_dict(), trained.encoder.state_dict())
    if spec is SPEC:
        whole = dataclasses.replace(begin, init_part="model")
        assert_same_tensors(Trainer(spec, whole).model.state_dict(), trained.state_dict())
    with pytest.raises(ValueError, match="do not fit"):
        Trainer(small_spec(2, 8, (8, 8)), begin)
