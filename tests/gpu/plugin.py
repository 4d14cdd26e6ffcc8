"""A pytest plugin for runs on a GPU (`-p tests.gpu.plugin`): an error, a crash and a hang each fail one test.

An error in a kernel surfaces at the next synchronization, and an illegal access breaks its process for good. So every
test ends with a synchronization, and a worker of pytest-xdist whose device is broken exits. pytest-xdist then counts
the test as failed and starts another worker.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest

_BROKEN_DEVICE = 70  # exit status


def pytest_configure(config: pytest.Config) -> None:
    role = Worker() if hasattr(config, "workerinput") else Controller(config)
    config.pluginmanager.register(role, "liif-fast-gpu-run")


def _synchronize() -> None:
    torch = sys.modules.get("torch")  # the controller needs none
    if torch is not None and torch.cuda.is_initialized():
        torch.cuda.synchronize()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call() -> Generator[None, Any, Any]:
    result = yield
    _synchronize()
    return result


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The slow sanitizers first, each with a quick test after it: a worker gets tests in pairs."""
    slow = [item for item in items if item.path.name == "test_sanitizers.py"]
    quick = [item for item in items if item not in slow]
    pairs = [item for pair in zip(slow, quick) for item in pair]
    items[:] = pairs + slow[len(quick) :] + quick[len(slow) :]


class Worker:
    def pytest_runtest_logfinish(self) -> None:
        try:
            _synchronize()
        except RuntimeError:
            os._exit(_BROKEN_DEVICE)


class Controller:
    """Writes the number of tests to a file, and marks the test of a dead worker that reached the time limit."""

    def __init__(self, config: pytest.Config) -> None:
        self._limit, self._log = config.getoption("timeout", None), config.getoption("report_log", None)
        self._started: dict[str, float] = {}

    @pytest.hookimpl(optionalhook=True)
    def pytest_xdist_node_collection_finished(self, ids: list[str]) -> None:
        if self._log:
            Path(self._log).with_suffix(".count").write_text(str(len(ids)))

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self._started[nodeid] = time.monotonic()

    @pytest.hookimpl(optionalhook=True)
    def pytest_handlecrashitem(self, crashitem: str, report: Any) -> None:
        report.duration = time.monotonic() - self._started.get(crashitem, time.monotonic())
        if self._limit and report.duration > self._limit - 1:
            report.longrepr = f"timed out after {report.duration:.0f} s"
