"""`liif-fast bench`: all methods do the same work, the table holds the measurements, bad input gives one sentence."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
import torch

from liif_fast.benchmark import command, runs
from liif_fast.benchmark.timing import CpuClock
from liif_fast.cli import main as cli
from liif_fast.utils import hardware
from tests.helpers import norm_error


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of a few milliseconds, with 16 bits on every processor."""
    monkeypatch.setattr(hardware, "emulates", lambda device, dtype: False)
    monkeypatch.setitem(command._DECODE, "cpu", ((6, 5), (17, 13)))
    monkeypatch.setitem(command._TRAIN, "cpu", (1, 60))
    monkeypatch.setitem(command._ROUNDS, "cpu", 2)
    monkeypatch.setattr(command, "_GRACE_S", 600.0)  # emulated dtypes are slow
    photo = runs.photo(torch.device("cpu"))[:, :12, :10].contiguous()
    monkeypatch.setattr(runs, "photo", lambda device: photo)


def test_all_methods_of_a_row_do_the_same_work(small: None) -> None:
    rows = command.make_rows(torch.device("cpu"))
    assert [row.name.split()[0] for row in rows] == ["decode", "decoder's", "photo"]
    for row in rows:
        dtypes = ("float32", "bfloat16")
        assert list(row.runs) == [(method, dtype) for method in ("original", "liif_fast") for dtype in dtypes]
        expected, *others = [runs.flat(run()) for run in row.runs.values()]
        for (_, dtype), actual in zip(list(row.runs)[1:], others):
            assert actual.shape == expected.shape
            assert norm_error(actual, expected) < (1e-3 if dtype == "float32" else 0.2), (row.name, dtype)


def test_the_command_prints_one_table_and_writes_the_numbers(
    small: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "here.json"
    threads = torch.get_num_threads()
    try:
        assert cli.main(["bench", "--device", "cpu", "--seconds", "1", "--threads", "1", "--json", str(file)]) == 0
    finally:
        torch.set_num_threads(threads)
    text = capsys.readouterr().out
    assert "original, float32" in text and "liif_fast, bfloat16" in text and "1 threads" in text
    assert text.count(" 1.00x") >= 3, "the original against itself"
    rows = json.loads(file.read_text())["rows"]
    assert len(rows) == 3
    for cells in rows.values():
        assert all(cell["seconds"]["median"] > 0 and cell["speedup"]["median"] > 0 for cell in cells.values())


def test_a_failed_method_has_its_reason_and_the_others_are_measured() -> None:
    def fail() -> None:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")

    row = command.BenchRow("job", {("original", "float32"): fail, ("liif_fast", "float32"): lambda: None})
    table = command.measure([row], CpuClock(), 0.05)
    assert table["job"]["original", "float32"].reason == "out of memory"
    measured = table["job"]["liif_fast", "float32"]
    assert measured.seconds is not None and measured.speedup is None
    assert "out of memory" in command.render(table)


def test_every_row_gets_a_round_without_time() -> None:
    rows = [command.BenchRow(name, {("liif_fast", "float32"): lambda: None}) for name in "ab"]
    table = command.measure(rows, CpuClock(), 1e-9)
    assert all(table[name]["liif_fast", "float32"].seconds["rounds"] == 1 for name in "ab")  # type: ignore[index]


def test_slow_methods_are_left_out_within_twice_the_time() -> None:
    def slow() -> None:
        while True:  # without the limit it would never end
            time.sleep(0.01)
            with torch.no_grad():
                torch.zeros(1) + 1

    def one_slow_call() -> None:
        time.sleep(0.2)

    methods = {("original", "float32"): slow, ("liif_fast", "bfloat16"): one_slow_call, ("liif_fast", "float32"): int}
    rows = [command.BenchRow(name, methods) for name in "ab"]
    steps: list[str] = []
    begin = time.perf_counter()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(command, "_GRACE_S", 0.0)
        table = command.measure(rows, CpuClock(), 0.5, steps.append)
    assert time.perf_counter() - begin < 2 * 0.5 + 2.0, "with time for a busy machine"
    for cells in table.values():
        assert [cell.reason for cell in cells.values()] == ["too slow", "too slow", ""]
        assert cells["liif_fast", "float32"].seconds is not None
    assert torch.is_grad_enabled()
    assert steps[0] == "a: liif_fast, float32" and "b: rounds" in steps


@pytest.mark.parametrize("emulated", [True, False])
def test_emulated_dtypes_are_left_out_with_one_line(
    small: None, emulated: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hardware, "emulates", lambda device, dtype: emulated)
    cpu = torch.device("cpu")
    assert {dtype for row in command.make_rows(cpu) for _, dtype in row.runs} == (
        {"float32"} if emulated else {"float32", "bfloat16"}
    )
    assert ("bfloat16 is left out: this processor would emulate it slowly" in command.header(cpu)) is emulated


@pytest.mark.parametrize(
    "arguments, code, message",
    [
        (["--seconds", "0"], 2, "'0' is not a number of seconds above 0"),
        (["--threads", "none"], 2, "'none' is not a whole number from 1"),
        (["--device", "tpu"], 1, "device 'tpu' cannot be used here"),
        (["--json", "nowhere/at/all.json"], 1, "does not exist: make it first"),
    ],
)
def test_bad_input_gives_one_sentence(
    arguments: list[str], code: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        assert cli.main(["bench", *arguments]) == code
    except SystemExit as end:
        assert end.code == code
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
