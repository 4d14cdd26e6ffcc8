"""When the cuda backend runs, and the reasons it gives where it cannot."""

from __future__ import annotations

import importlib

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from liif_fast import ops
from liif_fast.ops import backends
from liif_fast.ops.backends import extension, gpu, preferences
from liif_fast.ops.backends.cuda import hopper
from tests.backends import emulated
from tests.helpers import Case, random_problem, reason_against

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


FACTS = {"cuda_archs": ["80", "86", "90a", "120"], "cuda_ptx": ["80"]}


@pytest.fixture
def gpu_here(monkeypatch):
    """As if the extension had its CUDA half, and torch had a GPU."""
    monkeypatch.setattr(extension, "build_facts", lambda: FACTS)
    monkeypatch.setattr(gpu, "_cuda_versions", lambda: (13000, 13000))
    monkeypatch.setattr(backends, "_BUILT_WITH_CUDA", True)
    monkeypatch.setattr(extension, "_state", {"reason": ""})
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))


def test_cuda_comes_first_where_it_runs(gpu_here):
    for dtype in DTYPES:
        for op in ("gather", "ensemble", "metasr_query"):
            assert backends.choose(backends.OpRequest(op, "cuda", dtype)) == "cuda"
    assert backends.choose(backends.OpRequest("decode", "cuda", torch.float32, (64, 256, 3))) == "cuda"
    assert backends.choose(backends.OpRequest("gather", "cpu", torch.float32)) == "cpu"
    assert ("cuda", True, "") in backends.report()


def test_the_choice_is_made_while_tracing(monkeypatch):
    """The real torch.cuda.is_available does not break the graph."""
    if not extension.is_available():
        pytest.skip(extension.reason())
    monkeypatch.setattr(backends, "_BUILT_WITH_CUDA", True)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    torch._dynamo.reset()

    def run(x):
        return x + 1 if backends.can_run_cuda(backends.OpRequest("gather", "cuda", x.dtype)) else x - 1

    expected = 1.0 if torch.cuda.is_available() else -1.0
    assert torch.compile(run, fullgraph=True, backend="eager")(torch.zeros(())).item() == expected


def test_the_cuda_backend_names_the_missing_part(gpu_here, monkeypatch):
    def missing() -> str:
        return reason_against("cuda", "gather", torch.float32, "cuda").removeprefix("backend 'cuda' needs ")

    assert missing() == ""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert missing() == "an NVIDIA GPU, and torch finds none that it can use"
    monkeypatch.setattr(torch.version, "cuda", None)
    assert missing() == "a torch built with CUDA, this one has none"
    monkeypatch.setattr(backends, "_BUILT_WITH_CUDA", False)
    monkeypatch.setattr(extension, "build_facts", lambda: {"why_no_cuda": "no nvcc was found"})
    assert missing() == "an extension compiled with CUDA, this one has none: no nvcc was found"
    monkeypatch.setattr(extension, "_state", {"reason": "LIIF_FAST_BUILD=none"})
    assert missing() == "the compiled extension: LIIF_FAST_BUILD=none"
    assert backends.choose(backends.OpRequest("gather", "cuda", torch.float32)) == "torch"


# Compute capability of the GPU, CUDA of its driver and of the extension, PTX in the extension -> the refusal.
MACHINES = {
    "same": ((9, 0), 13000, 13000, ["80"], ""),
    "newer minor version": ((8, 9), 13000, 13000, ["80"], ""),
    "older driver of the same major version": ((9, 0), 13000, 13020, [], ""),
    "older driver": (
        (9, 0),
        12040,
        13000,
        ["80"],
        r"was compiled with CUDA 13\.0, .* supports CUDA 12\.4 at most: update",
    ),
    "old GPU": ((7, 5), 13000, 13000, ["80"], r"needs an NVIDIA GPU of compute capability 8\.0 .*, this one has 7\.5"),
    "no code": ((10, 3), 13000, 13000, [], r"80, 86, 90a, 120 and no PTX that .* 10\.3 could run: .*CUDA_ARCHS=103"),
    "PTX of its own kind": ((10, 0), 13000, 13000, ["90a"], r"no PTX that compute capability 10\.0 could run"),
    "PTX": ((10, 3), 13000, 13000, ["80"], ""),
    "PTX and an older driver": (
        (11, 0),
        13000,
        13020,
        ["80"],
        r"only PTX for .* 11\.0, and a driver for CUDA 13\.2 has",
    ),
    "unknown versions": ((9, 0), 0, 0, ["80"], ""),
}


@pytest.mark.parametrize(("capability", "driver", "runtime", "ptx", "message"), MACHINES.values(), ids=MACHINES)
def test_gpu_and_driver_must_run_the_extensions_code(gpu_here, monkeypatch, capability, driver, runtime, ptx, message):
    """Asked of the tensor's device, not of the current one."""
    capabilities = {0: (9, 0), 1: capability, None: (9, 0)}
    monkeypatch.setattr(torch.cuda, "get_device_capability", capabilities.get)
    monkeypatch.setattr(gpu, "_cuda_versions", lambda: (driver, runtime))
    monkeypatch.setattr(extension, "build_facts", lambda: {**FACTS, "cuda_ptx": ptx})
    request = backends.OpRequest("gather", "cuda", torch.float32, device_index=1)
    assert backends.can_run_cuda(request) == (not message)
    if message:
        with pytest.raises(RuntimeError, match=f"^backend 'cuda' .*{message}"):
            backends.choose(request, "cuda")
    if driver == runtime:
        assert backends.can_run_cuda(request._replace(device_index=None))


def test_the_first_backend_comes_from_the_table(gpu_here, monkeypatch):
    """On 9.0, for 16 bits: cuda where it has a Hopper kernel. Elsewhere Triton for inference, no row for training."""
    request = backends.OpRequest("decode", "cuda", torch.float32, (64, 256, 3), queries=1 << 20)
    narrow = request._replace(matmul_dtype=torch.bfloat16)
    expected = {
        request: "cuda",
        narrow: "cuda",
        narrow._replace(widths=(64, 128, 16)): "cuda",
        narrow._replace(widths=(64, 128, 17)): "triton",
        narrow._replace(widths=(64, 64, 3)): "triton",
        narrow._replace(trains=True): "cuda",
        narrow._replace(has_query_term=True): "triton",
        narrow._replace(op="gather"): "cuda",
    }
    monkeypatch.setattr(backends, "_TRITON_PROBLEM", "")
    assert {each: backends.choose(each) for each in expected} == expected
    for width, has_row in ((128, True), (64, False)):
        row = backends.preference(narrow._replace(trains=True, widths=(64, width, 3)))
        assert bool(row and row.hopper and row.training) == has_row
    monkeypatch.setattr(hopper, "ENABLED", False)
    assert backends.choose(narrow) == "triton"
    assert backends.against_hopper(narrow) == "LIIF_FAST_HOPPER=0 leaves the Hopper kernel out"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (8, 6))
    assert backends.choose(narrow) == "cuda"
    monkeypatch.setattr(torch.version, "cuda", None)
    assert backends.in_order(narrow) == list(backends.BACKENDS)


def test_a_trace_takes_the_first_backend_as_a_constant(monkeypatch):
    narrow = backends.OpRequest("decode", "cuda", torch.float32, (64, 64, 3), matmul_dtype=torch.bfloat16)
    for name in ("cuda", "triton"):
        monkeypatch.setitem(backends.BACKENDS, name, lambda *_: True)
    found = {0: (9, 0), 1: (8, 0)}
    monkeypatch.setattr(gpu, "capability", gpu.traced_as_constant(lambda index: found[index]))
    torch._dynamo.reset()
    counter = CompileCounter()

    def run(x):
        return x + [backends.choose(narrow._replace(device_index=index)) == "triton" for index in (0, 1)].index(True)

    compiled = torch.compile(run, fullgraph=True, backend=counter)
    assert compiled(torch.zeros(())).item() == 0
    found.update({0: (8, 0), 1: (9, 0)})
    assert compiled(torch.zeros(())).item() == 0 and counter.frame_count == 1


def test_rows_of_the_table_name_backends_and_sources(monkeypatch):
    for row in preferences.TABLE:
        assert row.first in ("cuda", "triton") and row.least <= row.most
        assert row.source.startswith(("modeled for ", "measured on "))
        assert not row.hopper or row.source.endswith("not yet run on a GPU")
    triton = next(row for row in preferences.TABLE if row.first == "triton")
    small = triton._replace(queries=(1, 4096), first="cuda")
    monkeypatch.setattr(preferences, "TABLE", (small, *preferences.TABLE))
    work = ((9, 0), "decode", torch.float16, False)
    assert [preferences.find(*work, queries).first for queries in (4096, 4097, None)] == ["cuda", "triton", "triton"]


def test_cpu_tensors_are_refused():
    with pytest.raises(RuntimeError, match="backend 'cuda' takes CUDA tensors, these are on 'cpu'"):
        ops.gather(torch.rand(1, 3, 4, 5), torch.zeros(1, 2, 2), backend="cuda")


REFUSALS = {
    "tensors": ("cpu", torch.float32, None, "takes CUDA tensors, these are on 'cpu': move them"),
    "dtype": ("cuda", torch.int32, None, "takes float64, float32, bfloat16 or float16 features, not torch.int32"),
    "float64": ("cuda", torch.float64, (64, 64, 3), "decodes in float32, bfloat16 or float16, not float64"),
    "odd": ("cuda", torch.float32, (64, 40, 3), ".* width is a multiple of 16 up to 256, not 40"),
    "wide": ("cuda", torch.float32, (272, 64, 3), ".* width is a multiple of 16 up to 256, not 272"),
    "linear": ("cuda", torch.float16, (3,), "decodes with 2 to 65 layers, this imnet has 1"),
}


@pytest.mark.parametrize(("device", "dtype", "widths", "message"), REFUSALS.values(), ids=REFUSALS)
def test_cuda_refuses_with_a_reason(gpu_here, device, dtype, widths, message):
    """Other tensors and dtypes, and an imnet that no kernel runs."""
    request = backends.OpRequest("decode" if widths else "gather", device, dtype, widths or ())
    with pytest.raises(RuntimeError, match=f"^backend 'cuda' {message}"):
        backends.choose(request, "cuda")
    assert not backends.can_run_cuda(request)
    if widths:
        assert backends.can_run_cuda(request._replace(dtype=torch.float32, widths=(64, 256, 576)))


HOPPER_REFUSALS = {
    "trained outputs": ({"trains": True, "widths": (256, 256, 5)}, "trains with at most 4 outputs, not 5"),
    "float32": ({"matmul_dtype": torch.float32}, "multiplies float16 or bfloat16, not torch.float32"),
    "one layer in training": (
        {"widths": (3,), "trains": True},
        "decodes with at least 3 layers, this imnet has 1: it has no product",
    ),
    "no hidden layer": ({"widths": (256, 3)}, "decodes with at least 3 layers, this imnet has 2: it has no product"),
    "narrow": ({"widths": (64, 64, 3)}, "decodes with a widest layer of 65 to 256 channels, not 64"),
    "outputs": ({"widths": (256, 256, 17)}, "decodes to at most 16 outputs, not 17"),
    "query term": ({"has_query_term": True}, "decodes without a query term"),
    "queries": ({"queries": 2**30 + 1}, "decodes at most 1073741824 queries at a time, not 1073741825"),
}


@pytest.mark.parametrize(("change", "message"), HOPPER_REFUSALS.values(), ids=HOPPER_REFUSALS)
def test_the_hopper_kernel_is_left_out_with_a_reason(change, message):
    imnet = {"widths": (256,) * 4 + (3,), "matmul_dtype": torch.bfloat16, "trains": False}
    assert hopper.against_imnet(**imnet) == ""
    assert hopper.against_imnet(**{**imnet, **change}) == f"the Hopper kernel {message}"


def test_the_hopper_kernel_needs_compute_capability_9(gpu_here, monkeypatch):
    assert hopper.against_device("cuda", 0) == ""
    monkeypatch.setattr(extension, "build_facts", lambda: {**FACTS, "cuda_archs": ["80"]})
    assert "holds no code for sm_90a" in hopper.against_device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (10, 0))
    assert hopper.against_device("cuda", 0) == "the Hopper kernel needs a GPU of compute capability 9.0, this is 10.0"
    assert hopper.against_device("cpu", None) == (
        "the Hopper kernel needs a GPU of compute capability 9.0, this is another device"
    )


def test_packed_weights_are_used_again_until_a_map_or_a_layer_changes(monkeypatch):
    """With what a new map stands for: an update that torch does not count, as a fused optimizer's."""
    with emulated():
        module = importlib.import_module("liif_fast.ops.backends.cuda.decode")
        monkeypatch.setattr(module, "PACKED", type(module.PACKED)())
        feat, coord, cell, weights, biases = random_problem(Case(queries=9, hidden=(16, 16)), torch.float32)

        def packs(latent_map):
            before = module._C.packs
            with torch.no_grad():
                out = ops.query(feat, coord, cell, weights, biases, latent_map=latent_map, backend="cuda")
            expected = ops.reference.query(feat, coord, cell, weights, biases)
            assert (out - expected).abs().max() <= 1e-4 * expected.abs().max()
            return module._C.packs - before

        latent_map = ops.fold(feat, weights[0])
        assert [packs(latent_map), packs(latent_map)] == [1, 0]
        with torch.no_grad():
            weights[1].mul_(2)
        assert [packs(latent_map), packs(latent_map)] == [1, 0]
        weights[1].data.mul_(2)  # not counted
        latent_map = ops.fold(feat, weights[0])
        assert [packs(latent_map), packs(latent_map)] == [1, 0]


def test_recomputing_packs_once_for_every_direction(monkeypatch):
    with emulated():
        module = importlib.import_module("liif_fast.ops.backends.cuda.decode")
        monkeypatch.setattr(module, "_CHUNK_ROWS", 128)
        feat, coord, cell, weights, biases = random_problem(
            Case(queries=100, hidden=(16, 16)), torch.float32, requires_grad=True
        )
        out = ops.query(feat, coord, cell, weights, biases, backend="cuda", recompute=True)
        before = module._C.packs
        out.sum().backward()
        assert module._C.packs == before + 2
