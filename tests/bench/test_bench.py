"""Workloads and methods: what is compared, what a result holds, and what a failure or a lack of time makes of it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from time import perf_counter
from typing import Any

import pytest
import torch

from bench import decoding, machine, measure, methods, results, sizes, tables, targets, training
from bench.method import Job
from bench.session import Session, begin
from bench.workloads import WORKLOADS, folded_flop, least_bytes, make_problem, original_flop
from liif_fast.benchmark.cuda_timing import CudaClock
from liif_fast.benchmark.timing import CpuClock
from liif_fast.ops import backends
from tests.bench.tiny_workloads import TINY
from tests.helpers import reason_against

pytest_plugins = ["bench_tiny"]


def test_work_is_counted_as_the_formulas_say() -> None:
    decode = WORKLOADS["decode-64-to-256"]
    assert original_flop(decode) == 2 * 4 * 256**2 * 345_856
    assert folded_flop(decode) == 2 * (4 * 256**2 * 198_400 + 64**2 * 576 * 256)
    window = WORKLOADS["scale-x30"]
    assert window.total_queries == 256**2
    training = WORKLOADS["training-step"]
    assert folded_flop(training) == 3 * 2 * (4 * 16 * 2304 * 198_400 + 16 * 48**2 * 576 * 256)
    assert folded_flop(WORKLOADS["training-backward"]) == 2 * folded_flop(WORKLOADS["training-forward"])
    assert least_bytes(WORKLOADS["gather"], 2) == 64**2 * 64 * 2 + 16384 * (16 + 4 * (580 * 2 + 4))
    assert least_bytes(decode, 4) == 4 * (64**2 * (64 + 2 * 256) + 256**2 * 3)


def test_the_issues_workloads_are_there_and_a_cpu_says_what_it_leaves_out() -> None:
    described = {name: (workload.map_size, workload.out_size) for name, workload in WORKLOADS.items()}
    assert described["decode-64-to-256"] == ((64, 64), (256, 256))
    assert described["decode-256-to-1024"] == ((256, 256), (1024, 1024))
    assert described["decode-540-to-2160"] == ((540, 960), (2160, 3840))
    assert [described[name][0] for name in tables.SCALES] == [(96, 96)] * 4
    assert (WORKLOADS["training-step"].batch, WORKLOADS["training-step"].queries) == (16, 2304)
    for device in ("cpu", "cuda"):
        decodes = [each for name, each in WORKLOADS.items() if name.startswith("decode") and not each.refusal(device)]
        assert {each.passes for each in decodes} == {"forward", "backward", "both"}
    left_out = {name for name, workload in WORKLOADS.items() if workload.refusal("cpu")}
    assert "decode-256-to-1024" in left_out and "decode-64-to-256" not in left_out
    assert WORKLOADS["decode-64-to-256"].refusal("cuda") and not WORKLOADS["decode-256-to-1024"].refusal("cuda")


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("name", WORKLOADS)
def test_every_backend_of_the_table_takes_part_or_says_why_not(name: str, device: str) -> None:
    workload = WORKLOADS[name]
    found = methods.methods_for(workload, device)
    assert len({method.name for method in found}) == len(found)
    if workload.kind == "encoder":
        return
    assert found[0].name == "original" and found[0].dtype == "float32" and not found[0].refusal
    for backend in backends.BACKENDS:
        if backend == "reference" and (workload.compared == "few" or workload.kind in ("upscale", "parts")):
            continue
        entries = [method for method in found if method.name.startswith(f"{backend}-")]
        assert entries, backend
        if backend == "cpu":
            assert all(bool(entry.refusal) == (device == "cuda") for entry in entries)


def test_the_issues_baselines_are_there_on_a_gpu() -> None:
    decode = {method.name for method in methods.methods_for(WORKLOADS["decode-256-to-1024"], "cuda")}
    eager = {f"original{tuned}-{dtype}" for tuned in ("", "-tuned") for dtype in ("tf32", "fp16", "bf16")}
    assert eager | {"original", "original-tuned-fp32", "folded-bf16", "folded-compiled-bf16"} <= decode
    assert {"original-compiled-tf32", "original-compiled-bf16", "folded-compiled-tf32"} <= decode
    training = {method.name for method in methods.methods_for(WORKLOADS["training-step"], "cuda")}
    assert {"original", "original-tf32", "original-fp16", "original-bf16", "folded-compiled-bf16"} <= training


@pytest.mark.parametrize("name", ["decode-64-to-256", "training-step"])
def test_a_gpus_baselines_compute_the_workload_here_too(name: str) -> None:
    """Those that compile are left out for their time."""
    baselines = (decoding if name.startswith("decode") else training).baselines("cuda")
    workload = replace(WORKLOADS[name], **TINY[name])
    problem = make_problem(workload)
    truth = measure._flat(methods.exact(workload, problem, CpuClock()))
    assert truth is not None
    for method in baselines:
        if "compiled" in method.name:
            continue
        result = measure._flat(method.prepare(Job(workload, problem, CpuClock()))[0]())
        assert result is not None
        found = measure._accuracy(workload, result, truth)
        low = method.dtype in ("bfloat16", "float16")
        assert found.get("psnr_db", 200) > (35 if low else 100), method.name
        assert found.get("gradient_error", 0) < (0.2 if low else 1e-3), method.name
    assert not torch.backends.cuda.matmul.allow_tf32, "switched back"


def test_every_method_computes_the_workload(result: dict[str, Any]) -> None:
    cpu_runs = not reason_against("cpu", "query", torch.float32)
    for name in TINY:
        for method, entry in result["workloads"][name]["methods"].items():
            emulated = method.endswith("-fp16") and not machine.multiplies_float16() and not method.startswith("cpu")
            emulated = emulated and not name.startswith(("gather", "ensemble"))
            if method.startswith(("cuda", "triton")) or (method.startswith("cpu") and not cpu_runs) or emulated:
                assert entry["status"] == "refused" and entry["reason"], f"{name}, {method}"
                continue
            assert entry["status"] == "ok", f"{name}, {method}: {entry.get('reason')}"
            assert len(entry["seconds"]["samples"]) == 2
            assert entry["peak_bytes"] is None or entry["peak_bytes"] >= 0
            low = entry["dtype"] in ("bfloat16", "float16")
            assert entry.get("psnr_db", 200) > (35 if low else 100), f"{name}, {method}"
            assert entry.get("gradient_error", 0) < (0.2 if low else 1e-3), f"{name}, {method}"
            if name.startswith(("decode", "training", "scale", "batch")):
                assert entry["gflop_per_second"] > 0
                assert entry["dtype"] == "float16" or entry["fraction_of_gemm"]["median"] > 0
            if name.startswith(("gather", "ensemble")):
                assert entry["fraction_of_copy"]["median"] > 0
        assert result["workloads"][name]["seconds_taken"] > 0
    step = result["workloads"]["training-step"]["methods"]
    assert {"gradient_error", "speedup"} <= step["original"].keys()
    assert "original-bf16" in step["original"]["speedup_over"]
    assert "psnr_db" in result["workloads"]["training-forward"]["methods"]["cpu-bf16"]


def test_what_a_cpu_cannot_time_is_recorded_with_the_reason(result: dict[str, Any]) -> None:
    assert "minutes" in result["workloads"]["size-4096"]["skipped"]


def test_a_result_names_its_machine_and_code(result: dict[str, Any]) -> None:
    assert result["machine"]["threads"] == 1
    assert result["machine"]["cpu"] and result["machine"]["instructions"]
    assert result["versions"]["torch"] == torch.__version__
    assert result["commit"] and result["date"].endswith("Z") and result["command"].startswith("python -m bench.run")


def test_a_budget_that_is_used_up_skips_with_the_reason(tmp_path: Path) -> None:
    begun = {**begin("cpu", ["gather"], name="late", command=""), "started": 0.0}
    session = Session(begun, CpuClock(), tmp_path, budget=5)
    assert session.measure("gather")["skipped"] == "the 5 s given to this run were used up"
    record = measure.measure(WORKLOADS["gather"], CpuClock(), rounds=1, deadline=0.0)
    assert {entry["status"] for entry in record["methods"].values()} <= {"skipped", "refused"}


def test_methods_that_broke_a_process_are_not_tried_again() -> None:
    lost = {"original": "the measuring process hung", "cpu-fp32": "out of memory"}
    workload = replace(WORKLOADS["gather"], **TINY["gather"])
    record = measure.measure(workload, CpuClock(), rounds=1, only=set(lost), lost=lost)
    statuses = {name: entry["status"] for name, entry in record["methods"].items()}
    assert statuses == {"original": "failed", "cpu-fp32": "out of memory"}


def test_targets_are_judged_by_what_was_measured() -> None:
    entry = {"speedup": {"median": 3.6}, "fraction_of_loop": {"median": 0.79}}
    workloads = {
        "decode-64-to-256": {"methods": {"cpu-fp32": entry, "cpu-bf16": {"status": "failed", "reason": "no memory"}}},
        "size-2048": {"methods": {"cpu-fp32": {"peak_bytes": 10**9, "allowed_bytes": 10**8}}},
    }
    promises = [target for target in targets.TARGETS if target.device == "cpu"]
    verdicts = [targets.judge(target, workloads) for target in promises]
    met = [None if verdict is None else verdict.met for verdict in verdicts]
    assert met == [True, False, False, False, None, False, None]
    assert verdicts[2] is not None and verdicts[2].measured == "no memory"
    rival = {"speedup_over": {"original-bf16": {"median": 9.0}}}
    gpu = {"decode-256-to-1024": {"methods": {"cuda-bf16": rival}}}
    against_amp = next(target for target in targets.TARGETS if target.field == "speedup_over original-bf16")
    assert targets.judge(against_amp, gpu) == (against_amp.what, ">= 8 x", "9.00 x", True)
    made = {"machine": {"device": "cuda"}, "workloads": gpu}
    assert [verdict.met for verdict in targets.verdicts(made)].count(True) == 1
    entry["fraction_of_loop"]["median"] = 2.6  # of a peak: not credible
    verdict = targets.judge(targets.TARGETS[1], workloads)
    assert verdict is not None and not verdict.met


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="this system does not tell a process' memory")
def test_memory_is_measured_in_a_process_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    workload = WORKLOADS["size-256"]
    peaks = {}
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)  # that many the process is given
    for method in methods.methods_for(workload, "cpu"):
        if method.name in ("original", "folded-fp32"):
            entry = sizes.measure(method, workload, CpuClock())
            assert entry["status"] == "ok", entry
            assert entry["seconds"]["median"] > 0
            peaks[method.name] = entry["peak_bytes"]
    unfolded = 64 * 64 * 576 * 4
    latent_map = 64 * 64 * 256 * 4
    assert peaks["original"] > unfolded + 30_000 * 580 * 4
    assert latent_map < peaks["folded-fp32"] < peaks["original"]
    assert sizes.allowance(workload, 4) == latent_map + 256 * 256 * 3 * 4 + 64 * 10**6


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="this system does not tell a process' memory")
def test_the_originals_first_chunks_stand_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sizes.original, "CHUNK", 30)
    workload = replace(WORKLOADS["size-256"], map_size=(5, 5), out_size=(20, 20))
    method = methods.methods_for(workload, "cpu")[0]
    entry = sizes.decode(method, workload, CpuClock())
    assert entry["note"] == "from 4 of its 14 chunks" and entry["peak_bytes"] is not None


def test_out_of_memory_is_a_result() -> None:
    def prepare(job: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 38 GiB")

    method = methods.Method("huge", "huge", "float32", False, prepare)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measure, "methods_for", lambda *a, **k: [methods.methods_for(*a, **k)[0], method])
        workload = replace(WORKLOADS["gather"], **TINY["gather"])
        entry = measure.measure(workload, CpuClock(), rounds=1)["methods"]["huge"]
    assert entry["status"] == entry["reason"] == "out of memory"


def test_a_gpus_record_holds_cold_and_warm_times_and_what_was_running(tmp_path: Path) -> None:
    """With a stand-in that runs on the CPU; methods are the CPU's."""

    class Event:
        def record(self) -> None:
            self.at = perf_counter()

        def elapsed_time(self, other: Event) -> float:
            return (other.at - self.at) * 1e3

    class Driver:
        device = torch.device("cpu")

        def synchronize(self) -> None: ...

        def event(self) -> Event:
            return Event()

        def capture(self, run: Any) -> Any:
            return run

        def flush(self) -> None: ...

        def peak(self, run: Any) -> int:
            run()
            return 7

    told: list[str] = []
    workload = replace(WORKLOADS["gather"], **TINY["gather"])
    record = measure.measure(
        workload, CudaClock(Driver()), rounds=2, only={"original", "reference-fp32"}, tell=told.append
    )
    assert told == ["original", "reference-fp32", "all in turns", ""]
    for entry in record["methods"].values():
        assert entry["captured"] and entry["peak_bytes"] == 7
        assert entry["seconds"]["median"] > 0 and entry["hot_seconds"]["median"] > 0


@pytest.mark.parametrize(
    "described, expected",
    [
        ({"cpu": "AMD EPYC", "architecture": "zen4", "threads": 2}, "cpu-amd-epyc-zen4-2-threads"),
        ({"cpu": "Intel(R) Xeon(R) CPU @ 2.20GHz", "architecture": "", "threads": 1}, "cpu-intel-xeon-1-thread"),
        (
            {"cpu": "AMD Ryzen 9 7950X 16-Core Processor", "architecture": "zen4", "threads": 16},
            "cpu-amd-ryzen-9-7950x-16-core-zen4-16-threads",
        ),
        ({"device": "cuda", "gpu": "NVIDIA H100 80GB HBM3"}, "nvidia-h100-80gb-hbm3"),
    ],
)
def test_slug(described: dict[str, Any], expected: str) -> None:
    assert machine.slug(described) == expected


def test_a_gpus_state_is_read_and_its_absence_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert machine.state("cuda") == {}
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho '1980, 2619, 1980, 512.25, 51, P0'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    state = machine.state("cuda")
    assert (state["clocks.sm"], state["power.draw"], state["pstate"]) == ("1980", "512.25", "P0")


def test_result_files_of_another_schema_are_refused_and_others_passed_over(tmp_path: Path) -> None:
    folder = tmp_path / "cpu-x"
    folder.mkdir()
    (folder / "checks.json").write_text(json.dumps({"passed": 3}))
    assert results.load_all(tmp_path) == []
    with pytest.raises(ValueError, match="has no workloads"):
        results.load(folder / "checks.json")
    (folder / "2001-01-01-full.json").write_text(json.dumps({"schema": 0, "workloads": {}}))
    with pytest.raises(ValueError, match="schema 0"):
        results.load_all(tmp_path)
