"""Every workload and method as a test of pytest-benchmark: `make bench`, or `pytest bench -k decode-64-to-256`.

Measuring a method alone would lose what makes ratios believable, that all of them take turns. So the workload is
measured as `bench.run` does it, with the methods that were selected, and pytest-benchmark is handed the samples by a
clock that each round moves by one of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from bench.methods import methods_for
from bench.session import Session
from bench.workloads import WORKLOADS
from liif_fast.ops.backends import BACKENDS

CASES = [
    (workload.name, method.name)
    for workload in WORKLOADS.values()
    if not workload.refusal("cpu")
    for method in methods_for(workload, "cpu")
    if not method.refusal
]


class Replay:
    """A clock that stands still but for `advance`, which moves it by the next sample."""

    def __init__(self) -> None:
        self._now = 0.0
        self._left: list[float] = []

    def __call__(self) -> float:
        return self._now

    def load(self, samples: Sequence[float]) -> None:
        # From 0 again, so that no digits are lost to a large time.
        self._now, self._left = 0.0, list(samples)

    def advance(self) -> None:
        self._now += self._left.pop(0)


replay = Replay()


@pytest.mark.benchmark(timer=replay)
@pytest.mark.parametrize("workload, method", CASES, ids=["/".join(case) for case in CASES])
def test_benchmark(workload: str, method: str, run: Session, benchmark: Any, request: pytest.FixtureRequest) -> None:
    selected = [item.callspec.params for item in request.session.items if hasattr(item, "callspec")]
    names = {params["method"] for params in selected if params.get("workload") == workload}
    record = run.measure(workload, only=names)
    if "skipped" in record:
        pytest.skip(record["skipped"])
    entry = record["methods"][method]
    if entry["status"] == "failed" and method.rpartition("-")[0] in BACKENDS:
        pytest.fail(entry["reason"])  # what else fails, such as a compiler that is not there, is a result
    if entry["status"] != "ok":
        pytest.skip(f"{entry['status']}: {entry['reason']}")
    samples = entry["seconds"]["samples"]
    benchmark.group = f"{workload}: {record['about']}"
    benchmark.extra_info.update({key: value for key, value in entry.items() if key != "seconds"})
    replay.load(samples)
    benchmark.pedantic(replay.advance, rounds=len(samples))
