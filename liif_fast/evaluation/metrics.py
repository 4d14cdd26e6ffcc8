"""PSNR and SSIM of one picture, with the border and the colours that the paper compares."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

LUMA_WEIGHTS = (65.738 / 256, 129.057 / 256, 25.064 / 256)
LUMA_OFFSET = 16 / 255  # of the luma channel itself; differences do not see it
DIV2K_BORDER = 6  # pixels that div2k shaves beside the scale
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
    """Peak signal-to-noise ratio in dB of one image or a batch taken as one.

    pred, target: [..., C, H, W] in [0, 1]; no rounding to 8 bits happens here. protocol: 'div2k-N' shaves N + 6 pixels
    a side, 'benchmark-N' shaves N and compares luma where there are three colours, None compares everything as it is.
    Identical images give infinity. Raises ValueError for different shapes or when shaving leaves nothing.
    Source: original utils.py, calc_psnr; paper, section 4.
    """
    pred, target = _compared(pred, target, protocol)
    error = float((pred - target).square().mean())
    return -10 * math.log10(error) if error > 0 else math.inf


def ssim(pred: Tensor, target: Tensor, protocol: str | None = None) -> float:
    """Structural similarity of one image, by torchmetrics: a Gaussian window of 11 pixels with sigma 1.5, the image
    mirrored at its border, mean over pixels and colours.

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
            f"{height}x{width} pixels are left to compare, too few for SSIM's window of {_SSIM_WINDOW}; "
            "leave ssim out of --metrics or take larger images"
        )
    # In float32: 18 times faster on a CPU, which has no quick convolution in float64, and the same to seven digits.
    pred, target = (part.reshape(-1, *part.shape[-3:]).float() for part in (pred, target))
    score = structural_similarity_index_measure(pred, target, data_range=1.0)
    assert isinstance(score, Tensor)  # a tuple only where more is asked for
    return float(score)


METRICS: dict[str, Callable[[Tensor, Tensor, str | None], float]] = {"psnr": psnr, "ssim": ssim}


def _compared(pred: Tensor, target: Tensor, protocol: str | None) -> tuple[Tensor, Tensor]:
    """What a protocol compares of two pictures, in float64."""
    if pred.shape != target.shape:
        raise ValueError(f"pred {tuple(pred.shape)} and target {tuple(target.shape)} must have the same shape")
    kind, scale = parse_protocol(protocol)
    border = {"div2k": scale + DIV2K_BORDER, "benchmark": scale, None: 0}[kind]
    height, width = pred.shape[-2:]
    if min(height, width) <= 2 * border:
        raise ValueError(f"an image of {height}x{width} pixels is nothing once {protocol} has shaved {border} a side")
    pred, target = (part[..., border : height - border, border : width - border].double() for part in (pred, target))
    if kind == "benchmark" and pred.shape[-3] == len(LUMA_WEIGHTS):
        pred, target = _luma(pred), _luma(target)
    return pred, target


def _luma(rgb: Tensor) -> Tensor:
    weights = torch.tensor(LUMA_WEIGHTS, dtype=rgb.dtype, device=rgb.device).view(-1, 1, 1)
    return (rgb * weights).sum(dim=-3, keepdim=True) + LUMA_OFFSET
