"""Evaluation: the paper's metrics and protocols, comparisons of models over scales with tables, plots and pictures.

metrics.py: PSNR and SSIM of one image. protocol.py: scores of a loader's items, as in the original's test.py.
comparison.py: many methods, scales and images; tables.py and figures.py present its scores.
"""

from liif_fast.evaluation.comparison import predict
from liif_fast.evaluation.metrics import METRICS, check_metrics, parse_protocol, psnr, ssim
from liif_fast.evaluation.protocol import eval_metrics_sum, eval_psnr, eval_psnr_sum

__all__ = [
    "METRICS",
    "check_metrics",
    "eval_metrics_sum",
    "eval_psnr",
    "eval_psnr_sum",
    "parse_protocol",
    "predict",
    "psnr",
    "ssim",
]
