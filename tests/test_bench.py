"""The benchmarks' baselines compute what the original does; the README's numbers are those of saved results."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import Case, norm_error, random_problem, reason_against
from test_golden import FILES, assert_close, golden, uniform

from bench import folded, machine, measure, memory, methods, original, report, results, run, tables, targets, timing
from bench.workloads import WORKLOADS, folded_flop, original_flop

TINY: dict[str, dict[str, Any]] = {
    "decode-64-to-256": {"map_size": (10, 12), "out_size": (25, 31)},
    "training-step": {"map_size": (7, 6), "batch": 2, "queries": 90},
    "gather": {"map_size": (9, 8), "queries": 120},
    "ensemble": {"queries": 200},
    "scale-x2": {"map_size": (6, 6), "out_size": (12, 12)},
    "scale-x3.7": {"map_size": (6, 6), "out_size": (22, 22)},
    "scale-x8": {"map_size": (6, 6), "out_size": (48, 48), "window": (20, 20, 8, 8)},
    "scale-x30": {"map_size": (6, 6), "out_size": (180, 180), "window": (80, 80, 8, 8)},
    "encoder": {"map_size": (12, 12)},
    "upscale-photo": {"map_size": (12, 12), "out_size": (48, 48)},
}
MEMORY = {
    "original": {"peak_bytes": 3_000_000_000, "note": "its first 4 chunks of 140"},
    "cpu-fp32": {"peak_bytes": 330_000_000},
    "cpu-bf16": {"peak_bytes": 210_000_000},
}
WITH_IMNET = [file for file in FILES if file.stem.startswith("liif-") and file.stem != "liif-no-imnet"]
FLOATS = [(torch.float64, 1e-10), (torch.float32, 1e-5)]


def imnet_of(case: Any, dtype: torch.dtype) -> torch.nn.Sequential:
    """The imnet of a golden file; its gradients are stored for every layer."""
    keys = [key.removeprefix("grad.") for key in case.numbers if key.startswith("grad.imnet.")]
    layers = sorted({int(key.split(".")[2]) for key in keys})
    hidden = case.spec["args"]["imnet_spec"]["args"]["hidden_list"]
    assert len(layers) == len(hidden) + 1, "the file does not tell every layer's shape"

    def layer(index: int, kind: str) -> torch.Tensor:
        key = f"imnet.layers.{index}.{kind}"
        shape = case.numbers[f"grad.{key}"].shape
        scale = 0.05 if len(shape) == 1 else (6 / shape[1]) ** 0.5
        return (uniform(key, shape, case.seed) * scale).to(dtype)

    return original.make_imnet([layer(i, "weight") for i in layers], [layer(i, "bias") for i in layers])


@pytest.mark.parametrize("dtype, tolerance", FLOATS, ids=["float64", "float32"])
@pytest.mark.parametrize("file", WITH_IMNET, ids=lambda file: file.stem)
def test_the_baseline_is_the_original(file: Path, dtype: torch.dtype, tolerance: float) -> None:
    case = golden(file)
    flags = case.spec["args"]
    feat = case.numbers["feat_f64"].to(dtype)
    coord = case.coord.to(dtype)
    cell = case.cell.to(dtype) if flags.get("cell_decode", True) else None
    imnet = imnet_of(case, dtype)
    switches = {name: flags.get(name, True) for name in ("local_ensemble", "feat_unfold")}

    out = original.query(feat, coord, cell, imnet, **switches)
    assert_close(out, case.numbers["out_f64"], tolerance, "out")
    (out * uniform("probe", out.shape, case.seed).to(dtype)).sum().backward()
    for name, parameter in imnet.named_parameters():
        expected = case.numbers[f"grad.imnet.layers.{name}"]
        assert_close(parameter.grad, expected, tolerance, f"grad of {name}")


@pytest.mark.parametrize("stem", ["liif-full", "liif-paper-width"])
def test_the_baseline_in_chunks_is_the_original(stem: str) -> None:
    case = golden(next(file for file in FILES if file.stem == stem))
    out = original.predict(case.numbers["feat_f64"], case.coord, case.cell, imnet_of(case, torch.float64), chunk=50)
    assert case.coord.shape[1] > 50
    assert_close(out, case.numbers["out_f64"], 1e-10, "out")


@pytest.mark.parametrize("tile", [50, None])
def test_the_folded_baseline_is_the_original(tile: int | None) -> None:
    problem = random_problem(Case(batch=2, hidden=(24, 16)))
    feat, coord, cell, weights, biases = problem
    expected = original.query(feat, coord, cell, original.make_imnet(weights, biases))
    assert norm_error(folded.query(*problem, tile=tile), expected) < 1e-12


def test_work_is_counted_as_the_formulas_say() -> None:
    decode = WORKLOADS["decode-64-to-256"]
    assert original_flop(decode) == 2 * 4 * 256**2 * 345_856
    assert folded_flop(decode) == 2 * (4 * 256**2 * 198_400 + 64**2 * 576 * 256)
    window = WORKLOADS["scale-x30"]
    assert window.total_queries == 256**2
    training = WORKLOADS["training-step"]
    assert folded_flop(training) == 3 * 2 * (4 * 16 * 2304 * 198_400 + 16 * 48**2 * 576 * 256)


@pytest.fixture(scope="module")
def result() -> dict[str, Any]:
    """What `bench.run` makes of tiny workloads; compiling is left out for its time, memory because it takes 512x512."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(timing, "_MIN_SAMPLE_S", 0.0)
        patch.setattr(timing, "_LOOP_S", 0.001)
        for name, sizes in TINY.items():
            patch.setitem(WORKLOADS, name, replace(WORKLOADS[name], **sizes))
        patch.setattr(
            measure,
            "methods_for",
            lambda *args, **kw: [m for m in methods.methods_for(*args, **kw) if m.name != "original-compiled"],
        )
        made = run.run(list(TINY), quick=False, rounds=2, name="tiny")
    labels = {method.name: measure._describe(method) for method in methods.BY_KIND["memory"]}
    made["workloads"]["memory-512-to-2048"] = {
        "about": "decoder",
        "methods": {
            name: {**labels[name], "allowed_bytes": 382_000_000, **numbers} for name, numbers in MEMORY.items()
        },
    }
    return made


def test_every_method_computes_the_workload(result: dict[str, Any]) -> None:
    cpu_runs = not reason_against("cpu", "query", torch.float32)
    for name in TINY:
        for method, entry in result["workloads"][name]["methods"].items():
            if method.startswith("cpu") and not cpu_runs:
                assert entry["status"] == "failed" and "extension" in entry["reason"]
                continue
            assert entry["status"] == "ok", f"{name}, {method}: {entry.get('reason')}"
            assert len(entry["seconds"]["samples"]) == 2
            low = entry["dtype"] == "bfloat16"
            assert entry.get("psnr_db", 200) > (35 if low else 100), f"{name}, {method}"
            assert entry.get("gradient_error", 0) < (0.2 if low else 1e-3), f"{name}, {method}"
            if not name.startswith(("encoder", "gather", "ensemble", "upscale")):
                assert entry["gflop_per_second"] > 0


def test_a_result_names_its_machine_and_code(result: dict[str, Any]) -> None:
    assert result["machine"]["threads"] == torch.get_num_threads()
    assert result["machine"]["cpu"] and result["machine"]["instructions"]
    assert result["versions"]["torch"] == torch.__version__
    assert result["commit"] and result["date"].endswith("Z") and result["command"].startswith("python -m bench.run")


def readme(*names: str) -> str:
    return "".join(f"## {name}\n<!-- bench:{name} -->\nSTALE\n<!-- /bench:{name} -->\nafter\n" for name in names)


def test_report_writes_every_block_and_check_notices_a_change(
    result: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = results.save(result, tmp_path / "results")
    assert path.parent.name == machine.slug(result["machine"])
    file = tmp_path / "README.md"
    file.write_text(readme(*tables.BLOCKS))

    def report_main(*extra: str) -> None:
        arguments = ["bench.report", "--readme", str(file), "--results", str(tmp_path / "results"), *extra]
        monkeypatch.setattr("sys.argv", arguments)
        report.main()

    with pytest.raises(SystemExit, match="differs from the saved results"):
        report_main("--check")
    report_main()
    text = file.read_text()
    assert "STALE" not in text and text.count("after\n") == len(tables.BLOCKS)
    assert report.block_names(text) == list(tables.BLOCKS)
    assert "330 MB" in text and "its first 4 chunks of 140" in text and path.name in text
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
    "p20, fraction, doubt", [(96.0, 0.9, None), (90.0, 0.9, "was shared"), (96.0, 1.1, "outran the multiply-add loop")]
)
def test_numbers_not_to_be_believed_are_marked(
    result: dict[str, Any], p20: float, fraction: float, doubt: str | None
) -> None:
    record = {
        **result["workloads"]["gather"],
        "loop_flop_per_second": {"float32": {"median": 100.0, "p20": p20, "p80": 101.0}},
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


def test_targets_are_judged_by_what_was_measured() -> None:
    entry = {"speedup": {"median": 3.6}, "fraction_of_loop": {"median": 0.79}}
    workloads = {
        "decode-64-to-256": {"methods": {"cpu-fp32": entry, "cpu-bf16": {"status": "failed", "reason": "no memory"}}},
        "memory-512-to-2048": {"methods": {"cpu-fp32": {"peak_bytes": 10**9, "allowed_bytes": 10**8}}},
    }
    verdicts = [targets.judge(target, workloads) for target in targets.TARGETS]
    met = [None if verdict is None else verdict.met for verdict in verdicts]
    assert met == [True, False, False, False, None, False, None]
    assert verdicts[2] is not None and verdicts[2].measured == "no memory"
    entry["fraction_of_loop"]["median"] = 2.6  # of a peak: not credible
    verdict = targets.judge(targets.TARGETS[1], workloads)
    assert verdict is not None and not verdict.met


def test_contenders_take_turns_and_a_failure_is_a_result() -> None:
    turns: list[str] = []

    def fail() -> None:
        turns.append("b")
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")

    good = timing.Contender("a", lambda: turns.append("a"))
    bad = timing.Contender("b", fail)
    assert timing.interleave([good, bad], 3, []) == {}
    assert turns == ["a", "b", "a", "a"]
    assert len(good.samples) == 3 and bad.error == "out of memory" and not bad.samples


def test_summary_and_ratios() -> None:
    assert timing.summary([3.0, 1.0, 2.0, 5.0, 4.0, 6.0]) == {
        "median": 3.5,
        "p20": 2.0,
        "p80": 5.0,
        "samples": [3.0, 1.0, 2.0, 5.0, 4.0, 6.0],
    }
    assert timing.summary([2.0])["p80"] == 2.0
    assert timing.pair_ratios([6.0, 9.0], [3.0, 3.0]) == [2.0, 3.0]


@pytest.mark.parametrize("dtype", timing.loop_dtypes())
def test_the_loop_is_faster_than_a_library_product(dtype: str) -> None:
    """By the thread's own processor time, as other programs may run beside it; best of a few, so that clocks are up."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        a = torch.randn(512, 512).to(getattr(torch, dtype))
        product = max(_rate(lambda: (a @ a, 2.0 * 512**3)[1]) for _ in range(20))
        count = timing._loop_repetitions(dtype)
        loop = max(_rate(lambda: torch.ops.liif_fast_C.cpu_multiply_add_loop(dtype, count)) for _ in range(5))
    finally:
        torch.set_num_threads(threads)
    assert loop > product > 0, "the loop waits for something: is it kept in registers?"


def _rate(work: Callable[[], float]) -> float:
    begin = time.thread_time()
    flop = work()
    return flop / (time.thread_time() - begin)


@pytest.mark.skipif(not timing.loop_dtypes(), reason=reason_against("cpu", "query", torch.float32) or "no loop")
def test_two_threads_run_the_loop_at_once() -> None:
    """Loosely: other programs may take the processors away at any moment."""
    threads = torch.get_num_threads()
    rates = []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            rates.append(timing.loop_rate("float32"))
    finally:
        torch.set_num_threads(threads)
    assert rates[1] > rates[0] / 4 > 0


def test_preparing_is_stopped_when_it_takes_too_long() -> None:
    with pytest.raises(measure.TooSlow, match="more than 0 s"), measure.time_limit(0.05):
        time.sleep(5)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="this system does not tell a process' memory")
def test_memory_is_measured_in_a_process_of_its_own() -> None:
    workload = WORKLOADS["scale-x2"]
    peaks = {}
    for name in ("original", "folded-eager"):
        entry = memory.measure(name, workload)
        assert entry["status"] == "ok", entry
        peaks[name] = entry["peak_bytes"]
    unfolded = 96 * 96 * 576 * 4
    latent_map = 96 * 96 * 256 * 4
    assert peaks["original"] > unfolded + 30_000 * 580 * 4
    assert latent_map < peaks["folded-eager"] < peaks["original"]
    assert memory.allowance(workload, torch.float32) == latent_map + 192 * 192 * 3 * 4 + 64 * 10**6


@pytest.mark.parametrize(
    "cpu, architecture, threads, expected",
    [
        ("AMD EPYC", "zen4", 2, "cpu-amd-epyc-zen4-2-threads"),
        ("Intel(R) Xeon(R) CPU @ 2.20GHz", "", 1, "cpu-intel-xeon-1-thread"),
        ("AMD Ryzen 9 7950X 16-Core Processor", "zen4", 16, "cpu-amd-ryzen-9-7950x-16-core-zen4-16-threads"),
    ],
)
def test_slug(cpu: str, architecture: str, threads: int, expected: str) -> None:
    assert machine.slug({"cpu": cpu, "architecture": architecture, "threads": threads}) == expected


def test_result_files_of_another_schema_are_refused(tmp_path: Path) -> None:
    (tmp_path / "cpu-x").mkdir()
    (tmp_path / "cpu-x" / "2001-01-01-full.json").write_text(json.dumps({"schema": 0}))
    with pytest.raises(ValueError, match="schema 0"):
        results.load_all(tmp_path)
