"""The checks of bench.gpu on a CPU: they pass on right kernels, fail on wrong ones, and judge what they should."""

from __future__ import annotations

import contextlib
import itertools
import json
import math
from functools import partial

import pytest
import torch

from bench.gpu import chain, check, citizen, facts, indices, large, pieces, problems, small_cases, worker
from bench.gpu.check import CRASHED, FAILED, PASSED, SKIPPED, Check, Context, Judge, Skip, run_check
from liif_fast.ops import backends
from liif_fast.ops.backends import cpu
from tests.helpers import reason_against

WHY_NOT = reason_against("cpu", "query", torch.float32)
pytestmark = pytest.mark.skipif(bool(WHY_NOT), reason=WHY_NOT)

CPU = Context(torch.device("cpu"), "cpu", small=True)
MODULES = (chain, pieces, citizen, indices, large)
ALL = {c.name: c for module in MODULES for c in module.checks()}

# Every check function at least once; the others are the same functions with other arguments.
CHOSEN = [
    "runs the paper's decoder",
    "query paper fp32",
    "query paper fp16",
    "query paper bf16",
    "query paper tf32",
    "fold fp32",
    "query recomputed bf16",
    "query plain fp64",
    "query odd-widths bf16",
    "query no-query fp32",
    "query -e fp16",
    "render -u-c fp32",
    "render full bf16",
    "render windows and regions fp32",
    "query many rows bf16",
    "query and render, drawn by lot 6",
    "query NaN",
    "query infinite coordinates",
    "query strides",
    "gather plain fp16",
    "gather -e-u-c fp64",
    "gather one-latent bf16",
    "ensemble of 3 bf16",
    "metasr plain fp32",
    "metasr no-query fp64",
    "metasr one-query fp16",
    "gather strides",
    "gather, layers, ensemble is query",
    "metasr on a part of the map",
    "gather's latents of 17x23",
    "gather's latents of 1023x2049",
    "query's and render's latents of 17x23",
    "the table's own choice",
    "empty queries",
    "training repeats bit for bit when asked to",
    "torch.compile(fullgraph)",
    "autocast",
    "a model's step and image",
    "an upscaled photograph",
    "1024x1024 from 256x256 bf16",
    "1024x1024 from 256x256 fp32",
    "render beyond 32-bit offsets",
    "query and its gradients beyond 32-bit offsets",
    "gather beyond 32-bit offsets",
]
ON_A_GPU_ONLY = [
    "another stream",
    "CUDA graph of a decode",
    "CUDA graph of a training step",
    "no synchronisation",
    "no allocation beside outputs and workspaces",
    "the second device",
    "torch.compile(fullgraph) through inductor",
]


def missed(outcome: check.Outcome) -> list[str]:
    return [entry["what"] for entry in outcome.measured if not entry["met"]]


@pytest.mark.parametrize("name", CHOSEN)
def test_check_passes_on_right_kernels(name):
    outcome = run_check(ALL[name], CPU)
    assert outcome.status == PASSED, (outcome.note, outcome.measured)
    assert outcome.measured


def test_every_check_function_is_tried_here_or_belongs_to_a_gpu():
    def function(one: Check):
        return getattr(one.run, "func", one.run)

    tried = {function(ALL[name]) for name in [*CHOSEN, *ON_A_GPU_ONLY]}
    assert {function(one) for one in ALL.values()} == tried
    names = [one.name for module in MODULES for one in module.checks()]
    assert len(names) == len(set(names))  # outcomes are kept by name


@pytest.mark.parametrize("name", ON_A_GPU_ONLY)
def test_what_needs_a_gpu_says_so(name):
    outcome = run_check(ALL[name], CPU)
    assert outcome.status == SKIPPED and outcome.note


# ------------------------------------------------------------------------------------------------------ wrong kernels


def wrong(monkeypatch, name: str, spoil) -> None:
    right = getattr(cpu, name)
    monkeypatch.setattr(cpu, name, lambda *arguments: spoil(right(*arguments)))


def spoil_one(tensor: torch.Tensor) -> torch.Tensor:
    """A thousandth of the range, in one place."""
    spoiled = tensor.clone()
    if spoiled.numel():
        spoiled.view(-1)[-1] += 1e-3 * float(spoiled.abs().max()) + 1e-3
    return spoiled


@pytest.mark.parametrize(
    ("name", "checks"),
    [
        ("query", ["query plain fp32", "query paper fp32", "query's and render's latents of 17x23"]),
        ("render", ["render full fp32", "1024x1024 from 256x256 fp32"]),
        ("ensemble", ["ensemble of 4 fp32", "gather, layers, ensemble is query"]),
        ("metasr_query", ["metasr plain fp32"]),
    ],
)
def test_a_wrong_forward_is_caught(monkeypatch, name, checks):
    # Half a latent for those that look at indices.
    wrong(monkeypatch, name, lambda out: out + 0.6 if "latents" in current["name"] else spoil_one(out))
    for current["name"] in checks:
        outcome = run_check(ALL[current["name"]], CPU)
        assert outcome.status == FAILED and missed(outcome), current["name"]


current = {"name": ""}


@pytest.mark.parametrize(
    ("name", "checks"),
    [
        (
            "query_backward",
            ["query plain fp64", "query paper fp32", "query paper bf16", "query odd-widths bf16", "query -u bf16"],
        ),
        ("render_backward", ["render -c fp32", "render full bf16"]),
        ("gather_backward", ["gather plain fp32"]),
        ("ensemble_backward", ["ensemble of 4 fp64"]),
        ("metasr_query_backward", ["metasr plain fp32"]),
    ],
)
def test_a_wrong_gradient_is_caught(monkeypatch, name, checks):
    wrong(monkeypatch, name, lambda grads: type(grads)([grads[0] * 1.2, *grads[1:]]))
    for each in checks:
        outcome = run_check(ALL[each], CPU)
        assert outcome.status == FAILED and any("gradient" in what for what in missed(outcome)), each


def test_a_latent_off_by_one_is_caught_and_a_tie_is_not(monkeypatch):
    right = cpu.gather

    def shifted(feat, *arguments):
        return right(feat.roll(1, dims=-1), *arguments)

    monkeypatch.setattr(cpu, "gather", shifted)
    outcome = run_check(ALL["gather's latents of 17x23"], CPU)
    assert "differences from grid_sample on a CPU" in missed(outcome)
    # A position within a rounding of .5 counts as a tie, one well beside it does not.
    tie = torch.tensor([[[0.0, 0.0], [1e-8, -1e-8], [1e-3, 0.0]]])
    distance = indices.distance_to_tie(tie, (256, 256))
    assert distance[:2].max() <= 1 and distance[2, 0] > 1000


@pytest.mark.parametrize(
    ("name", "check_name", "large"),
    [
        ("render", "render beyond 32-bit offsets", lambda latent_map, *rest: latent_map.shape[1] > 50),
        ("query", "query and its gradients beyond 32-bit offsets", lambda latent_map, *rest: latent_map.shape[1] > 50),
        ("gather", "gather beyond 32-bit offsets", lambda feat, coord, *rest: coord.shape[1] > 1500),
    ],
)
def test_an_offset_that_wraps_in_large_maps_is_caught(monkeypatch, name, check_name, large):
    right = getattr(cpu, name)

    def wraps(first, *rest):
        return right(first.flip(1) if large(first, *rest) else first, *rest)

    monkeypatch.setattr(cpu, name, wraps)
    assert missed(run_check(ALL[check_name], CPU))


def test_a_random_result_is_no_deterministic_one(monkeypatch):
    wrong(monkeypatch, "query", lambda out: out + 1e-6 * torch.rand(1))
    outcome = run_check(ALL["training repeats bit for bit when asked to"], CPU)
    assert "query repeats" in missed(outcome) and "render repeats" not in missed(outcome)


def test_a_convolution_in_tf32_is_caught(monkeypatch):
    right = torch.nn.functional.conv2d

    def rounded(feat, weight, **options):
        return right(feat.bfloat16().float() if feat.dtype == torch.float32 else feat, weight, **options)

    monkeypatch.setattr(torch.nn.functional, "conv2d", rounded)
    assert "error of the range" in missed(run_check(ALL["fold fp32"], CPU))


def test_a_backend_that_refuses_the_paper_fails_and_one_that_cannot_be_here_is_skipped(monkeypatch):
    elsewhere = CPU._replace(backend="cuda")
    for name in ("runs the paper's decoder", "query plain fp32"):
        outcome = run_check(ALL[name], elsewhere)
        assert outcome.status == SKIPPED and "backend 'cuda' takes CUDA tensors" in outcome.note

    def refuse(problem, raise_error=False):
        if problem.op == "query" and raise_error:
            raise RuntimeError("backend 'cpu' is not in the mood")
        return problem.op != "query"

    monkeypatch.setitem(backends.BACKENDS, "cpu", refuse)
    outcome = run_check(ALL["runs the paper's decoder"], CPU)
    assert outcome.status == FAILED and "not in the mood" in outcome.note
    assert run_check(ALL["query plain fp32"], CPU).status == SKIPPED


# --------------------------------------------------------------------------------------------- a GPU, as far as it goes


@pytest.fixture
def pretended_gpu(monkeypatch):
    """torch.cuda's streams, graphs and counters as things that do nothing, so that GPU-only checks run on a CPU."""
    state = {"peak": 0, "mode": 0}

    class Stream:
        def __init__(self, device=None):
            pass

        def wait_stream(self, other):
            pass

        def synchronize(self):
            pass

    class Graph:
        def replay(self):
            pass

    fakes = {
        "Stream": Stream,
        "CUDAGraph": Graph,
        "stream": lambda stream: contextlib.nullcontext(),
        "graph": lambda graph: contextlib.nullcontext(),
        "current_stream": Stream,
        "synchronize": lambda device=None: None,
        "empty_cache": lambda: None,
        "_sleep": lambda cycles: None,
        "get_sync_debug_mode": lambda: 0,
        "set_sync_debug_mode": lambda mode: state.update(mode=mode),
        "reset_peak_memory_stats": lambda device: None,
        "memory_allocated": lambda device: 0,
        "max_memory_allocated": lambda device: state["peak"],
        "device_count": lambda: 1,
    }
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    monkeypatch.setattr(Context, "on_gpu", property(lambda self: True))
    return state


def test_streams_and_silence_pass_on_a_pretended_gpu(pretended_gpu):
    for name in ("another stream", "no synchronisation"):
        assert run_check(ALL[name], CPU).status == PASSED, name
    assert pretended_gpu["mode"] == 0  # as it was before


def test_a_kernel_that_synchronises_is_caught(pretended_gpu, monkeypatch):
    def waiting(out):
        if pretended_gpu["mode"] == "error":
            raise RuntimeError("called a synchronizing CUDA operation")
        return out

    wrong(monkeypatch, "query", waiting)
    outcome = run_check(ALL["no synchronisation"], CPU)
    assert missed(outcome) == ["query does not wait"]


@pytest.mark.parametrize("name", ["CUDA graph of a decode", "CUDA graph of a training step"])
def test_a_graph_that_replays_nothing_is_caught(pretended_gpu, name):
    outcome = run_check(ALL[name], CPU)
    assert outcome.status == FAILED and missed(outcome)


def test_memory_that_grows_with_the_image_is_caught(pretended_gpu):
    assert run_check(ALL["no allocation beside outputs and workspaces"], CPU).status == PASSED
    pretended_gpu["peak"] = 1 << 30
    assert run_check(ALL["no allocation beside outputs and workspaces"], CPU).status == FAILED


# ----------------------------------------------------------------------------------------------------- the judge itself


def outcome_of(run, context=CPU):
    return run_check(Check("one", run), context)


def test_judge_keeps_the_worst_value_and_nan_meets_nothing():
    def run(context: Context, judge: Judge) -> None:
        for value in (0.1, 0.3, 0.2):
            judge.at_most("error", value, 1.0)
        judge.at_least("dB", 40.0, 52.0)
        judge.at_least("dB", 60.0, 52.0)

    outcome = outcome_of(run)
    assert outcome.status == FAILED and missed(outcome) == ["dB"]
    assert {entry["what"]: entry["value"] for entry in outcome.measured} == {"error": 0.3, "dB": 40.0}
    for judged in (Judge.at_most, Judge.at_least):
        judge = Judge()
        judged(judge, "x", math.nan, 1.0)
        assert judge.failed
        json.dumps(judge.measured["x"]["value"], allow_nan=False)


def test_outcomes_of_what_raises():
    def crash(context: Context, judge: Judge) -> None:
        judge.at_most("error", 0.0, 1.0)
        raise ValueError("no such thing\nand more")

    def skip(context: Context, judge: Judge) -> None:
        raise Skip("not here")

    outcome = outcome_of(crash)
    assert outcome.status == CRASHED and outcome.note.startswith("ValueError: no such thing (")
    assert not check.broke_the_device(outcome)
    assert outcome_of(skip).status == SKIPPED
    assert outcome_of(lambda context, judge: None).status == FAILED  # it judged nothing


@pytest.mark.parametrize(
    ("message", "broken"),
    [
        ("CUDA error: an illegal memory access was encountered", True),
        ("Triton Error [CUDA]: misaligned address", True),
        ("CUDA error: out of memory", False),
        ("size mismatch", False),
    ],
)
def test_errors_after_which_a_process_is_of_no_use(message, broken):
    def run(context: Context, judge: Judge) -> None:
        raise RuntimeError(message)

    assert check.broke_the_device(outcome_of(run)) == broken


# ------------------------------------------------------------------------------------------------------ worker and rest


def test_worker_goes_on_behind_what_is_done_and_stops_in_time(tmp_path):
    ran = []

    def run(context: Context, judge: Judge, name: str) -> None:
        ran.append(name)
        judge.true("x", True)

    checks = [Check(name, partial(run, name=name)) for name in "abc"]
    results = tmp_path / "results.jsonl"
    assert worker.run(checks, CPU, results, done={"a"}, until=math.inf) == 0
    assert ran == ["b", "c"]
    outcomes, running, finished = worker.read(results)
    assert list(outcomes) == ["b", "c"] and not running and finished
    late = tmp_path / "late.jsonl"
    worker.run(checks, CPU, late, done=set(), until=0)
    assert {outcome["note"] for outcome in worker.read(late)[0].values()} == {worker.NO_TIME}


def test_worker_leaves_a_broken_device(tmp_path):
    def illegal(context: Context, judge: Judge) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    checks = [Check("bad", illegal), Check("good", lambda context, judge: judge.true("x", True))]
    results = tmp_path / "results.jsonl"
    assert worker.run(checks, CPU, results, done=set(), until=math.inf) == worker.DEVICE_BROKEN
    outcomes, _, finished = worker.read(results)
    assert list(outcomes) == ["bad"] and not finished


def test_shards_share_all_checks_between_them():
    names = [[c.name for c in worker.checks_of("bench.gpu.citizen", shard, 3)] for shard in range(3)]
    assert sorted(itertools.chain(*names)) == sorted(c.name for c in citizen.checks())


def test_small_cases_run_every_op():
    ran = list(small_cases.runs(torch.device("cpu"), "cpu"))
    assert len(ran) == 19 and not any("refused" in line for line in ran)
    refused = list(small_cases.runs(torch.device("cpu"), "cuda"))
    assert len(refused) == 19 and all("refused: backend 'cuda'" in line for line in refused)


def test_problems_do_not_depend_on_the_device_and_exact_results_agree():
    problem = problems.decode(problems.Case(queries=50), torch.float32, torch.device("cpu"))
    expected = chain.run_query(problem.exact(), problems.Case(queries=50), "reference")
    assert problems.range_error(problems.exact_query(problem, problems.Case(queries=50)), expected) < 1e-6


def test_facts_name_device_versions_sources_and_tools():
    found = facts.gather("cpu")
    json.dumps(found)
    assert found["status"] == PASSED and found["folder"].startswith("cpu-")
    assert found["sources"] == facts.digest(facts.root()) and len(found["sources"]) == 16
    assert set(found["tools"]) == {"nvcc", "compute-sanitizer", "git"}
    if not torch.cuda.is_available():
        assert facts.gather("cuda")["note"] == "torch finds no GPU that it can use"
