"""How good models are: the paper's protocols, tables over scales and methods, plots, a visual comparison.

metrics.py: PSNR and SSIM of one picture. protocol.py: a loader's items, as the original's test.py scores them.
scores.py: one model beside bicubic on a folder. study.py: many methods, scales and images -> tables.py, figures.py.
"""

from liif_fast.evaluation.metrics import METRICS, parse_protocol, psnr, ssim
from liif_fast.evaluation.protocol import eval_metrics_sum, eval_psnr, eval_psnr_sum
from liif_fast.evaluation.scores import (
    Score,
    evaluate,
    markdown_table,
    mean_scores,
    predict,
    read_csv,
    read_folder,
    write_csv,
)

__all__ = [
    "METRICS",
    "Score",
    "eval_metrics_sum",
    "eval_psnr",
    "eval_psnr_sum",
    "evaluate",
    "markdown_table",
    "mean_scores",
    "parse_protocol",
    "predict",
    "psnr",
    "read_csv",
    "read_folder",
    "ssim",
    "write_csv",
]
