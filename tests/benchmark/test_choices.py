"""`liif-fast bench` on a GPU: which backend the table should have chosen, and the line to report."""

from __future__ import annotations

import pytest
import torch

from liif_fast.benchmark import choices, command
from liif_fast.benchmark.timing import CpuClock
from liif_fast.ops import backends
from liif_fast.ops.backends import gpu
from tests.helpers import needs_cpu

WORK = ((False, "float32", (6, 5), (17, 13)), (True, "float32", (6, 5), 40), (False, "float64", (6, 5), (9, 9)))


@needs_cpu
def test_backends_that_can_do_the_work_are_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choices, "ROUNDS", 2)
    monkeypatch.setitem(backends.BACKENDS, "cpu", lambda request, raise_error=False: request.dtype == torch.float32)
    found = choices.measure(CpuClock(), ("cpu", "reference"), WORK)
    assert [each[:3] for each in found] == [(False, "float32", 221), (True, "float32", 640)]
    for each in found:
        assert each.chosen == "cpu" and list(each.seconds) == ["cpu", "reference"] and min(each.seconds.values()) > 0


def test_the_faster_choice_is_named_with_a_line_to_report(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "capability", lambda index: (9, 0))
    monkeypatch.setattr(gpu, "describe", lambda device: "cuda:0 (Some GPU), compute capability 9.0")
    times = {"cuda": 0.004, "triton": 0.006}
    text = choices.lines(
        [
            choices.Choice(False, "bfloat16", 1048576, times, "triton"),
            choices.Choice(True, "float16", 36864, times, "cuda"),
            choices.Choice(True, "float32", 36864, {"cuda": 0.0041, "triton": 0.004}, "cuda"),
        ],
        torch.device("cuda", 0),
    )
    assert len(text) == 4 and all("is right" in line for line in text[2:])
    assert text[0].endswith("triton 6.00 ms; cuda would have been 1.50x as fast as the chosen triton")
    assert text[1].startswith("  to report: decode, bfloat16, 1048576 queries: cuda before triton (cuda 4.00 ms, ")
    assert "modeled for an H100" in text[1] and text[1].endswith("cuda:0 (Some GPU), compute capability 9.0")


def test_the_command_prints_it_for_a_gpu_alone(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setattr(command, "CudaClock", CpuClock)
    monkeypatch.setattr(command, "make_rows", lambda device: [command.BenchRow("job", {("liif_fast", "float32"): int})])
    monkeypatch.setattr(command, "header", lambda device: [])
    monkeypatch.setattr(choices, "measure", lambda clock: [choices.Choice(False, "float16", 9, {"cuda": 1.0}, "cuda")])
    for device in ("cuda", "cpu"):
        assert command.main(torch.device(device), seconds=0.1) == 0
        assert ("choice among the GPU's backends" in capsys.readouterr().out) == (device == "cuda")
