"""What all tests share: two threads, the option --backend, and switches that are put back."""

from __future__ import annotations

import os
from contextlib import contextmanager

# Read when torch is loaded. Threads that wait actively between small problems take 1.6 times the processor time.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import pytest
import torch

from liif_fast.ops import first_use
from tests import backends
from tests.cuda.emulator import build

first_use.ENABLED = False  # the tests compare every result themselves; tests/ops/test_first_use.py turns it on
torch.set_num_threads(2)  # results depend on the number in their last bits


def pytest_addoption(parser):
    names = ", ".join(backends.TABLE)
    parser.addoption("--backend", help=f"backends for tests/ops, separated by commas: cpu (all its kernels), {names}")


# What takes long under an interpreter: the widest imnets, and whole ops many times.
LONG = ("paper-width", "opcheck_of_the_others", "neighbors_that_share", "recomputing", "test_a_decode")
LONG += ("source_window_is_query",)


def pytest_configure(config):
    build.leaves_out = "not prove" in config.option.markexpr


def pytest_generate_tests(metafunc):
    """Parametrizes `backend`, and `kind` with the kinds that the backend knows."""
    if "backend" not in metafunc.fixturenames:
        return
    rows = backends.selected(metafunc.config.getoption("--backend"))
    if not metafunc.definition.get_closest_marker("with_reference"):
        rows = [row for row in rows if row.name != "reference"]
    if not metafunc.definition.get_closest_marker("hopper"):
        rows = [row for row in rows if not row.hopper]
    if metafunc.definition.get_closest_marker("one_isa"):
        rows = [row for row in rows if row.op_backend != "cpu" or row.name == "cpu-portable"] or rows
    if "kind" not in metafunc.fixturenames:
        metafunc.parametrize("backend", rows, ids=lambda row: row.name, indirect=True)
        return
    wanted = metafunc.definition.get_closest_marker("kinds")
    kinds = [kind for kind in backends.KINDS if wanted is None or kind.name in wanted.args]
    pairs = [(row, kind) for row in rows for kind in kinds if row.has_tf32 or not kind.tf32]
    pairs = [(row, kind) for row, kind in pairs if kind.narrow or not row.hopper]
    metafunc.parametrize(("backend", "kind"), pairs, ids=lambda either: either.name, indirect=True)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config, items):
    """Leaves a slow backend one of `every` cases of each test, from varying positions; the others are proofs.

    With --backend, tests/ops runs nothing that has no backend: the run without the option does. Of a test for an
    instruction set that this processor lacks, one case remains, to be skipped.
    """
    groups: dict[tuple, list] = {}
    absent: set = set()
    if config.getoption("--backend"):
        items[:] = [item for item in items if "backend" in item.fixturenames or item.path.parent.name != "ops"]
    for item in items:
        row = item.callspec.params.get("backend") if hasattr(item, "callspec") else None
        if isinstance(row, backends.Backend):  # not where no row runs a test
            groups.setdefault((item.function, row), []).append(item)
        elif item.path.parent.name == "cuda" and build.LEFT_OUT.search(item.name):
            item.add_marker(pytest.mark.prove)
    for position, ((_, row), cases) in enumerate(groups.items()):
        if backends.lacks_isa(row.name):
            absent.update(cases[1:])
        compiled = () if row.name == "cpu-portable" or row.device != "cpu" else ("test_compile",)  # one graph is quick
        long = (*LONG, *compiled) if row.every > 10 else compiled
        if slow := [item for item in cases if any(name in item.name for name in long)]:
            for item in slow:
                item.add_marker(pytest.mark.exhaustive if "paper-width" in item.name else pytest.mark.prove)
            cases = [item for item in cases if item not in slow]
        quick = [item for item in cases if not (row.emulates and build.LEFT_OUT.search(item.name))]
        chosen = set(quick[position % min(row.every, len(quick) or 1) :: row.every])
        for index, item in enumerate(cases):
            if item not in chosen:
                item.add_marker(pytest.mark.exhaustive if index % row.every_proof else pytest.mark.prove)
    items[:] = [item for item in items if item not in absent]


@pytest.fixture(autouse=True, scope="session")
def _own_cache(tmp_path_factory):
    """An empty cache folder, so that the default model is `tiny` on every machine, also in child processes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LIIF_FAST_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture
def backend(request):
    """A row of tests.backends.TABLE, ready to run."""
    with request.param.activate():
        yield request.param


@contextmanager
def tf32(allowed: bool):
    """torch's switch for TF32 products."""
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32" if allowed else "ieee"
    yield
    torch.backends.cuda.matmul.fp32_precision = before


@pytest.fixture
def kind(request):
    """A row of tests.backends.KINDS, with the switch for TF32 as it says."""
    with tf32(request.param.tf32):
        yield request.param


@pytest.fixture
def deterministic(request):
    """torch.use_deterministic_algorithms, as the parameter says."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(request.param)
    yield request.param
    torch.use_deterministic_algorithms(before)
