"""The README's table of the shipped weights over scales, from what `liif-fast evaluate --images` saved.

`bench/results/weights/<name>/study/scores.csv` holds the scores of every image.
"""

from __future__ import annotations

from typing import Any

from bench import results
from liif_fast.evaluation import comparison, tables


def block(_: list[dict[str, Any]]) -> str | None:
    """The README's block: every saved comparison's tables, or None where there is none."""
    parts = []
    for path in sorted((results.FOLDER / "weights").glob("*/study/scores.csv")):
        rows = comparison.read_records(path)
        metrics = ["psnr"] + (["ssim"] if all(row.ssim == row.ssim for row in rows) else [])
        where = path.relative_to(results.FOLDER).as_posix()
        text = f"**{path.parent.parent.name}.** {tables.markdown(rows, protocol='div2k', metrics=metrics)}"
        parts.append(f"{text}\nScores of every image: [{where}](bench/results/{where}).\n")
    return "\n".join(parts) or None
