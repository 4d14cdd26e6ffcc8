"""What becomes of results: the README's tables and plots say what was saved, and nothing else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bench import machine, measure, report, results, tables

pytest_plugins = ["bench_tiny"]

ELSEWHERE = ("train-step", "study", "loader")  # blocks of other programs' files, which have tests of their own


def readme(*names: str) -> str:
    return "".join(f"## {name}\n<!-- bench:{name} -->\nSTALE\n<!-- /bench:{name} -->\nafter\n" for name in names)


def test_report_writes_every_block_and_check_notices_a_change(
    result: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = results.save(result, tmp_path / "results")
    assert path.parent.name == machine.slug(result["machine"])
    file = tmp_path / "README.md"
    blocks = [name for name in tables.BLOCKS if name not in ELSEWHERE]
    file.write_text(readme(*blocks))

    def report_main(*extra: str) -> None:
        arguments = ["bench.report", "--readme", str(file), "--results", str(tmp_path / "results"), *extra]
        monkeypatch.setattr("sys.argv", arguments)
        report.main()

    with pytest.raises(SystemExit, match="differs from the saved results"):
        report_main("--check")
    report_main()
    text = file.read_text()
    assert "STALE" not in text and text.count("after\n") == len(blocks)
    assert report.block_names(text) == blocks
    assert "plots/sizes.png" in text and "plots/parts.png" in text and "plots/gpu-" not in text
    assert "330 MB" in text and "from 4 of its 140 chunks" in text and path.name in text
    report_main("--check")

    file.write_text(text.replace("330 MB", "329 MB"))
    with pytest.raises(SystemExit, match="differs from the saved results"):
        report_main("--check")


def test_the_newest_result_with_the_numbers_counts(result: dict[str, Any], tmp_path: Path) -> None:
    older = {**result, "date": "2001-01-01T00:00:00Z"}
    gather_only = {"gather": result["workloads"]["gather"]}
    for made in ({**result, "name": "late", "workloads": gather_only}, older):
        results.save(made, tmp_path)
    found = results.load_all(tmp_path)
    assert [each["name"] for each in found] == ["tiny", "late"]
    assert "2001-01-01" in tables.BLOCKS["decode"](found)
    assert "2001-01-01" not in tables.BLOCKS["gather"](found)


@pytest.mark.parametrize(
    "slow, fraction, doubt", [(1, 0.9, None), (2, 0.9, "was shared"), (0, 1.1, "outran the multiply-add loop")]
)
def test_numbers_not_to_be_believed_are_marked(
    result: dict[str, Any], slow: int, fraction: float, doubt: str | None
) -> None:
    record = {
        **result["workloads"]["gather"],
        "loop_flop_per_second": {"float32": {"median": 100.0, "samples": [*[50.0] * slow, *[100.0] * (5 - slow)]}},
    }
    entry = {**record["methods"]["original"], "fraction_of_loop": {"median": fraction}}
    record["methods"] = {"original": entry}
    record["warnings"] = measure.doubts(record)
    table = tables.BLOCKS["gather"]([{**result, "workloads": {"gather": record}, "path": "cpu/file.json"}])
    assert len(record["warnings"]) == (doubt is not None)
    assert "do not rely" not in table if doubt is None else doubt in table


@pytest.mark.parametrize(
    "text, message",
    [
        (readme("speed"), "bench:speed"),
        (readme("decode"), "make bench"),
        ("<!-- bench:decode -->\n", "lacks its"),
        (readme("decode") + "<!-- /bench:memory -->", "lacks its"),
    ],
)
def test_report_refuses_blocks_it_cannot_fill(text: str, message: str) -> None:
    with pytest.raises(report.ReportError, match=message):
        report.rewrite(text, [])


def test_the_readmes_numbers_are_the_saved_ones() -> None:
    text = report.README.read_text()
    assert {"decode", "training", "memory"} <= set(report.block_names(text))
    assert report.rewrite(text, results.load_all()) == text, "run `python -m bench.report`"


@pytest.mark.parametrize(
    "line, loose",
    [
        ("It takes 4.2 ms on a laptop.", True),
        ("Three times faster, or 7.9x faster.", True),
        ("At 93 % of the loop, 436 GFLOP/s.", True),
        ("The gain is 1.6 dB.", True),
        ("(1.7x fewer operations)", False),
        ("a tile of 24 queries x 4 corners, 30,000-query chunks, Python >= 3.10", False),
    ],
)
def test_a_measured_number_outside_the_blocks_is_noticed(line: str, loose: bool) -> None:
    text = f"{readme('decode').replace('STALE', '5 ms')}\n```\nsleep 5 ms\n```\n{line}\n"
    assert report.loose_numbers(text) == ([line] if loose else [])


def test_the_readme_claims_no_number_without_a_result() -> None:
    assert report.loose_numbers(report.README.read_text()) == []


def test_without_a_gpus_result_its_block_says_so(result: dict[str, Any]) -> None:
    assert tables.BLOCKS["gpu"]([result]) == tables.NOT_YET == "Not yet run on a GPU.\n"
    machine_of = {**result["machine"], "device": "cuda", "gpu": "Some GPU", "driver": "1"}
    record = {**result["workloads"]["decode-64-to-256"]}
    made = {**result, "machine": machine_of, "workloads": {"decode-256-to-1024": record}, "path": "some-gpu/x.json"}
    result = {**result, "path": "cpu/y.json"}
    table = tables.BLOCKS["gpu"]([made, result])
    assert table is not None and "Some GPU, driver 1" in table and "of cuBLAS" in table
    assert "Some GPU" not in (tables.BLOCKS["decode"]([result, made]) or "")


def test_plots_are_drawn_for_whatever_has_numbers(result: dict[str, Any], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from bench import plots

    wanted = {"ladder", "sizes", "sweep", "batches", "parts"}
    assert {path.name for path in plots.draw([result], tmp_path)} == {
        f"{name}.{suffix}" for name in wanted for suffix in ("png", "svg")
    }
    first = (tmp_path / "sizes.svg").read_bytes()
    plots.draw([result], tmp_path)
    assert (tmp_path / "sizes.svg").read_bytes() == first, "the same numbers give the same file"
    out = {
        **result["workloads"]["size-2048"]["methods"]["original"],
        "status": "out of memory",
        "reason": "out of memory",
    }
    del out["seconds"], out["peak_bytes"]
    result = json.loads(json.dumps(result))
    result["workloads"]["size-2048"]["methods"]["original"] = out
    plots.draw([result], tmp_path)
    assert b"out of memory" in (tmp_path / "sizes.svg").read_bytes()
    assert plots.draw([], tmp_path) == []
