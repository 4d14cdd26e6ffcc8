"""PSNR, RMSE and SSIM of one image, with the borders and the colors that the paper compares."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

LUMA_WEIGHTS = (65.738 / 256, 129.057 / 256, 25.064 / 256)
LUMA_OFFSET = 16 / 255  # added to luma; it cancels in PSNR but not in SSIM
DIV2K_BORDER = 6  # pixels that div2k removes in addition to the scale
_SSIM_WINDOW = 11  # pixels


def parse_protocol(protocol: str | None) -> tuple[str | None, int]:
    """'div2k-4' -> ('div2k', 4), 'benchmark-2' -> ('benchmark', 2), None -> (None, 0); otherwise ValueError."""
    if protocol is None:
        return None, 0
    kind, _, scale = protocol.partition("-")
    if kind not in ("div2k", "benchmark") or not scale.isdecimal() or int(scale) < 1:
        raise ValueError(f"protocol is {protocol!r}; give 'div2k-N' or 'benchmark-N' with a whole scale N, or None")
    return kind, int(scale)


def psnr(pred: Tensor, target: Tensor, protocol: str | None = None) -> float:
    """Peak signal-to-noise ratio in dB, over all pixels of an image or of a batch.

    pred, target: [..., C, H, W] in [0, 1]; they are not rounded to 8 bits. protocol: 'div2k-N' removes a border of
    N + 6 pixels on each side; 'benchmark-N' removes N pixels and compares luma if there are three channels; None
    compares all pixels. Identical images give infinity. Pixels whose target is NaN are left out; without others the
    score is NaN.
    Raises ValueError for different shapes, or if the border is larger than the image.
    Source: original utils.py, calc_psnr; paper, section 4.
    """
    error = rmse(pred, target, protocol)
    return math.inf if error == 0 else -20 * math.log10(error)


def rmse(pred: Tensor, target: Tensor, protocol: str | None = None) -> float:
    """Root of the mean squared error, where the values' range is [0, 1]; arguments and masks as for `psnr`."""
    pred, target = _compared(pred, target, protocol)
    valid = ~target.isnan()
    return math.sqrt(float((pred[valid] - target[valid]).square().mean()))


def ssim(pred: Tensor, target: Tensor, protocol: str | None = None) -> float:
    """Structural similarity of one image, from torchmetrics: a Gaussian window of 11 pixels with sigma 1.5, reflection
    at the borders, mean over pixels and channels.

    Arguments as for `psnr`. Raises ValueError for different shapes or too small an image, RuntimeError without
    torchmetrics. Source: Wang et al., "Image quality assessment", 2004.
    """
    try:
        from torchmetrics.functional.image import structural_similarity_index_measure
    except ImportError as error:
        raise RuntimeError(
            f"SSIM needs torchmetrics ({error}): pip install torchmetrics, or leave ssim out of --metrics"
        ) from error
    pred, target = _compared(pred, target, protocol)
    height, width = pred.shape[-2:]
    if min(height, width) < _SSIM_WINDOW:
        raise ValueError(
            f"{height}x{width} pixels are left to compare, fewer than SSIM's window of {_SSIM_WINDOW}: "
            "leave ssim out of --metrics or use larger images"
        )
    if target.isnan().any():
        raise ValueError("SSIM cannot leave out the pixels without a value: leave ssim out of --metrics")
    # float32 is 18 times faster on a CPU than float64 and gives the same seven digits.
    pred, target = (part.reshape(-1, *part.shape[-3:]).float() for part in (pred, target))
    score = structural_similarity_index_measure(pred, target, data_range=1.0)
    assert isinstance(score, Tensor)  # a tuple is returned only with other arguments
    return float(score)


METRICS: dict[str, Callable[[Tensor, Tensor, str | None], float]] = {"psnr": psnr, "rmse": rmse, "ssim": ssim}


def check_metrics(names: Sequence[str]) -> None:
    """Raise ValueError for the first name that is not a metric."""
    if unknown := [name for name in names if name not in METRICS]:
        raise ValueError(f"no metric is named {unknown[0]!r}; choose from {', '.join(METRICS)}")


def _compared(pred: Tensor, target: Tensor, protocol: str | None) -> tuple[Tensor, Tensor]:
    """The pixels of two images that a protocol compares, in float64."""
    if pred.shape != target.shape:
        raise ValueError(f"pred {tuple(pred.shape)} and target {tuple(target.shape)} must have the same shape")
    kind, scale = parse_protocol(protocol)
    border = {"div2k": scale + DIV2K_BORDER, "benchmark": scale, None: 0}[kind]
    height, width = pred.shape[-2:]
    if min(height, width) <= 2 * border:
        raise ValueError(
            f"the image has {height}x{width} pixels, but {protocol} removes a border of {border} pixels on each side: "
            "use a larger image or a smaller scale"
        )
    pred, target = (part[..., border : height - border, border : width - border].double() for part in (pred, target))
    if kind == "benchmark" and pred.shape[-3] == len(LUMA_WEIGHTS):
        pred, target = _luma(pred), _luma(target)
    return pred, target


def _luma(rgb: Tensor) -> Tensor:
    weights = torch.tensor(LUMA_WEIGHTS, dtype=rgb.dtype, device=rgb.device).view(-1, 1, 1)
    return (rgb * weights).sum(dim=-3, keepdim=True) + LUMA_OFFSET
