"""Fixtures of the tests that need a GPU. Without one, tests with the fixture `device` are skipped, a case of each."""

from __future__ import annotations

import fcntl
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from tests.helpers import reason_against

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it cuBLAS has no deterministic products


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    here = [item for item in items if Path(__file__).parent in item.path.parents]
    waiting = [item for item in here if "device" in getattr(item, "fixturenames", ())]
    once = set({item.function: item for item in waiting}.values())  # type: ignore[attr-defined]
    for item in once:
        item.add_marker(pytest.mark.skip(reason="torch finds no GPU that it can use"))
    others = set(waiting) - once
    items[:] = [item for item in items if item not in others]


@pytest.fixture
def device() -> Iterator[torch.device]:
    yield torch.device("cuda", 0)
    torch.cuda.empty_cache()  # other processes use the same GPU


@pytest.fixture(params=["cuda", "triton"])
def gpu_backend(request: pytest.FixtureRequest, device: torch.device) -> str:
    """Each backend with kernels for a GPU; `--backend` chooses among them."""
    chosen = request.config.getoption("--backend", None)
    if chosen and request.param not in chosen.split(","):
        pytest.skip(f"--backend {chosen} leaves out {request.param}")
    if reason := reason_against(request.param, "gather", torch.float32, device.type):
        pytest.skip(reason)
    return request.param


@pytest.fixture
def reserve(device: torch.device) -> Iterator[Callable[[float], None]]:
    """A function that waits until no other large test runs, and skips where less than so many GiB are free."""
    with Path(tempfile.gettempdir(), "liif-fast-large-gpu-tests.lock").open("w") as lock:

        def take(gib: float) -> None:
            fcntl.flock(lock, fcntl.LOCK_EX)
            free = torch.cuda.mem_get_info(device)[0] / 2**30
            if free < gib:
                pytest.skip(f"the test needs {gib:g} GiB of free GPU memory, {free:.0f} GiB are free")

        yield take
        torch.cuda.empty_cache()
