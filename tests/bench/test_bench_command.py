"""`liif-fast bench`: the same jobs in both columns, a table of what was measured, one sentence for bad input."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from liif_fast.benchmark import command
from liif_fast.benchmark.timing import CpuClock
from liif_fast.cli import main as cli
from tests.helpers import norm_error

FP32, BF16 = torch.float32, torch.bfloat16


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Jobs of a few milliseconds."""
    monkeypatch.setitem(command._DECODE, "cpu", ((6, 5), (17, 13)))
    monkeypatch.setitem(command._BATCH, "cpu", 1)
    monkeypatch.setitem(command._ROUNDS, "cpu", 2)
    photo = command._photo(torch.device("cpu"))[:, :12, :10].contiguous()
    monkeypatch.setattr(command, "_photo", lambda device: photo)


def test_both_columns_do_the_same_job(small: None) -> None:
    rows = command.make_rows(torch.device("cpu"))
    assert [row.name.split()[0] for row in rows] == ["decode", "decoder's", "photo"]
    for row in rows:
        assert list(row.runs) == [("original", FP32), ("original", BF16), ("here", FP32), ("here", BF16)]
        expected, *others = [_flat(run()) for run in row.runs.values()]
        for (_, dtype), actual in zip(list(row.runs)[1:], others):
            assert actual.shape == expected.shape
            assert norm_error(actual, expected) < (1e-3 if dtype == FP32 else 0.2), (row.name, dtype)


def _flat(result: Any) -> torch.Tensor:
    if isinstance(result, tuple):  # gradients
        return torch.cat([part.double().flatten() for part in result])
    if result.dim() == 4:  # an image whose queries the original returns in a row
        result = result.flatten(2).transpose(1, 2)
    return result.double().flatten()


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
    assert "original, float32" in text and "here, bfloat16" in text and "1 threads" in text
    assert text.count(" 1.00x") >= 3, "the original against itself"
    rows = json.loads(file.read_text())["rows"]
    assert len(rows) == 3
    for cells in rows.values():
        assert all(cell["seconds"]["median"] > 0 and cell["speedup"]["median"] > 0 for cell in cells.values())


def test_one_that_fails_says_why_and_the_others_are_measured() -> None:
    def fail() -> None:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")

    row = command.Row("job", {("original", FP32): fail, ("here", FP32): lambda: None})
    table = command.measure([row], CpuClock(), 0.05)
    assert table["job"]["original", FP32].reason == "out of memory"
    there = table["job"]["here", FP32]
    assert there.seconds is not None and there.speedup is None
    assert "out of memory" in command.render(table)


def test_time_is_shared_between_rows_but_each_is_measured() -> None:
    rows = [command.Row(name, {("here", FP32): lambda: None}) for name in "ab"]
    table = command.measure(rows, CpuClock(), 1e-9)
    assert all(len(table[name]["here", FP32].seconds["samples"]) == 1 for name in "ab")  # type: ignore[index]


@pytest.mark.parametrize(
    "arguments, code, message",
    [
        (["--seconds", "0"], 2, "'0' is not a number of seconds above 0"),
        (["--threads", "none"], 2, "'none' is not a whole number from 1"),
        (["--device", "tpu"], 1, "device 'tpu' cannot be used here"),
        (["--json", "nowhere/at/all.json"], 1, "does not exist: make it first"),
    ],
)
def test_bad_input_gets_one_sentence(
    arguments: list[str], code: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        assert cli.main(["bench", *arguments]) == code
    except SystemExit as end:
        assert end.code == code
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
