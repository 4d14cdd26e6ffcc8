"""The README's table of saved comparisons."""

import math

from bench import results
from bench import study as bench_study
from liif_fast.evaluation.comparison import ScoreRecord, write_records


def test_saved_comparisons_become_a_block(tmp_path, monkeypatch):
    monkeypatch.setattr(results, "FOLDER", tmp_path)
    assert bench_study.block([]) is None
    for name, ssim in (("one", 0.9), ("two", math.nan)):
        folder = tmp_path / "weights" / name / "study"
        folder.mkdir(parents=True)
        write_records(
            [
                ScoreRecord("bicubic", "1/s", 2.0, "a.png", 30.0, ssim, "x"),
                ScoreRecord("liif", "1/s", 2.0, "a.png", 31.0, ssim, "y"),
            ],
            folder / "scores.csv",
        )
    text = bench_study.block([])
    assert "**one.** PSNR in dB, mean over 1 images" in text and "**two.** PSNR in dB" in text
    assert text.count("| liif | **31.00** |") == 2 and text.count("SSIM") == 1
    assert "[weights/two/study/scores.csv](bench/results/weights/two/study/scores.csv)" in text
