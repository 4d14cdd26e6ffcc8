"""Workloads and methods: the work is counted and computed correctly, and a failure is a result with its reason."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from bench import child, machine, measure, results, run, sizes
from bench.methods.method import Method
from bench.methods.registry import methods_for
from bench.workloads import WORKLOADS, flop, least_bytes
from liif_fast.benchmark import peak_rates, timing
from liif_fast.benchmark.timing import CpuClock
from liif_fast.ops import backends

TINY: dict[str, dict[str, Any]] = {
    "decode-64-to-256": {"map_size": (5, 6), "out_size": (9, 11)},
    "training-step": {"map_size": (5, 4), "batch": 2, "queries": 20},
    "training-backward": {"map_size": (5, 4), "batch": 2, "queries": 20},
    "gather": {"map_size": (5, 4), "queries": 40},
    "gather-backward": {"map_size": (5, 4), "queries": 40},
    "ensemble-backward": {"queries": 200},
}


def tiny(name: str) -> Any:
    return replace(WORKLOADS[name], **TINY[name])


@pytest.fixture
def fast(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Short samples on one thread, small peak rates, and no compiling."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    monkeypatch.setattr(timing, "MIN_SAMPLE_S", 0.0)
    monkeypatch.setattr(peak_rates, "FMA_S", 0.001)
    monkeypatch.setitem(peak_rates.GEMM_SIZE, "cpu", 64)
    monkeypatch.setitem(peak_rates.COPY_BYTES, "cpu", 1 << 16)
    methods = lambda *args: [method for method in methods_for(*args) if "compiled" not in method.name]  # noqa: E731
    monkeypatch.setattr(measure, "methods_for", methods)
    yield
    torch.set_num_threads(threads)


def test_work_is_counted_by_the_formulas() -> None:
    decode, training = WORKLOADS["decode-64-to-256"], WORKLOADS["training-step"]
    assert flop(decode, folded=False) == 2 * 4 * 256**2 * 345_856
    assert flop(decode, folded=True) == 2 * (4 * 256**2 * 198_400 + 64**2 * 576 * 256)
    assert flop(training, folded=True) == 3 * 2 * (4 * 16 * 2304 * 198_400 + 16 * 48**2 * 576 * 256)
    assert least_bytes(WORKLOADS["gather"], 2) == 64**2 * 64 * 2 + 16384 * (16 + 4 * (580 * 2 + 4))


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("name", WORKLOADS)
def test_every_backend_takes_part_or_has_a_reason(name: str, device: str) -> None:
    found = methods_for(WORKLOADS[name], device)
    assert len({method.name for method in found}) == len(found)
    assert found[0].name == "original" and found[0].dtype == "float32" and not found[0].refusal
    for backend in backends.BACKENDS:
        entries = [method for method in found if method.name.startswith(f"{backend}-")]
        assert entries or (backend == "reference" and WORKLOADS[name].compared != "all"), backend
        if backend == "cpu" and device == "cuda":
            assert all(entry.refusal for entry in entries)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.prove if name in ("training-step", "decode-64-to-256") else ())
        for name in TINY
    ],
)
def test_every_method_computes_the_workload(name: str, fast: None) -> None:
    record = measure.measure(tiny(name), CpuClock(), rounds=1)
    assert {f"cpu-{dtype}" for dtype in ("fp32", "bf16")} <= record["methods"].keys()
    for method, entry in record["methods"].items():
        if entry["status"] == "refused":
            assert entry["reason"] and method not in ("original", "cpu-fp32", "cpu-bf16")
            continue
        assert entry["status"] == "ok", (method, entry)
        assert entry["seconds"]["rounds"] == 1 and entry["speedup"]["median"] > 0
        low = entry["dtype"] in ("bfloat16", "float16")
        assert entry.get("psnr_db", 200) > (35 if low else 100), method
        assert entry.get("gradient_error", 0) < (0.2 if low else 1e-3), method
        rates = [key.split() for key in record["peak_rates"]]
        kinds = {kind for kind, *dtype in rates if dtype in ([], [entry["dtype"]])}
        assert entry.get("fraction_of", {}).keys() == kinds, "a processor without bfloat16 products has no such rate"


def test_failures_and_lack_of_time_are_results_with_reasons(fast: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def prepare(job: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 38 GiB")

    first = methods_for(tiny("gather"), "cpu")[0]
    monkeypatch.setattr(measure, "methods_for", lambda *args: [first, Method("huge", "huge", "float32", prepare)])
    entries = measure.measure(tiny("gather"), CpuClock(), rounds=1, lost={"original": "was killed"})["methods"]
    assert entries["original"]["reason"] == "was killed"
    assert entries["huge"]["status"] == entries["huge"]["reason"] == "out of memory"
    entries = measure.measure(tiny("gather"), CpuClock(), rounds=1, deadline=0.0)["methods"]
    assert {entry["status"] for entry in entries.values()} == {"skipped"}
    with pytest.raises(measure.TooSlow, match="more than 0 s"), measure.time_limit(0.05):
        time.sleep(5)


def _child(send: Callable[[Any], None], end: str) -> None:
    send("first")
    if end == "crash":
        os.abort()
    if end == "hang":
        time.sleep(60)
    if end == "error":
        raise RuntimeError("boom")


@pytest.mark.prove
def test_a_crash_a_hang_and_an_error_of_a_child_have_reasons() -> None:
    messages: list[str] = []
    for end, reason in (("crash", "ended by signal 6"), ("error", "RuntimeError: boom")):
        with pytest.raises(child.ChildError, match=reason):
            child.call(_child, end, on_message=messages.append)
    assert messages == ["first"] * 2
    with pytest.raises(child.ChildError, match="more than 1 s"):
        child.call(_child, "hang", silence_s=1)


def test_a_crash_costs_one_method(monkeypatch: pytest.MonkeyPatch) -> None:
    def call(function: Any, *args: Any, on_message: Any, **options: Any) -> dict[str, Any]:
        lost = args[-1]
        if "cuda-fp32" not in lost:
            on_message("cuda-fp32")
            raise child.ChildError("the process was ended by signal 6")
        return {"methods": dict(lost)}

    monkeypatch.setattr(child, "call", call)
    methods = run.record_of("gather", "cuda", None, None)["methods"]
    assert methods == {"cuda-fp32": "the process was ended by signal 6"}


def test_a_run_saves_a_file_and_prints_its_path(tmp_path: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """The only workload needs a GPU: it is skipped with the reason, and the exit code says that nothing was timed."""
    assert run.main(["--only", "size-4096", "--out", str(tmp_path), "--name", "x", "--threads", "2"]) == 1
    result = results.load(tmp_path / capsys.readouterr().out.strip())
    assert "minutes" in result["workloads"]["size-4096"]["skipped"] and result["machine"]["threads"] == 2
    assert "used up" in run.record_of("gather", "cpu", None, until=0.0)["skipped"]
    for wrong in (["--rounds", "0"], ["--budget", "0"], ["--only", "nothing"]):
        with pytest.raises(SystemExit, match="2"):
            run.main(wrong)


@pytest.mark.prove
def test_the_memory_of_a_decode_is_measured_in_a_process_of_its_own() -> None:
    workload = replace(WORKLOADS["size-256"], map_size=(32, 32), out_size=(32, 32))
    method = next(method for method in methods_for(workload, "cpu") if method.name == "torch-fp32")
    entry = sizes.measure(method, workload, CpuClock())
    latent_map = 32 * 32 * 256 * 4
    assert entry["status"] == "ok" and entry["seconds"]["median"] > 0
    assert entry["peak_bytes"] is None or latent_map < entry["peak_bytes"] < 64 * latent_map
    assert sizes.fused_limit(workload, 4) == latent_map + 32 * 32 * 3 * 4 + 64 * 10**6


@pytest.mark.parametrize(
    "described, expected",
    [
        ({"cpu": "AMD EPYC", "architecture": "zen4", "threads": 2}, "cpu-amd-epyc-zen4-2-threads"),
        ({"cpu": "Intel(R) Xeon(R) CPU @ 2.20GHz", "architecture": "", "threads": 1}, "cpu-intel-xeon-1-thread"),
        ({"device": "cuda", "gpu": "NVIDIA H100 80GB HBM3"}, "nvidia-h100-80gb-hbm3"),
    ],
)
def test_the_folder_of_a_machine(described: dict[str, Any], expected: str) -> None:
    assert machine.slug(described) == expected
