"""The first-use check on a device: right kernels pass in little time, a mistake is refused, a capture postpones it."""

from __future__ import annotations

import threading
import time
from importlib import import_module

import pytest
import torch

from liif_fast.ops import first_use, registration
from tests.gpu.problems import PAPER, make_problem, run


@pytest.fixture(autouse=True)
def checked(monkeypatch):
    monkeypatch.setattr(first_use, "ENABLED", True)
    for name in ("_verdicts", "_locks"):
        monkeypatch.setattr(first_use, name, {})


@pytest.mark.parametrize("grad", [False, True], ids=["decode", "training"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_right_kernels_pass_in_little_time(device, gpu_backend, dtype, grad, record_property):
    problem = make_problem(PAPER, dtype, device, grad=grad)
    for name in ("first", "later"):  # the first one compiles and loads
        first_use._verdicts.clear()
        torch.cuda.synchronize(device)
        begin = time.perf_counter()
        run("query", problem, gpu_backend)
        torch.cuda.synchronize(device)
        record_property(f"{name} decode with its check, ms", round(1e3 * (time.perf_counter() - begin), 1))
    assert list(first_use._verdicts.values()) == [""]


def test_a_mistake_is_refused(device, gpu_backend, monkeypatch):
    module = import_module(f"liif_fast.ops.backends.{gpu_backend}")
    right = module.decode
    monkeypatch.setattr(module, "decode", lambda *arguments: (right(*arguments)[0].roll(1, 1), right(*arguments)[1]))
    assert registration.implementation(gpu_backend) is module
    problem = make_problem(PAPER, torch.float16, device)
    with pytest.warns(RuntimeWarning, match="off by"), pytest.raises(RuntimeError, match="off by"):
        run("query", problem, gpu_backend)


def test_a_capture_in_another_thread_postpones_the_check(device, gpu_backend):
    problem = make_problem(PAPER, torch.float16, device)
    first_use.ENABLED = False
    run("query", problem, gpu_backend)  # loads the kernels
    first_use.ENABLED = True
    begun, done = threading.Event(), threading.Event()

    def capture():
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            problem.feat + 1
            begun.set()
            done.wait(60)

    thread = threading.Thread(target=capture)
    thread.start()
    begun.wait(60)
    try:
        run("query", problem, gpu_backend)
        assert not first_use._verdicts
    finally:
        done.set()
        thread.join()
    run("query", problem, gpu_backend)
    assert list(first_use._verdicts.values()) == [""]
