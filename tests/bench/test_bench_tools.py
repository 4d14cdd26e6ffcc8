"""bench.compare, bench.roofline, bench.run's command line, and the workloads as tests of pytest-benchmark."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from bench import compare, results, roofline, run
from bench.workloads import WORKLOADS
from liif_fast.benchmark.timing import summary

ROOT = Path(__file__).resolve().parents[2]
CPU = {"device": "cpu", "cpu": "AMD EPYC", "architecture": "zen4", "threads": 2}


def made(**entries: dict[str, Any]) -> dict[str, Any]:
    """A result of one workload, with the given methods."""
    record = {"about": "decoder", "methods": {name: {"status": "ok", **entry} for name, entry in entries.items()}}
    return {
        "schema": results.SCHEMA,
        "name": "x",
        "date": "2001-01-01T00:00:00Z",
        "machine": dict(CPU),
        "workloads": {"decode-64-to-256": record},
    }


def seconds(*samples: float) -> dict[str, Any]:
    return {"seconds": summary(samples)}


@pytest.mark.parametrize(
    "old, new, words, worse",
    [
        (seconds(1.0, 1.1, 1.2), seconds(1.3, 1.4, 1.5), "slower: 1100 -> 1400 ms (+27%)", True),
        (seconds(1.0, 1.1, 1.2), seconds(1.05, 1.15, 1.25), None, False),  # inside the noise
        (seconds(1.3, 1.4, 1.5), seconds(1.0, 1.1, 1.2), "faster", False),
        ({"peak_bytes": 10**8}, {"peak_bytes": 2 * 10**8}, "memory: 100 -> 200 MB", True),
        ({"peak_bytes": 10**8}, {"peak_bytes": 101 * 10**6}, None, False),
        ({"psnr_db": 68.0}, {"psnr_db": 60.0}, "accuracy: 68.0 -> 60.0 dB", True),
        ({}, {"status": "failed", "reason": "boom"}, "ran before, now: boom", True),
        ({"status": "out of memory", "reason": "out of memory"}, {}, "runs now", False),
    ],
)
def test_compare_names_what_lies_beyond_the_noise(
    old: dict[str, Any], new: dict[str, Any], words: str | None, worse: bool
) -> None:
    changes = compare.compare(made(a=old), made(a=new))
    assert len(changes) == (words is not None)
    if words is not None:
        assert words in changes[0].what and changes[0].worse is worse and changes[0].method == "a"


def test_compare_says_what_it_compared_and_fails_for_a_regression(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    old, new = made(a=seconds(1.0), b=seconds(1.0)), made(a=seconds(2.0), b=seconds(0.5), c=seconds(1.0))
    old["workloads"]["decode-64-to-256"]["loop_flop_per_second"] = {"float32": summary([2e11])}
    new["workloads"]["decode-64-to-256"]["loop_flop_per_second"] = {"float32": summary([1e11])}
    paths = [str(tmp_path / name) for name in ("old.json", "new.json")]
    for path, result in zip(paths, (old, new)):
        Path(path).write_text(json.dumps(result))
    assert compare.main(paths) == 1
    text = capsys.readouterr().out
    assert "WORSE   decode-64-to-256, a: slower" in text and "better  decode-64-to-256, b: faster" in text
    assert "2 times compared, 1 worse, 1 better" in text
    assert "the machine's loop float32 changed, 200 -> 100 GFLOP/s" in text
    assert compare.main([paths[0], paths[0]]) == 0


def test_compare_refuses_two_machines_and_what_is_no_result(tmp_path: Path) -> None:
    other = made(a=seconds(1.0))
    other["machine"]["threads"] = 4
    with pytest.raises(ValueError, match="two machines"):
        compare.compare(made(a=seconds(1.0)), other)
    (tmp_path / "x.json").write_text("{")
    with pytest.raises(SystemExit, match="is no JSON"):
        compare.main([str(tmp_path / "x.json")] * 2)


def test_the_floor_is_the_larger_of_arithmetic_and_traffic() -> None:
    decode = roofline.floor(WORKLOADS["decode-256-to-1024"], "bfloat16", 798e12, 3e12)
    assert decode.bound == "arithmetic" and decode.seconds == pytest.approx(2.11e-3, rel=0.01)  # design figure: 2.09 ms
    assert decode.original_flop / decode.folded_flop == pytest.approx(1.72, abs=0.02)
    gather = roofline.floor(WORKLOADS["gather"], "float32", 798e12, 3e12)
    assert gather.bound == "memory" and gather.folded_flop == 0 and gather.seconds == gather.bytes / 3e12


def test_roofline_takes_rates_from_a_result_or_the_command_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert roofline.main(["decode-64-to-256", "--gemm", "0.2", "--copy", "20"]) == 0
    text = capsys.readouterr().out
    assert "526 ms" in text and "arithmetic" in text and "10 operations a byte" in text
    result = made(a=seconds(1.0))
    result["workloads"]["decode-64-to-256"]["gemm_flop_per_second"] = {"float32": summary([2e11])}
    path = tmp_path / "x.json"
    path.write_text(json.dumps(result))
    with pytest.raises(SystemExit, match="no copy's"):
        roofline.main(["--result", str(path)])
    result["workloads"]["gather"] = {"methods": {}, "copy_bytes_per_second": summary([2e10])}
    path.write_text(json.dumps(result))
    assert roofline.main(["decode-64-to-256", "--result", str(path)]) == 0
    assert capsys.readouterr().out == text
    for wrong in (["encoder"], ["--gemm", "1"]):
        with pytest.raises(SystemExit) as caught:
            roofline.main(wrong)
        assert caught.value.code == 2


def test_the_runs_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run.main(["--list"]) == 0
    listed = capsys.readouterr().out
    assert [line.split()[0] for line in listed.splitlines()] == list(WORKLOADS)
    assert run.chosen(["gather", "decode-64-to-256"], quick=False) == ["decode-64-to-256", "gather"]
    assert {"decode-64-to-256", "training-step"} <= set(run.chosen(None, quick=True)) < set(WORKLOADS)
    for wrong in (["--rounds", "0"], ["--budget", "0"], ["--only", "nothing"]):
        with pytest.raises(SystemExit) as caught:
            run.main(wrong)
        assert caught.value.code == 2


def test_a_run_saves_a_file_and_says_where(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its only workload is one for a GPU: recorded as skipped, and nothing was timed."""
    assert run.main(["--only", "gpu-parts", "--out", str(tmp_path), "--name", "x", "--threads", "2"]) == 1
    path = Path(capsys.readouterr().out.splitlines()[-1])
    assert path.is_relative_to(tmp_path)
    result = results.load(path)
    assert "minutes" in result["workloads"]["gpu-parts"]["skipped"] and "planned" not in result
    assert result["command"].startswith("python -m bench.run --only gpu-parts")


def test_an_unfinished_run_is_gone_on_with(tmp_path: Path) -> None:
    assert run.main(["--only", "gpu-parts", "--out", str(tmp_path), "--name", "x"]) == 1
    path = next(tmp_path.glob("*/*.json"))
    result = results.load(path)
    done = {"about": "done before", "methods": {"a": seconds(1.0)}}
    result |= {"planned": ["gpu-parts", "upscale-large"], "started": 0.0, "workloads": {"gpu-parts": done}}
    results.write(result, path)
    assert run.main(["--resume", str(path)]) == 0
    workloads = results.load(path)["workloads"]
    assert workloads["gpu-parts"] == done and "skipped" in workloads["upscale-large"]
    with pytest.raises(SystemExit, match="is finished"):
        run.main(["--resume", str(path)])
    with pytest.raises(SystemExit, match="No such file"):
        run.main(["--resume", str(tmp_path / "nowhere.json")])


def test_pytest_benchmark_is_handed_the_samples_of_the_turns(tmp_path: Path) -> None:
    pytest.importorskip("pytest_benchmark")
    # In a process of its own, as pytest's options and plugins are those of the command line.
    command = [sys.executable, "-m", "pytest", "bench/test_benchmarks.py", "-q", "-p", "no:cacheprovider"]
    command += ["-k", "ensemble/original or ensemble/reference-fp32", "--rounds", "2", "--save", "--name", "x"]
    command += ["--out", str(tmp_path), "--benchmark-json", str(tmp_path / "benchmark.json")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    result = results.load(next(tmp_path.glob("*/*-x.json")))
    methods = result["workloads"]["ensemble"]["methods"]
    assert set(methods) == {"original", "reference-fp32"}, "only what was selected takes turns"
    told = {
        b["params"]["method"]: b["stats"] for b in json.loads((tmp_path / "benchmark.json").read_text())["benchmarks"]
    }
    for name, entry in methods.items():
        samples = entry["seconds"]["samples"]
        assert told[name]["rounds"] == len(samples) == 2
        assert told[name]["min"] == pytest.approx(min(samples)) and told[name]["max"] == pytest.approx(max(samples))
    assert "skipped" in result["workloads"]["decode-256-to-1024"]
