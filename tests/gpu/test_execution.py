"""How the ops use a GPU: streams, CUDA graphs, synchronization, determinism, torch.compile, a second device."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

from liif_fast import ops
from tests.gpu.problems import OPS, PAPER, assert_close, make_problem, run
from tests.helpers import Case

SLEEP_CYCLES = 50_000_000  # about 30 ms
ATOMICS = {torch.float32: 1e-5, torch.bfloat16: 1e-2}  # sums of atomic additions differ between any two runs

each_op = pytest.mark.parametrize("op", OPS)
each_dtype = pytest.mark.parametrize("dtype", ATOMICS, ids=str)


@each_op
def test_ops_run_on_the_current_stream(device, gpu_backend, op):
    """The stream is busy first and gets its input late: a kernel on another stream would read zeros."""
    problem = make_problem(PAPER, torch.bfloat16, device, grad=True)
    expected = run(op, problem, gpu_backend)
    feat = problem.feat.detach().clone()
    with torch.no_grad():
        problem.feat.zero_()
    torch.cuda.synchronize(device)
    stream = torch.cuda.Stream(device)
    with torch.cuda.stream(stream):
        torch.cuda._sleep(SLEEP_CYCLES)
        with torch.no_grad():
            problem.feat.copy_(feat)
        found = run(op, problem, gpu_backend)
    stream.synchronize()
    assert_close(found, expected, ATOMICS[torch.bfloat16])


def test_a_side_stream_does_not_wait_for_the_default_stream(device, gpu_backend):
    problem = make_problem(PAPER, torch.bfloat16, device, grad=True)
    stream = torch.cuda.Stream(device)
    with torch.cuda.stream(stream):
        run("query", problem, gpu_backend)  # compiles, loads, and allocates from this stream's pool
    torch.cuda.synchronize(device)
    torch.cuda._sleep(80 * SLEEP_CYCLES)
    asleep = torch.cuda.Event()
    asleep.record()
    with torch.cuda.stream(stream):
        run("query", problem, gpu_backend)
    stream.synchronize()
    assert not asleep.query()


def replay(step: Callable[[], list[Tensor]], inputs: list[Tensor], values: list[Tensor]) -> list[Tensor]:
    """Warm `step` up, capture it, write other values into its inputs, replay."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outs = step()
    with torch.no_grad():
        for tensor, value in zip(inputs, values, strict=True):
            tensor.copy_(value)
    graph.replay()
    torch.cuda.synchronize()
    return [out.clone() for out in outs]


@each_op
@each_dtype
@pytest.mark.parametrize("grad", [False, True], ids=["decode", "training"])
def test_a_cuda_graph_replays_on_new_inputs(device, gpu_backend, op, dtype, grad):
    problem, other = (make_problem(PAPER, dtype, device, grad=grad, seed=seed) for seed in (0, 9))
    found = replay(partial(run, op, problem, gpu_backend), problem.leaves, other.leaves)
    assert_close(found, run(op, other, gpu_backend), ATOMICS[dtype] if grad else 1e-6)


@each_op
def test_no_op_waits_for_the_device(device, gpu_backend, op):
    problem = make_problem(PAPER, torch.bfloat16, device, grad=True)
    run(op, problem, gpu_backend)  # the first call compiles and loads
    torch.cuda.synchronize(device)
    torch.cuda.set_sync_debug_mode("error")
    try:
        run(op, problem, gpu_backend)  # a synchronizing call raises
    finally:
        torch.cuda.set_sync_debug_mode("default")


@each_op
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_deterministic_training_repeats_bit_for_bit(device, gpu_backend, op, dtype):
    """Many queries meet few latents, so that additions collide."""
    case = Case(batch=2, channels=16, height=5, width=6, queries=30_000, hidden=(64, 64))
    problem = make_problem(case, dtype, device, grad=True)
    torch.use_deterministic_algorithms(True)
    try:
        first, second = (run(op, problem, gpu_backend) for _ in range(2))
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(first, second, strict=True))


def test_inductor_compiles_every_op_into_one_graph(device, gpu_backend):
    torch._dynamo.reset()
    problem = make_problem(Case(queries=40, hidden=(32, 16)), torch.float32, device, grad=True)

    def every_op(feat: Tensor, coord: Tensor, cell: Tensor, weights: list[Tensor], biases: list[Tensor]) -> Tensor:
        x, area_weight = ops.gather(feat, coord, cell, backend=gpu_backend)
        blended = ops.ensemble(x[..., :3], area_weight, backend=gpu_backend)
        decoded = ops.query(feat, coord, cell, weights, biases, backend=gpu_backend)
        image = ops.render(feat, (9, 11), weights, biases, backend=gpu_backend)
        return blended.sum() + decoded.square().sum() + image.square().sum()

    leaves = problem.leaves[:-4]
    results = []
    for function in (torch.compile(every_op, fullgraph=True), every_op):
        out = function(*problem[:5])
        results.append([out.detach(), *torch.autograd.grad(out, leaves)])
    assert_close(*results, 1e-4)


@each_op
def test_the_second_device_gives_the_same(device, gpu_backend, op):
    if torch.cuda.device_count() < 2:
        pytest.skip("there is one GPU")
    problem = make_problem(PAPER, torch.bfloat16, device, grad=True)
    expected, found = (run(op, problem.to(f"cuda:{index}"), gpu_backend) for index in (0, 1))
    assert all(value.device.index == 1 for value in found)
    assert_close(found, expected, ATOMICS[torch.bfloat16])
