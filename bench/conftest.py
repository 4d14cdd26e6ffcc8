"""Options of `pytest bench`, and the one run that its tests share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from bench import results
from bench.session import Session, begin
from bench.workloads import WORKLOADS
from liif_fast.benchmark.timing import CpuClock


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("liif_fast")
    group.addoption("--save", action="store_true", help="write the result below bench/results, as bench.run does")
    group.addoption("--out", type=Path, default=results.FOLDER, help="folder for --save")
    group.addoption("--name", default="full", help="name of the file that --save writes, behind the date")
    group.addoption("--budget", type=float, help="seconds after which no workload is begun; default: no limit")
    group.addoption("--rounds", type=int, help="samples of each method; default: the workload's own")


@pytest.fixture(scope="session")
def run(request: pytest.FixtureRequest) -> Iterator[Session]:
    """Measures a workload when the first of its tests asks for it, all the methods that were selected in turns."""
    options = request.config.option
    command = " ".join(["python -m pytest", *request.config.invocation_params.args])
    result = begin("cpu", list(WORKLOADS), name=options.name, command=command)
    folder = options.out if options.save else None
    session = Session(result, CpuClock(), folder, rounds=options.rounds, budget=options.budget)
    yield session
    if options.save:
        for name, workload in WORKLOADS.items():
            if workload.refusal("cpu"):
                session.measure(name)  # recorded as skipped, with the reason
    session.finish()
