"""A result of every workload made tiny, for the tests of benchmarks and of what becomes of their results."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from bench import measure, methods, results, tables
from bench.session import Session, begin
from bench.workloads import WORKLOADS
from liif_fast.benchmark import timing, yardsticks
from liif_fast.benchmark.timing import CpuClock
from tests.bench.tiny_workloads import SIZE, TINY

CPU_SIZES = [name for name in tables.SIZES if not WORKLOADS[name].refusal("cpu")]


@pytest.fixture(scope="session")
def result(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What a run makes of tiny workloads; without compiling for its time, and without sizes, which cannot be tiny.

    On one thread: where other programs run too, threads wait for each other, thousands of times.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(timing, "MIN_SAMPLE_S", 0.0)
        patch.setattr(yardsticks, "LOOP_S", 0.001)
        patch.setitem(yardsticks.GEMM_SIZE, "cpu", 64)
        patch.setitem(yardsticks.COPY_BYTES, "cpu", 1 << 16)
        for name, changed in TINY.items():
            patch.setitem(WORKLOADS, name, replace(WORKLOADS[name], **changed))
        every = methods.methods_for
        patch.setattr(measure, "methods_for", lambda *a, **k: [m for m in every(*a, **k) if "compiled" not in m.name])
        folder = tmp_path_factory.mktemp("results")
        session = Session(
            begin("cpu", [*TINY, "size-4096"], name="tiny", command="python -m bench.run"),
            CpuClock(),
            folder,
            rounds=2,
        )
        for name in session.result["planned"]:
            session.measure(name)
            assert name in results.load(results.path_of(session.result, folder))["workloads"], "saved as it goes"
        session.finish()
    torch.set_num_threads(threads)
    made = results.load(results.path_of(session.result, folder))
    assert "planned" not in made and made["seconds_taken"] >= 0
    for name in CPU_SIZES:
        described = {method.name: method for method in methods.methods_for(WORKLOADS[name], "cpu")}
        made["workloads"][name] = {
            "about": WORKLOADS[name].about,
            "methods": {
                method: {
                    "label": described[method].label,
                    "dtype": described[method].dtype,
                    "status": "ok",
                    "seconds": timing.summary([2.0]),
                    "allowed_bytes": 382_000_000,
                    **numbers,
                }
                for method, numbers in SIZE.items()
            },
        }
    return made
