"""PSNR against values worked out by hand, and the tables and the command around it."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from liif_fast.evaluation import Score, evaluate, markdown_table, mean_scores, predict, psnr, read_csv, write_csv
from liif_fast.initialization import start_as_bilinear
from liif_fast.models import make_model
from liif_fast.training.budget import small_spec


def photograph(height, width, seed=0):
    """A smooth picture with some noise: uint8 [height, width, 3]."""
    rng = np.random.default_rng(seed)
    rows, columns = np.mgrid[:height, :width]
    waves = [np.sin(rows / 5 + colour) + np.cos(columns / (3 + colour)) for colour in range(3)]
    return np.clip(128 + 40 * np.stack(waves, axis=-1) + rng.normal(0, 4, (height, width, 3)), 0, 255).astype(np.uint8)


def bilinear_model():
    torch.manual_seed(0)
    model = make_model(small_spec(1, 8, (8,)))
    start_as_bilinear(model, residual=0.0)
    return model.eval()


def test_plain_psnr_by_hand():
    target = torch.zeros(3, 4, 4)
    pred = target.clone()
    pred[0, 0, 0] = 0.5  # mean square error 0.25 / 48
    assert psnr(pred, target) == pytest.approx(10 * math.log10(192))
    assert psnr(target, target) == math.inf


def test_div2k_shaves_the_scale_and_six_pixels():
    target = torch.zeros(3, 20, 24)
    pred = torch.ones(3, 20, 24)  # wrong everywhere but in what remains of 20 - 2 * 8 by 24 - 2 * 8 pixels
    pred[:, 8:12, 8:16] = 0.1
    assert psnr(pred, target, "div2k-2") == pytest.approx(20, abs=1e-5)
    assert psnr(pred, target, "div2k-1") < 15


def test_benchmark_compares_luma_and_shaves_the_scale():
    target = torch.full((2, 3, 10, 12), 0.5)
    pred = target + torch.tensor([0.1, 0.2, -0.3]).view(3, 1, 1)
    pred[:, :, :3] = 1
    pred[..., -3:] = 0
    luma = (0.1 * 65.738 + 0.2 * 129.057 - 0.3 * 25.064) / 256
    assert psnr(pred, target, "benchmark-3") == pytest.approx(-20 * math.log10(luma), abs=1e-4)
    grey = psnr(pred[:, :1], target[:, :1], "benchmark-3")
    assert grey == pytest.approx(20, abs=1e-4)


@pytest.mark.parametrize("protocol", ["div2k", "div2k-2.5", "benchmark-0", "set5-2"])
def test_unknown_protocols_are_refused(protocol):
    with pytest.raises(ValueError, match=protocol):
        psnr(torch.zeros(3, 40, 40), torch.zeros(3, 40, 40), protocol)


def test_shapes_that_cannot_be_compared_are_refused():
    with pytest.raises(ValueError, match="same shape"):
        psnr(torch.zeros(3, 4, 4), torch.zeros(3, 4, 5))
    with pytest.raises(ValueError, match="shaved 8"):
        psnr(torch.zeros(3, 16, 40), torch.zeros(3, 16, 40), "div2k-2")


def test_prediction_applies_the_models_normalisation_and_clamps():
    low, model = photograph(12, 15), bilinear_model()
    expected = predict(model, low, (24, 30))
    assert expected.shape == (3, 24, 30)
    # The model is linear in the colours, so another normalisation of both sides must not change the result ...
    model.data_norm = {side: {"sub": [0.4, 0.5, 0.6], "div": [0.25]} for side in ("inp", "gt")}
    assert torch.allclose(predict(model, low, (24, 30)), expected, atol=1e-5)
    # ... and one that doubles the contrast of the output has to be cut off at 1.
    model.data_norm = {"inp": {"sub": [0.0], "div": [1.0]}, "gt": {"sub": [0.0], "div": [2.0]}}
    assert torch.allclose(predict(model, low, (24, 30)), (2 * expected).clamp(0, 1), atol=1e-5)


def test_evaluate_scores_model_and_bicubic_on_the_same_pixels():
    image = photograph(63, 70)
    model = bilinear_model().train()
    scores = evaluate(model, [("one", image), ("two", photograph(48, 48, 1))], [2, 3])
    assert [score[:2] for score in scores] == [("one", 2), ("two", 2), ("one", 3), ("two", 3)]
    assert model.training
    high = image[:62]  # 63x70 by 2: 31x35, so the last row goes
    low = Image.fromarray(high).resize((35, 31), Image.Resampling.BICUBIC)
    bicubic = np.asarray(low.resize((70, 62), Image.Resampling.BICUBIC)).astype(float)
    error = ((bicubic - high)[8:-8, 8:-8] / 255) ** 2
    assert scores[0].bicubic == pytest.approx(-10 * math.log10(error.mean()), abs=1e-6)
    # The untrained model is bilinear interpolation, in floating point.
    values = torch.from_numpy(np.asarray(low).copy()).permute(2, 0, 1)[None].double() / 255
    bilinear = F.interpolate(values, size=(62, 70), mode="bilinear", align_corners=False)[0]
    target = torch.from_numpy(high.copy()).permute(2, 0, 1).double() / 255
    assert scores[0].model == pytest.approx(psnr(bilinear, target, "div2k-2"), abs=1e-3)


def test_tables_round_trip(tmp_path):
    scores = [Score("a", 2, 31.0, 30.0), Score("b", 2, 33.0, 30.5), Score("a", 3.5, 25.0, 25.25)]
    assert mean_scores(scores) == [Score("mean", 2, 32.0, 30.25), Score("mean", 3.5, 25.0, 25.25)]
    assert markdown_table(scores).splitlines()[2:] == [
        "| a | x2 | 30.00 | 31.00 | +1.00 |",
        "| b | x2 | 30.50 | 33.00 | +2.50 |",
        "| a | x3.5 | 25.25 | 25.00 | -0.25 |",
    ]
    write_csv(scores, tmp_path / "scores.csv")
    assert read_csv(tmp_path / "scores.csv") == scores
    assert (tmp_path / "scores.csv").read_text().splitlines()[-1] == "mean,3.5,25.0000,25.2500"
