"""The first-use check, with the CUDA sources on the CPU in the place of a GPU's, and planted mistakes."""

from __future__ import annotations

import contextlib
import re
import threading
import warnings
from importlib import import_module
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from torch._subclasses import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from liif_fast import ops
from liif_fast.ops import backends, first_use
from liif_fast.ops.limits import FIRST_USE, LIMITS
from tests.backends import emulated
from tests.cuda.emulator import build
from tests.helpers import Case, random_problem, range_error, run_after_torch

ROOT = Path(__file__).resolve().parents[2]
CASE = Case(queries=90, hidden=(16, 16))
PROCESSORS_OF, PROCESSORS = first_use._processors, 3  # of the emulated device


def tensors(dtype=torch.float32, grad=False):
    return random_problem(CASE, dtype, requires_grad=grad)


def query(problem, **options):
    return ops.query(*problem, **options)


@pytest.fixture
def native():
    """The emulated kernels as the only ones of a GPU, the check turned on for them, and no verdict yet."""
    with emulated(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(first_use, "ENABLED", True)
        patch.setattr(first_use, "DEVICES", ("cpu",))
        patch.setattr(first_use, "_verdicts", {})
        patch.setattr(first_use, "_locks", {})
        patch.setattr(first_use, "_processors", lambda device: 1)  # a third of the emulator's takes a third of the time
        patch.setitem(backends.BACKENDS, "triton", lambda *_, **__: False)
        patch.setitem(backends.BACKENDS, "cpu", lambda *_, **__: False)
        decode = import_module("liif_fast.ops.backends.cuda.decode")
        counted = SimpleNamespace(
            **{name: getattr(decode._C, name) for name in ("cuda_decode", "cuda_decode_backward", "cuda_decode_pack")}
        )
        patch.setattr(decode, "_C", counted)
        yield counted


def plant(native, name, change):
    """Changes what a kernel returns: change(result, arguments)."""
    right = getattr(native, name)

    def wrong(*arguments):
        return change(right(*arguments), arguments)

    setattr(native, name, wrong)


def flat(out, arguments):
    """[queries, O] of a forward's result, a view."""
    return out[0] if arguments[1] is not None else out[0].flatten(1).t()


def last_tile(out, arguments):
    """The third tile of the last block: a ring or a loop that wraps wrongly."""
    flat(out, arguments)[-30:] = 0
    return out


def on_grids_only(out, arguments):
    return out if arguments[1] is not None else out.roll(1, -1)


def one_nan(out, arguments):
    flat(out, arguments)[7] = float("nan")
    return out


def launch_error(out, arguments):
    raise RuntimeError("a CUDA kernel could not be launched: no kernel image is available for execution on the device")


def half_the_masks(results, arguments):
    results[0].mul_(0.5)  # gradients before the hidden ReLUs
    arguments[-1].mul_(0.5)  # of hidden weights, where the kernels make them
    return results


def a_tiles_latents(results, arguments):
    arguments[-5].flatten(1, 2)[:, 20:40] = 0  # grad_latent_map
    return results


FORWARD = {
    "last-tile": (last_tile, "the result of query is off by "),
    "grid": (on_grids_only, "the result of render is off by "),
    "nan": (one_nan, "the result of query is off by nan"),
    "launch": (launch_error, r"failed \(RuntimeError: a CUDA kernel could not be launched: no kernel image"),
}
BACKWARD = {"masks": half_the_masks, "latents": a_tiles_latents}


@pytest.mark.parametrize("name", FORWARD)
def test_a_wrong_forward_is_refused_with_one_warning(native, name):
    change, message = FORWARD[name]
    plant(native, "cuda_decode", change)
    problem = tensors()
    expected = query(problem, backend="reference")
    with pytest.warns(RuntimeWarning, match=f"backend 'cuda' (gave a wrong result \\()?{message}") as caught:
        assert range_error(query(problem), expected) <= LIMITS[torch.float32, "result"]
    assert len(caught) == 1
    text = str(caught[0].message)
    facts = ("cpu, driver", "float32", "16x16x3", "local_ensemble", f"torch {torch.__version__}", "doctor --check")
    assert all(fact in text for fact in facts), text
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        query(problem)  # neither a second check nor a second warning
    with pytest.raises(RuntimeError, match=re.escape(text)):
        query(problem, backend="cuda")
    assert len(first_use._verdicts) == 1


@pytest.mark.prove
def test_a_wrong_convolution_of_the_first_layer_is_refused(native, monkeypatch):
    module = import_module("liif_fast.ops.backends.cuda.convolution")
    right = module._C
    wrong = SimpleNamespace(
        cuda_convolution=lambda *arguments: right.cuda_convolution(*arguments).roll(1, 2),
        cuda_kernel_grads=right.cuda_kernel_grads,
    )
    monkeypatch.setattr(module, "_C", wrong)
    query(tensors(torch.bfloat16), backend="cuda")  # inference does without
    with pytest.warns(RuntimeWarning, match="the result of query is off by"):
        query(tensors(torch.bfloat16, grad=True))


@pytest.mark.parametrize("name", ["masks", pytest.param("latents", marks=pytest.mark.prove)])
@pytest.mark.parametrize("dtype", [pytest.param(torch.float32, marks=pytest.mark.prove), torch.bfloat16], ids=str)
def test_a_wrong_backward_is_refused_where_gradients_are_wanted(native, name, dtype):
    plant(native, "cuda_decode_backward", BACKWARD[name])
    query(tensors(dtype), backend="cuda")
    with pytest.warns(RuntimeWarning, match="the gradient of .* of query is off by"):
        query(tensors(dtype, grad=True))
    assert sorted(map(bool, first_use._verdicts.values())) == [False, True]
    query(tensors(dtype), backend="cuda")  # inference stays


SMALL, PAPER = (64, 64), (256, 256)
RIGHT = [
    pytest.param(*case, marks=[] if case == (SMALL, torch.bfloat16, False, False) else pytest.mark.prove)
    for case in product((SMALL, PAPER), (torch.float32, torch.float16, torch.bfloat16), (False, True), (False, True))
    if case[0] == SMALL or case[2] != case[3]  # half of the wide ones, which take half a minute each
]


@pytest.mark.parametrize(("hidden", "dtype", "autocast", "general"), RIGHT, ids=str)
def test_right_kernels_stay_far_below_the_limits(native, monkeypatch, hidden, dtype, autocast, general):
    monkeypatch.setattr(first_use, "_processors", PROCESSORS_OF)  # more queries, so that roundings average out
    features = torch.float32 if autocast else dtype
    switches = (hidden == SMALL, not autocast, autocast)
    extras = (autocast, general, general)  # recompute, query term, source
    c = first_use.Combination("cuda", "cpu", None, features, dtype, switches, True, True, *extras, (*hidden, 3))
    first_use._here.checks = True
    try:
        found = first_use.compare(c, first_use.Decoders(ops.query, ops.render, ops.decode))
    finally:
        first_use._here.checks = False
    assert len(found) == 2 * (2 + 2 * 3 + general) + 1 + c.flags["cell_decode"]
    for name, error, limit in found:
        assert error <= limit / 2, name
        assert limit == FIRST_USE[dtype]["result" not in name]


def test_one_flipped_relu_is_no_mistake_and_a_tile_is():
    """With 16-bit products one query in thousands loses a hidden unit; a GPU of 132 processors decodes 25,000."""
    expected = torch.randn(1, 25000, 16, generator=torch.Generator().manual_seed(0))
    errors = []
    for queries in (1, 32):
        found = expected.clone()
        found[:, 5000 : 5000 + queries] = 0
        errors.append(first_use.error_of("query_term", found, expected).item())
    assert errors[0] < FIRST_USE[torch.float16][1] < FIRST_USE[torch.bfloat16][1] < errors[1]


@pytest.mark.parametrize("name", ["query_term", "source"])
def test_a_term_and_a_part_of_the_input_have_checks_of_their_own(native, name):
    latent_map, geometry, weights = torch.rand(1, 3, 3, 16), torch.rand(16, 4), [torch.rand(3, 16)]

    def decode(**options):
        ops.decode(latent_map, geometry, weights, [torch.rand(16), torch.rand(3)], size=(6, 6), **options)

    def mistake(out, arguments):
        return out * (0.9 if (arguments[9] is not None if name == "query_term" else len(arguments[7]) > 2) else 1)

    plant(native, "cuda_decode", mistake)
    decode(backend="cuda")
    option = {"query_term": torch.rand(1, 16, 6, 6), "source": (0.5, 1, 2, 1)}[name]
    with pytest.warns(RuntimeWarning, match=f"the result of {'query' if name == 'query_term' else 'render'} .*{name}"):
        decode(**{name: option})
    assert sorted(map(bool, first_use._verdicts.values())) == [False, True]


def test_the_check_fills_every_block_three_times_with_inputs_of_the_kernels_dtype(native, monkeypatch):
    monkeypatch.setattr(first_use, "_processors", PROCESSORS_OF)
    limits = build.load().limits
    source = (ROOT / "csrc/cuda/decode/decode.cu").read_text()
    (line,) = re.findall(r"blocks = limits.processors \*.*", source)
    assert max(map(int, re.findall(r"\b\d\b", line))) <= first_use.BLOCKS
    assert limits["row_padding"] <= first_use.ROWS and first_use.TILES >= 3
    seen = []
    plant(native, "cuda_decode", lambda out, arguments: seen.append(arguments) or out)
    feat, coord, cell, *layers = tensors()
    with torch.autocast("cpu", torch.bfloat16):
        query((feat, coord, cell, *layers), backend="cuda")
        query((feat, coord, cell, *layers), backend="cuda", local_ensemble=False)
    points, grid, own = seen[:3]
    for arguments, corners in ((points, 4), (grid, 4), (seen[3], 1), (seen[4], 1)):
        queries = arguments[1].shape[1] if arguments[1] is not None else arguments[6][4] * arguments[6][5]
        assert queries * corners >= 3 * 2 * 128 * PROCESSORS
        for weight in arguments[4]:
            assert torch.equal(weight, weight.bfloat16().float())
    assert grid[1] is None and grid[6][2:4] == [1, 2]
    assert own[1].shape == coord.shape and len(seen) == 6, "one check for each combination, and the decodes"


@pytest.mark.prove
def test_the_callers_state_stays_as_it_is(native):
    problem = tensors(grad=True)
    torch.manual_seed(3)
    state = torch.get_rng_state()
    with torch.autocast("cpu", torch.float16), torch.inference_mode(), torch.device("meta"):
        query([t.detach() if isinstance(t, torch.Tensor) else [u.detach() for u in t] for t in problem])
        assert torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") == torch.float16
        assert torch.is_inference_mode_enabled() and not torch.is_grad_enabled()
    assert torch.equal(torch.get_rng_state(), state)
    threads = torch.get_num_threads()
    out = checkpoint(lambda *leaves: query(problem), problem[0], use_reentrant=False)  # counts the saved tensors
    out.sum().backward()
    assert torch.get_num_threads() == threads and problem[0].grad is not None
    assert len(first_use._verdicts) == 2 and not any(first_use._verdicts.values())


def test_threads_wait_for_one_check(native):
    first, running = [], threading.Barrier(4)
    plant(native, "cuda_decode", lambda out, arguments: first.append(threading.current_thread().name) or out)
    problem = tensors()

    def run():
        running.wait()
        query(problem, backend="cuda")

    workers = [threading.Thread(target=run, name="worker") for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert first[:2] == ["liif_fast first-use check"] * 2 and first[2:] == ["worker"] * 4


@pytest.mark.prove
def test_a_trace_takes_the_verdict_without_a_guard(native):
    """It checks nothing, and a later verdict compiles nothing again; a later trace takes it."""
    problem = tensors()
    feat, coord, cell, weights, biases = problem
    flat_problem = [feat, coord, cell, *weights, *biases]

    def run(*t):
        return ops.query(*t[:3], list(t[3:6]), list(t[6:]))

    def compiled():
        torch._dynamo.reset()
        counter = CompileCounter()
        return torch.compile(run, fullgraph=True, backend=counter, dynamic=True), counter

    graph, counter = compiled()
    graph(*flat_problem)
    assert not first_use._verdicts
    plant(native, "cuda_decode", one_nan)
    with pytest.warns(RuntimeWarning, match="off by nan"):
        query(problem)
    calls = []
    plant(native, "cuda_decode", lambda out, arguments: calls.append(1) or out)
    graph(*flat_problem)
    assert counter.frame_count == 1 and calls
    calls.clear()
    again, _ = compiled()
    assert again(*flat_problem).isfinite().all() and not calls
    with pytest.raises(Exception, match="off by nan"):
        torch.compile(lambda: query(problem, backend="cuda"), fullgraph=True, backend="eager")()


@pytest.mark.parametrize("trace", ["fake", "make_fx", "vmap"])
def test_other_traces_check_nothing(native, trace):
    problem = tensors()
    if trace == "fake":
        with FakeTensorMode() as mode:
            query(
                [mode.from_tensor(t) if isinstance(t, torch.Tensor) else [*map(mode.from_tensor, t)] for t in problem]
            )
    elif trace == "make_fx":
        torch.fx.experimental.proxy_tensor.make_fx(lambda feat: query((feat, *problem[1:])))(problem[0])
    else:
        with contextlib.suppress(RuntimeError):
            torch.vmap(lambda feat: query((feat, *problem[1:])))(problem[0][None])
    assert not first_use._verdicts


def test_a_capture_postpones_the_check(native, monkeypatch):
    monkeypatch.setattr(first_use, "_must_wait", lambda device: True)
    plant(native, "cuda_decode", last_tile)
    problem = tensors()
    query(problem, backend="cuda")
    assert not first_use._verdicts
    monkeypatch.setattr(first_use, "_must_wait", lambda device: False)
    with pytest.warns(RuntimeWarning, match="off by"):
        query(problem)


@pytest.mark.parametrize("capturing", [None, 5, 63])
def test_captures_of_all_threads_are_seen_by_their_streams(monkeypatch, capturing):
    """PyTorch's pool hands out its streams in turns."""
    streams = [object() for _ in range(64)]
    handed, current = iter(streams), []
    fake = {
        "device": lambda device: contextlib.nullcontext(),
        "Stream": lambda priority: next(handed),
        "stream": lambda stream: contextlib.nullcontext(current.append(stream)),
        "get_sync_debug_mode": lambda: 0,
        "is_current_stream_capturing": lambda: capturing is not None and current[-1] is streams[capturing],
    }
    for name, function in fake.items():
        monkeypatch.setattr(torch.cuda, name, function)
    assert first_use._must_wait(torch.device("cuda", 0)) == (capturing is not None)
    assert not first_use._must_wait(torch.device("cpu"))
    monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: 2)
    assert first_use._must_wait(torch.device("cuda", 0))


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), None])
def test_what_says_nothing_about_the_kernels_refuses_nothing(native, monkeypatch, error):
    """No memory for the check, or a reference that cannot run, as in deterministic mode on a GPU."""

    def fail(*arguments, **options):
        raise error or RuntimeError("grid_sampler_2d_backward_cuda does not have a deterministic implementation")

    monkeypatch.setattr(first_use, "_found" if error else "_expected", fail)
    query(tensors(), backend="cuda")
    assert list(first_use._verdicts.values()) == [""]


def test_a_rank_names_itself(native, monkeypatch):
    for name, value in {"is_available": True, "is_initialized": True, "get_rank": 3, "get_world_size": 8}.items():
        monkeypatch.setattr(torch.distributed, name, lambda value=value: value, raising=False)
    plant(native, "cuda_decode", one_nan)
    with pytest.warns(RuntimeWarning, match="on rank 3 of 8 in a check"):
        query(tensors())


@pytest.mark.prove
def test_the_variable_turns_the_check_off():
    script = """
import os
os.environ{}
from liif_fast.ops import first_use
print(first_use.ENABLED, first_use.DEVICES)
"""
    name = '"LIIF_FAST_FIRST_USE_CHECK"'
    changes = (f"[{name}] = '0'", f"[{name}] = '1'", f".pop({name}, None)")
    found = run_after_torch(*map(script.format, changes))
    assert found == [f"{enabled} ('cuda', 'xpu')" for enabled in (False, True, True)]
