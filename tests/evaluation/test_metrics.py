"""PSNR and SSIM compared with values from the paper's formulas."""

import math

import pytest
import torch
import torch.nn.functional as F

from liif_fast.evaluation import psnr, ssim


def test_plain_psnr_by_hand():
    target = torch.zeros(3, 4, 4)
    pred = target.clone()
    pred[0, 0, 0] = 0.5  # mean square error 0.25 / 48
    assert psnr(pred, target) == pytest.approx(10 * math.log10(192))
    assert psnr(target, target) == math.inf


def test_div2k_removes_the_scale_and_six_pixels():
    target = torch.zeros(3, 20, 24)
    pred = torch.ones(3, 20, 24)  # wrong outside the remaining 20 - 2 * 8 by 24 - 2 * 8 pixels
    pred[:, 8:12, 8:16] = 0.1
    assert psnr(pred, target, "div2k-2") == pytest.approx(20, abs=1e-5)
    assert psnr(pred, target, "div2k-1") < 15


def test_benchmark_compares_luma_and_removes_the_scale():
    target = torch.full((2, 3, 10, 12), 0.5)
    pred = target + torch.tensor([0.1, 0.2, -0.3]).view(3, 1, 1)
    pred[:, :, :3] = 1
    pred[..., -3:] = 0
    luma = (0.1 * 65.738 + 0.2 * 129.057 - 0.3 * 25.064) / 256
    assert psnr(pred, target, "benchmark-3") == pytest.approx(-20 * math.log10(luma), abs=1e-4)
    gray = psnr(pred[:, :1], target[:, :1], "benchmark-3")
    assert gray == pytest.approx(20, abs=1e-4)


@pytest.mark.parametrize("protocol", ["div2k", "div2k-2.5", "benchmark-0", "set5-2"])
def test_unknown_protocols_are_refused(protocol):
    with pytest.raises(ValueError, match=protocol):
        psnr(torch.zeros(3, 40, 40), torch.zeros(3, 40, 40), protocol)


def test_shapes_that_cannot_be_compared_are_refused():
    with pytest.raises(ValueError, match="same shape"):
        psnr(torch.zeros(3, 4, 4), torch.zeros(3, 4, 5))
    with pytest.raises(ValueError, match="removes a border of 8 pixels"):
        psnr(torch.zeros(3, 16, 40), torch.zeros(3, 16, 40), "div2k-2")


def test_ssim_by_hand():
    rng = torch.Generator().manual_seed(0)
    target = F.avg_pool2d(torch.rand(1, 3, 48, 60, generator=rng), 5, 1, 2)[0]
    pred = (target + 0.05 * torch.randn(3, 48, 60, generator=rng)).clamp(0, 1)

    def by_formula(x, y):
        x, y = (F.pad(each.double().unsqueeze(1), (5, 5, 5, 5), mode="reflect") for each in (x, y))
        line = torch.exp(-((torch.arange(11, dtype=torch.float64) - 5) ** 2) / (2 * 1.5**2))
        window = torch.outer(line, line).div(line.sum() ** 2)[None, None]
        means, moments = [], []
        for first, second in ((x, y), (x, x), (y, y)):
            moments.append(F.conv2d(first * second, window))
            means.append(F.conv2d(first, window))
        mean_x, mean_y = means[0], means[2]
        cov, var_x, var_y = moments[0] - mean_x * mean_y, moments[1] - mean_x**2, moments[2] - mean_y**2
        top = (2 * mean_x * mean_y + 0.01**2) * (2 * cov + 0.03**2)
        return float((top / ((mean_x**2 + mean_y**2 + 0.01**2) * (var_x + var_y + 0.03**2))).mean())

    assert ssim(pred, target) == pytest.approx(by_formula(pred, target), abs=1e-5)
    inside = slice(8, -8)
    cropped = by_formula(pred[:, inside, inside], target[:, inside, inside])
    assert ssim(pred, target, "div2k-2") == pytest.approx(cropped, abs=1e-5)
    weights = torch.tensor([65.738, 129.057, 25.064]).view(3, 1, 1) / 256
    luma = [(each * weights).sum(0, keepdim=True)[:, 2:-2, 2:-2] + 16 / 255 for each in (pred, target)]
    assert ssim(pred, target, "benchmark-2") == pytest.approx(by_formula(*luma), abs=1e-5)
    with pytest.raises(ValueError, match="6x6 pixels are left to compare, fewer than"):
        ssim(pred[:, :20, :20], target[:, :20, :20], "div2k-1")
