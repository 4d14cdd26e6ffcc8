"""`python -m tests.gpu` without a GPU: it writes one report, even if a test crashes or hangs."""

from __future__ import annotations

import json

import pytest

from tests.gpu import __main__ as command
from tests.gpu import report, small_cases
from tests.gpu.sanitizer import FINISHED, read_output

SUITE = """
import os, sys, time, types, pytest

def test_passes(record_property):
    record_property("ties", 7)

def test_fails():
    assert 1 == 2

def test_skips():
    pytest.skip("no reason")

def test_crashes():
    os._exit(3)

def test_hangs():
    time.sleep(60)

def test_breaks_the_device():
    def synchronize():
        raise RuntimeError("an illegal memory access was encountered")

    sys.modules["torch"] = types.SimpleNamespace(cuda=types.SimpleNamespace(**locals(), is_initialized=lambda: True))

@pytest.mark.parametrize("number", range(4))
def test_comes_later(number):
    pass
"""


@pytest.fixture(scope="module")
def a_run(tmp_path_factory):
    """The folder and the report of a run of SUITE with the command line of a run on a GPU, and a shorter time limit."""
    for module in command.PACKAGES.values():
        pytest.importorskip(module)
    out = tmp_path_factory.mktemp("out")
    suite = tmp_path_factory.mktemp("suite") / "test_tiny.py"
    suite.write_text(SUITE)
    words = [word for word in command.steps(out, 2, "cuda")["tests"] if word not in ("tests/gpu", "--backend", "cuda")]
    words[words.index("tests/ops")] = str(suite)
    words[words.index("--timeout") + 1] = "3"
    steps = {"tests": command.run(words, 100, out / command.LOG)}
    facts = {"gpu": "some GPU", "folder": "some-gpu", "date": "2026-01-02T", "commit": "unknown", "sources": "these"}
    return out, report.write(out, {"environment": {**facts, "doctor": []}, "steps": steps})


@pytest.mark.prove
def test_a_crash_or_a_hang_fails_one_test(a_run):
    out, found = a_run
    tests = {name.split("::")[1]: test for name, test in found["tests"].items()}
    assert {name: test["status"] for name, test in tests.items()} == {
        "test_passes": "passed",
        "test_fails": "failed",
        "test_skips": "skipped",
        "test_crashes": "crashed",
        "test_hangs": "timed out",
        "test_breaks_the_device": "crashed",
        **{f"test_comes_later[{number}]": "passed" for number in range(4)},
    }, (out / command.LOG).read_text()
    assert tests["test_fails"]["note"].startswith("assert 1 == 2 (")
    assert "crashed while running" in tests["test_crashes"]["note"]
    assert "RuntimeError: an illegal memory access" in tests["test_breaks_the_device"]["note"]
    assert 2 < tests["test_hangs"]["seconds"] < 30
    assert found["collected"] == 10 and found["steps"]["tests"]["status"] == "failed" and not report.is_good(found)
    text = (out / report.MARKDOWN).read_text()
    assert text.startswith("# FAILED on some GPU\n\n- tests: 2 crashed, 1 timed out, 1 failed, 1 skipped, 5 passed\n")
    for line in ("test_crashes | crashed |", "test_hangs | timed out |", "| ties | 7 |", "| 1 | no reason |"):
        assert line in text


@pytest.mark.prove
def test_collect_files_a_run_and_gives_it_the_commit_of_the_same_sources(a_run, tmp_path, monkeypatch):
    out, _ = a_run
    (out / "some-gpu").mkdir()
    (out / "some-gpu" / "2026-01-02-gpu.json").write_text(json.dumps({"workloads": {}, "commit": "unknown"}))
    assert json.loads(report.collect(out, tmp_path)[0].read_text())["environment"]["commit"] == "unknown"
    monkeypatch.setattr(report, "digest", lambda: "these")
    monkeypatch.setattr(report, "commit", lambda: "abc")
    checks, text, timings = report.collect(out, tmp_path)
    assert checks == tmp_path / "some-gpu" / "2026-01-02-checks.json" and text.name == "2026-01-02-checks.md"
    assert json.loads(checks.read_text())["environment"]["commit"] == "abc"
    assert json.loads(timings.read_text())["commit"] == "abc"


def test_a_run_that_was_cut_off_keeps_what_it_had(tmp_path):
    entry = {"$report_type": "TestReport", "nodeid": "a", "outcome": "passed", "when": "call", "duration": 1.5}
    log = tmp_path / report.TESTS
    log.write_text("\n".join([json.dumps(entry), json.dumps({**entry, "nodeid": "b"})[:40]]))
    tests = report.read_tests(log)
    assert list(tests) == ["a"] and tests["a"]["seconds"] == 1.5
    found = {"steps": {"tests": {"status": "passed"}}, "tests": tests}
    assert report.is_good({**found, "collected": 1}) and not report.is_good({**found, "collected": 2})
    log = tmp_path / command.LOG
    late = command.run(["sh", "-c", "echo said; sleep 60 & sleep 60"], 5, log)
    assert late["status"] == "timed out" and late["seconds"] < 20 and "said" in log.read_text()
    assert command.run(["true"], 1, log)["status"] == "skipped"


def test_errors_of_the_command_name_the_remedy(tmp_path, monkeypatch):
    with pytest.raises(SystemExit, match=r"^error: .* holds no report of tests\.gpu .*: run `python -m tests\.gpu`"):
        command.main(["--collect", str(tmp_path)])
    monkeypatch.setitem(command.PACKAGES, "pytest-nonsense", "pytest_nonsense")
    with pytest.raises(SystemExit, match="pytest-nonsense not found: run `make gpu-packages`"):
        command.main(["--out", str(tmp_path)])


CLEAN = f"{FINISHED}\n========= COMPUTE-SANITIZER\n========= ERROR SUMMARY: 0 errors\n"
OURS = f"""{FINISHED}
========= Invalid __global__ read of size 4 bytes
=========     at void liif_fast::gather_kernel<float>(liif_fast::Gather)+0x150 in gather.cu:12
=========     by thread (31,0,0) in block (1,0,0)
=========
========= Program hit cudaErrorLaunchFailure (error 719) due to "unspecified launch failure" on CUDA API call.
========= ERROR SUMMARY: 2 errors
"""
RACE = f"""{FINISHED}
========= Error: Race reported between Write access at liif_fast::(anonymous namespace)::query_kernel()+0x90
=========     and Read access at liif_fast::(anonymous namespace)::query_kernel()+0x100 [508 hazards]
========= RACECHECK SUMMARY: 1 hazard displayed (1 error, 0 warnings)
"""


@pytest.mark.parametrize(
    ("output", "reason"),
    [
        (CLEAN, ""),
        (OURS, "Invalid __global__ read of size 4 bytes / at void liif_fast::gather_kernel"),
        (OURS.replace("liif_fast", "cutlass"), ""),
        (RACE, "Error: Race reported between Write access at liif_fast"),
        (CLEAN.replace("0 errors", "7 errors"), "7 reports that cannot be told apart"),
        (CLEAN.replace(FINISHED, ""), "the cases did not finish"),
    ],
)
def test_the_output_of_a_sanitizer_is_read(output, reason):
    reasons, _ = read_output(output)
    assert bool(reasons) == bool(reason) and reason in " ".join(reasons)


def test_small_cases_run_every_op():
    small_cases.main("cpu", "cpu")
