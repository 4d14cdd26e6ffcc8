"""The harness of bench.gpu: a step that dies, hangs or lies costs itself only; budgets hold; the report says it all."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import time
from importlib import import_module
from pathlib import Path

import pytest

from bench.gpu import __main__ as command
from bench.gpu import benchmarks, facts, hopper, report, runner, sanitizer, steps, worker
from bench.gpu.check import CRASHED, FAILED, PASSED, SKIPPED
from bench.gpu.steps import CHECKS, COMMAND, Phase, Step

BAD_CHECKS = """
import os, time
from bench.gpu.check import Check

def passes(context, judge): judge.at_most("error", 0.5, 1.0)
def dies(context, judge): os.abort()
def hangs(context, judge): time.sleep(600)
def breaks(context, judge): raise RuntimeError("CUDA error: an illegal memory access was encountered")
def fails(context, judge): judge.at_most("error", 2.0, 1.0)

def checks():
    for name, run in (("first", passes), ("dies", dies), ("second", passes), ("hangs", hangs), ("third", passes),
                      ("breaks", breaks), ("fails", fails), ("last", passes)):
        yield Check(name, run)
"""


@pytest.fixture
def setting(tmp_path, monkeypatch):
    (tmp_path / "modules").mkdir()
    (tmp_path / "modules" / "bad_checks.py").write_text(BAD_CHECKS)
    (tmp_path / "modules" / "no_checks.py").write_text("raise ImportError('no such thing')\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(tmp_path / "modules")
    (tmp_path / "scratch").mkdir()
    (tmp_path / "out").mkdir()
    return runner.Setting("cpu", tmp_path / "scratch", tmp_path / "out", small=True, check_limit=2.0)


def run(phases, setting, budget=120.0):
    saved = []
    records = runner.run_phases(phases, setting, budget, lambda records: saved.append(dict(records)))
    return records, saved


def one(name: str, *code: str, needs: str = "") -> Step:
    """A step whose program is a line of Python; its first argument is the report's path."""
    return Step(name, COMMAND, argv=(sys.executable, "-c", "\n".join(code), "{report}", "{seconds}"), needs=needs)


WRITE = "import json, sys, time, os; write = lambda **r: open(sys.argv[1], 'w').write(json.dumps(r))"


def test_a_check_that_dies_hangs_or_breaks_the_device_costs_only_itself(setting):
    step = Step("bad", CHECKS, module="bad_checks", backend="cpu")
    records, _ = run([Phase("checks", 100, (step,))], setting, budget=300.0)
    found = {outcome["name"]: outcome for outcome in records["bad"]["checks"]}
    assert {name: outcome["status"] for name, outcome in found.items()} == {
        "first": PASSED,
        "dies": CRASHED,
        "second": PASSED,
        "hangs": CRASHED,
        "third": PASSED,
        "breaks": CRASHED,
        "fails": FAILED,
        "last": PASSED,
    }
    assert "SIGABRT" in found["dies"]["note"]
    assert "the time limit of one check" in found["hangs"]["note"]
    assert records["bad"]["status"] == CRASHED
    assert records["bad"]["note"] == "4 passed, 1 failed, 3 crashed"


def test_a_worker_that_does_not_start_says_why(setting):
    step = Step("none", CHECKS, module="no_checks", backend="cpu")
    records, _ = run([Phase("checks", 100, (step,))], setting)
    assert records["none"]["status"] == CRASHED
    assert "the worker does not start" in records["none"]["note"] and "no such thing" in records["none"]["note"]


def test_what_time_was_left_for_is_listed_as_skipped(setting):
    step = Step("bad", CHECKS, module="bad_checks", backend="cpu")
    records, _ = run([Phase("checks", 100, (step,))], setting, budget=2.5)
    outcomes = records["bad"]["checks"]
    assert {outcome["name"] for outcome in outcomes} >= {"third", "last"}
    assert all(outcome["note"] == worker.NO_TIME for outcome in outcomes if outcome["status"] == SKIPPED)


def test_a_step_whose_checks_are_all_skipped_says_why(setting):
    step = Step("large-cuda", CHECKS, module="bench.gpu.large", backend="cuda")
    records, _ = run([Phase("checks", 100, (step,))], setting)
    assert records["large-cuda"]["status"] == SKIPPED
    assert "6 skipped: backend 'cuda' takes CUDA tensors, these are on 'cpu'" in records["large-cuda"]["note"]


def test_a_phase_may_use_its_share_and_what_was_left_over(setting):
    phases = [
        Phase("quick", 10, (one("quick", WRITE, "write(status='passed', seconds_given=float(sys.argv[2]))"),)),
        Phase("slow", 10, (one("slow", WRITE, "time.sleep(600)"), one("beside", WRITE, "write(status='passed')"))),
        Phase("late", 20, (one("late", WRITE, "write(status='passed')"),)),
    ]
    begin = time.monotonic()
    records, saved = run(phases, setting, budget=8.0)
    spent = time.monotonic() - begin
    assert {name: record["status"] for name, record in records.items()} == {
        "quick": PASSED,
        "slow": CRASHED,
        "beside": PASSED,
        "late": PASSED,
    }
    assert 3.0 <= spent < 8.0  # the first two shares, no more
    assert "its time limit of" in records["slow"]["note"]
    assert [len(each) for each in saved] == [1, 3, 4]  # a run that is cut off leaves what it had


def test_children_of_a_step_end_with_it(setting, tmp_path):
    mark = tmp_path / "child"
    child = f"import time, pathlib; time.sleep(3); pathlib.Path({str(mark)!r}).touch()"
    step = one("parent", WRITE, f"import subprocess; subprocess.run([sys.executable, '-c', {child!r}])")
    run([Phase("only", 1, (step,))], setting, budget=1.5)
    time.sleep(3)
    assert not mark.exists()


def test_commands_without_a_report_needs_and_required_phases(setting):
    phases = [
        Phase("first", 1, (one("silent", "import sys; print('the reason'); sys.exit(3)"),)),
        Phase("second", 1, (one("dependent", WRITE, "write(status='passed')", needs="silent"),)),
        Phase("third", 1, (one("judged", WRITE, "write(status='failed', note='no GPU')"),), required=True),
        Phase("fourth", 1, (one("never", WRITE, "write(status='passed')"),)),
    ]
    records, _ = run(phases, setting)
    assert records["silent"]["status"] == CRASHED and "status 3" in records["silent"]["note"]
    assert "the reason" in records["silent"]["note"]
    assert records["dependent"]["status"] == SKIPPED and "it needs silent" in records["dependent"]["note"]
    assert "never" not in records


def test_the_steps_of_a_gpu_fit_their_budget_and_name_what_exists(monkeypatch, capsys):
    phases = steps.phases("cuda")
    assert sum(phase.seconds for phase in phases) <= steps.BUDGET < 480
    names = [step.name for phase in phases for step in phase.steps]
    assert len(names) == len(set(names))
    for phase in phases:
        for step in phase.steps:
            assert step.needs in ("", *names)
            if step.kind == CHECKS:
                assert worker.checks_of(step.module, 0, step.shards)
            else:
                module, options = step.argv[2], {word for word in step.argv if word.startswith("--")}
                monkeypatch.setattr(sys, "argv", [module, "--help"])
                with pytest.raises(SystemExit, match=r"^0$"):
                    import_module(module).main()
                assert options <= set(re.findall(r"--\w+", capsys.readouterr().out)), step.argv
    # A phase that times something runs alone.
    assert [len(phase.steps) for phase in phases if phase.name in ("benchmarks", "hopper")] == [1, 1]


def test_the_command_line(capsys, tmp_path):
    assert command.main(["--list"]) == 0
    assert "sanitizer-racecheck" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="--only names nonsense, which is no step: choose among facts, chain-cuda"):
        command.main(["--out", str(tmp_path), "--only", "nonsense"])
    for arguments, message in (
        ([], "give either --out or --collect"),
        (["--out", "x", "--budget", "0"], "--budget is 0"),
    ):
        with pytest.raises(SystemExit):
            command.main(arguments)
        assert message in capsys.readouterr().err


def test_one_step_from_the_command_line_to_the_results_folder(tmp_path, capsys, monkeypatch):
    out = tmp_path / "out"
    status = command.main(["--out", str(out), "--device", "cpu", "--only", "indices-cpu", "--budget", "300"])
    printed = capsys.readouterr().out
    found = json.loads((out / report.JSON).read_text())
    assert status == 0, printed
    assert list(found["steps"]) == ["facts", "indices-cpu"]
    assert found["steps"]["indices-cpu"]["status"] == PASSED
    assert sorted(path.name for path in out.iterdir()) == ["log.txt", "report.json", "report.md"]
    assert "2 of 2 steps without failures" in printed

    # As from a machine without git, with a file of timings.
    found["steps"]["facts"].update(commit="unknown", sources="these")
    monkeypatch.setattr(facts, "digest", lambda folder: "these")
    (out / report.JSON).write_text(json.dumps(found))
    (out / "some-gpu").mkdir()
    (out / "some-gpu" / "2026-01-02-gpu.json").write_text(json.dumps({"workloads": {}, "commit": "unknown"}))
    filed = report.collect(out, tmp_path / "results")
    kept = json.loads(filed[0].read_text())
    assert kept["steps"]["facts"]["commit"] != "unknown"  # the sources are these
    assert json.loads(filed[-1].read_text())["commit"] == kept["steps"]["facts"]["commit"]
    assert filed[1].read_text().startswith("# Checks on ")
    with pytest.raises(ValueError, match=r"holds no report of bench\.gpu"):
        report.collect(tmp_path / "empty")
    with pytest.raises(SystemExit, match=r"^error: .* holds no report"):
        command.main(["--collect", str(tmp_path / "empty")])


def test_collect_leaves_the_commit_unknown_for_other_sources(tmp_path):
    record = {"status": PASSED, "commit": "unknown", "sources": "0" * 16, "folder": "some-gpu"}
    report.write({"facts": record}, tmp_path, command="", seconds=1)
    filed = report.collect(tmp_path, tmp_path / "results")
    assert filed[0].parent == tmp_path / "results" / "some-gpu" and filed[0].name.endswith("-checks.json")
    assert json.loads(filed[0].read_text())["steps"]["facts"]["commit"] == "unknown"
    report.write({}, tmp_path, command="", seconds=1)  # cut off before the facts
    assert report.collect(tmp_path, tmp_path / "results")[0].parent.name == "unknown-device"


def test_digest_changes_with_any_source(tmp_path):
    (tmp_path / "csrc" / "cuda").mkdir(parents=True)
    source = tmp_path / "csrc" / "cuda" / "x.cu"
    source.write_text("1")
    before = facts.digest(tmp_path)
    source.write_text("2")
    assert facts.digest(tmp_path) != before
    source.rename(tmp_path / "csrc" / "cuda" / "y.cu")
    assert len({before, facts.digest(tmp_path)}) == 2


# ------------------------------------------------------------------------------------------------------------- report


def test_the_report_shows_failures_worst_values_targets_probes_and_skipped():
    def entry(what, value, sense, limit, met):
        return {"what": what, "value": value, "sense": sense, "limit": limit, "met": met}

    def outcome(name, status, *measured, note=""):
        return {"name": name, "status": status, "note": note, "seconds": 1.0, "measured": list(measured)}

    checks = [
        outcome(
            "query a fp32", FAILED, entry("error", 3e-5, "<=", 1e-5, False), entry("shape", True, "is", True, True)
        ),
        outcome("query b fp32", PASSED, entry("error", 2e-6, "<=", 1e-5, True)),
        outcome("query c bf16", PASSED, entry("PSNR", 60.0, ">=", 52.0, True), entry("zero", 0, "<=", 0, True)),
        outcome("query d fp32", CRASHED, note="ValueError: a | b"),
        outcome("query e fp32", FAILED, entry("error", "nan", "<=", 1e-5, False)),
        outcome("query f fp64", SKIPPED, note="backend 'cuda' has no float64"),
    ]
    records = {
        "chain-cuda": {"status": CRASHED, "seconds": 9.0, "note": "x", "checks": checks},
        "bench": {
            "status": PASSED,
            "targets": [
                {"what": "decode", "wanted": ">= 44%", "measured": "41.0%", "met": False},
                {"what": "gather", "wanted": ">= 80%", "measured": "88.0%", "met": True},
            ],
        },
        "hopper": {"status": PASSED, "probes": {"device": "x", "rate": {"tflop_per_second": 640.0, "error": 0.0}}},
    }
    text = report.markdown({"steps": records})
    assert "| chain-cuda | query a fp32 | 3e-05 | error <= 1e-05 |" in text
    assert "| chain-cuda | query d fp32 | ValueError: a / b | no crash |" in text
    assert "| chain-cuda | query e fp32 | nan | error <= 1e-05 |" in text
    assert "| decode | MISSED | 41.0% | >= 44% |" in text and "| gather | reached | 88.0% | >= 80% |" in text
    assert "| rate | 640 |" in text
    assert "| chain-cuda | error, fp32 | 3e-05 | <= 1e-05 | query a fp32 |" in text
    assert "| chain-cuda | PSNR, bf16 | 60 | >= 52 | query c bf16 |" in text
    assert "zero, bf16" not in text
    assert "| chain-cuda | 1: query f fp64 | backend 'cuda' has no float64 |" in text
    assert report.failed(records) == ["chain-cuda"]


# ---------------------------------------------------------------------------------------------------------- sanitizer

CLEAN = f"""ran query torch.float32
{sanitizer.FINISHED}
========= COMPUTE-SANITIZER
========= ERROR SUMMARY: 0 errors
"""
OURS = f"""========= COMPUTE-SANITIZER
========= Invalid __global__ read of size 4 bytes
=========     at void liif_fast::gather_kernel<float>(liif_fast::Gather)+0x150 in gather.cu:12
=========     by thread (31,0,0) in block (1,0,0)
=========     Address 0x7f3c7ec000fc is out of bounds
=========
========= Program hit cudaErrorLaunchFailure (error 719) due to "unspecified launch failure" on CUDA API call.
=========
{sanitizer.FINISHED}
========= ERROR SUMMARY: 2 errors
"""
OTHERS = f"""========= COMPUTE-SANITIZER
========= Uninitialized __global__ memory read of size 4 bytes
=========     at void cutlass::Kernel<something>(something)+0x7be0
=========     by thread (25,0,0) in block (0,0,0)
{sanitizer.FINISHED}
========= ERROR SUMMARY: 1 error
"""
RACE = f"""{sanitizer.FINISHED}
========= COMPUTE-SANITIZER
========= Error: Race reported between Write access at liif_fast::(anonymous namespace)::query_kernel()+0x90
=========     and Read access at liif_fast::(anonymous namespace)::query_kernel()+0x100 [508 hazards]
=========
========= RACECHECK SUMMARY: 1 hazard displayed (1 error, 0 warnings)
"""


@pytest.mark.parametrize(
    ("output", "status", "verdict", "words"),
    [
        (CLEAN, 0, PASSED, "ERROR SUMMARY: 0 errors"),
        (
            CLEAN.replace("ERROR SUMMARY: 0 errors", "RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)"),
            0,
            PASSED,
            "0 hazards",
        ),
        (OURS, 86, FAILED, "1 reports on our kernels: Invalid __global__ read"),
        (OTHERS, 86, PASSED, "1 reports on kernels that are not ours"),
        (RACE, 86, FAILED, "Race reported between Write access at liif_fast"),
        (CLEAN.replace(sanitizer.FINISHED, ""), 1, CRASHED, "the small cases did not finish (status 1)"),
        (CLEAN.replace("0 errors", "7 errors"), 86, FAILED, "7 reports that could not be told apart"),
        ("========= COMPUTE-SANITIZER\n", None, CRASHED, "stopped by its time limit"),
        ("Device not supported", 1, CRASHED, "did not finish"),
    ],
)
def test_what_a_sanitizer_says(output, status, verdict, words):
    found, note = sanitizer.judge(sanitizer.parse(output), status)
    assert found == verdict and words in note, note


def test_a_pretended_sanitizer_from_end_to_end(tmp_path, monkeypatch):
    fake = tmp_path / "compute-sanitizer"
    fake.write_text(f"#!/bin/sh\necho '{sanitizer.FINISHED}'\necho '========= ERROR SUMMARY: 0 errors'\n")
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    found = sanitizer.run("memcheck", 20)
    assert found["status"] == PASSED and "--tool memcheck" in found["command"]
    fake.write_text("#!/bin/sh\necho '========= COMPUTE-SANITIZER'\nexec sleep 60\n")
    assert sanitizer.run("memcheck", 0.5)["status"] == CRASHED
    monkeypatch.setattr(sanitizer.shutil, "which", lambda name: None)
    assert sanitizer.run("memcheck", 20) == {"status": SKIPPED, "note": "compute-sanitizer is not installed here"}


# --------------------------------------------------------------------------------------------------------- benchmarks


def test_benchmarks_are_judged_by_their_targets():
    seconds = {"median": 1e-3, "p20": 1e-3, "p80": 1e-3, "samples": [1e-3]}
    fraction = {"median": 0.5, "p20": 0.5, "p80": 0.5, "samples": [0.5]}
    entry = {"status": "ok", "seconds": seconds, "fraction_of_gemm": fraction}
    result = {
        "machine": {"device": "cuda"},
        "workloads": {"decode-256-to-1024": {"methods": {"cuda-bf16": entry}}},
    }
    found = benchmarks.judge(result, "gpu/2026-01-02-gpu.json", "status 0")
    lines = {line["what"]: line for line in found["targets"]}
    assert found["status"] == PASSED and found["note"].startswith("1 workloads timed, 1 of ")
    assert lines["CUDA decode, of the matrix product's rate"]["met"]
    assert not lines["CUDA decode, against folded + compile"]["met"]  # its rival was not timed
    del entry["seconds"]
    assert benchmarks.judge(result, "x", "status 1")["status"] == CRASHED


def test_benchmarks_that_leave_nothing_say_so(tmp_path, monkeypatch):
    monkeypatch.setattr(benchmarks.sys, "executable", shutil.which("false"))
    found = benchmarks.run("cuda", tmp_path, 5)
    assert found == {"status": CRASHED, "note": "bench.run ended with status 1 and left no result"}


# ------------------------------------------------------------------------------------------------------------- hopper


def test_what_ptxas_says_of_the_probes_is_judged():
    spilled = "    {0} bytes stack frame, {0} bytes spill stores, {0} bytes spill loads"
    assert hopper.judge_build(spilled.format(0))["status"] == PASSED
    assert hopper.judge_build(spilled.format(188))["status"] == FAILED
    for code in ("C7508", "C7510", "C7511", "C7515"):
        found = hopper.judge_build(f"ptxas info : ({code}) Potential Performance Loss: wgmma\n{spilled.format(0)}")
        assert found["status"] == FAILED and code in found["note"]


def test_probes_are_judged_beside_cublas_and_by_their_results():
    def probes(error):
        good = {"tflop_per_second": 520.0, "cycles_per_block": 1280.0, "error": 1e-4}
        return {"device": "x", "copy": {"error": 0}, "rate": dict(good), "both_multicast": {**good, "error": error}}

    found = hopper.judge_run(probes(1e-4), 800.0)
    assert found["status"] == PASSED and "at 65% of cuBLAS" in found["note"]
    assert found["probes"]["rate"]["of_cublas"] == 0.65 and found["probes"]["rate"]["of_clock"] == 0.8
    for error in (0.5, float("nan")):
        found = hopper.judge_run(probes(error), 800.0)
        assert found["status"] == FAILED and "both_multicast is wrong by" in found["note"]


@pytest.fixture(scope="module")
def probe(tmp_path_factory) -> tuple[Path, dict]:
    folder = tmp_path_factory.mktemp("hopper")
    found = hopper.build(folder, 300)
    if found["status"] == SKIPPED:
        pytest.skip(found["note"])
    return folder / hopper.PROGRAM, found


def test_probes_compile_without_serialised_wgmma_or_spills(probe):
    _, found = probe
    assert found["status"] == PASSED, found
    assert found["kernels"] == 7


def test_probes_use_the_instructions_they_measure(probe):
    triton = pytest.importorskip("triton")
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    if not tool.exists():
        pytest.skip("this Triton carries no cuobjdump")
    sass = subprocess.run([tool, "-sass", probe[0]], capture_output=True, text=True, check=True).stdout
    kernels = {part.split("\n", 1)[0].strip(): part for part in sass.split("Function : ")[1:]}
    computing = [text for name, text in kernels.items() if "probe_kernelILb1" in name]
    assert len(computing) == 4
    for text in computing:
        assert text.count("HGMMA.64x128x16.F32.BF16 R") == 96  # A in registers: 12 blocks, 4 steps, 2 halves
    multicasts = [name for name, text in kernels.items() if "UBLKCP.S.G.MULTICAST" in text]
    assert len(multicasts) == 3 and all("SourceE2" in name for name in multicasts)
    for name in multicasts:  # a fence of the whole GPU at every release would be measured instead of the copies
        assert kernels[name].count("MEMBAR") <= 4


def test_the_probe_program_says_why_it_does_not_run(probe):
    done = subprocess.run([probe[0]], capture_output=True, text=True)
    if done.returncode == 0:
        pytest.skip("there is a Hopper GPU here: `python -m bench.gpu` runs the probes")
    assert done.returncode in (1, 2) and done.stderr.strip()
