"""The documents and the saved results agree; bench.training_step and bench.loader measure and check."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

import liif_fast
from bench import blocks, loader, patched, relatives, report, results, training_step
from liif_fast.benchmark.timing import CpuClock

FOUND = results.load_all()


def document(name: str) -> str:
    return f"# Title\n<!-- bench:{name} -->\nSTALE\n<!-- /bench:{name} -->\nend\n"


@pytest.mark.parametrize("path", report.documents(), ids=lambda path: path.name)
def test_every_generated_block_is_what_the_saved_results_give(path: Path) -> None:
    text = path.read_text()
    assert report.rewritten(path, FOUND) == text, "run `python -m bench.report`"
    assert report.loose_numbers(text) == []
    assert "e+0" not in text and "do not rely" not in text


def test_the_headline_has_five_rows_and_three_columns() -> None:
    text = report.rewrite(document("results"), FOUND, depth=1)
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert len(rows) == 2 + 5 and all(row.count("|") == 4 for row in rows)
    assert "not yet run on a GPU" in rows[-1] and "](../bench/results/" in text and "STALE" not in text


def test_a_gpu_result_fills_its_tables() -> None:
    assert blocks.BLOCKS["gpu"](FOUND) == "Not yet run on a GPU.\n"
    result = json.loads(json.dumps(next(each for each in FOUND if "workloads" in each)))
    result["machine"] |= {"device": "cuda", "gpu": "Some GPU", "driver": "1"}
    record = result["workloads"]["decode-64-to-256"]
    record["methods"]["cuda-bf16"] = record["methods"]["cpu-bf16"]
    result["workloads"] = {"decode-256-to-1024": record}
    found = [*FOUND, result]
    assert "Some GPU, driver 1" in (blocks.BLOCKS["gpu"](found) or "")
    assert "`cuda` backend, bfloat16" in (blocks.BLOCKS["results"](found) or "")
    assert blocks.BLOCKS["decode"](found) == blocks.BLOCKS["decode"](FOUND)


@pytest.mark.parametrize(
    "text, message",
    [
        (document("speed"), "bench:speed is not a block"),
        (document("decode"), "make bench"),
        ("<!-- bench:decode -->\n", "lacks its"),
        (document("decode") + "<!-- /bench:memory -->", "lacks its"),
    ],
)
def test_blocks_that_cannot_be_filled_are_refused(text: str, message: str) -> None:
    with pytest.raises(report.ReportError, match=message):
        report.rewrite(text, [])


@pytest.mark.parametrize(
    "line, loose",
    [
        ("It takes 4.2 ms on a laptop.", True),
        ("Three times faster, or 7.9x faster.", True),
        ("At 93 % of the peak, 436 GFLOP/s.", True),
        ("(1.7x fewer operations), 30,000-query chunks, Python >= 3.10", False),
    ],
)
def test_a_measured_number_outside_the_blocks_is_found(line: str, loose: bool) -> None:
    text = f"{document('decode').replace('STALE', '5 ms')}\n```\nsleep 5 ms\n```\n{line}\n"
    assert report.loose_numbers(text) == ([line] if loose else [])


def test_results_of_another_schema_are_refused_and_other_files_skipped(tmp_path: Path) -> None:
    folder = tmp_path / "cpu-x"
    folder.mkdir()
    (folder / "2001-01-01-checks.json").write_text(json.dumps({"passed": 3}))
    assert results.load_all(tmp_path) == []
    (folder / "2001-01-01-full.json").write_text(json.dumps({"schema": 0, "workloads": {}}))
    with pytest.raises(ValueError, match="schema 0"):
        results.load_all(tmp_path)


SMALL = {
    "name": "liif",
    "args": {
        "encoder_spec": {"name": "edsr-baseline", "args": {"n_resblocks": 1, "n_feats": 8, "no_upsampling": True}},
        "imnet_spec": {"name": "mlp", "args": {"out_dim": 3, "hidden_list": [16, 16]}},
    },
}


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loader, "SPEC", SMALL)
    monkeypatch.setattr(loader, "WRAPPER", {"inp_size": 8, "scale_max": 4, "sample_q": 16})
    monkeypatch.setattr(loader, "SIZE", (48, 64))


@pytest.mark.parametrize("name", [name for name in training_step.VARIANTS if "compiled" not in name])
def test_every_variant_learns_the_same(name: str, small: None) -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = {"inp": (4, 3, 8, 8), "coord": (4, 16, 2), "cell": (4, 16, 2), "gt": (4, 16, 3)}
    batch = {key: torch.rand(shape, generator=generator) for key, shape in shapes.items()}
    losses = []
    for variant in (training_step.VARIANTS["original"], training_step.VARIANTS[name]):
        stepper = training_step.make_loop(variant, torch.device("cpu"))
        losses.append([stepper.step(batch).item() for _ in range(3)])
    exact = training_step.VARIANTS[name].options.autocast is None
    assert losses[1] == pytest.approx(losses[0], rel=1e-5 if exact else 5e-3)
    assert losses[0][2] < losses[0][0]


@pytest.mark.prove
def test_steps_and_loaders_are_measured_and_tabulated(tmp_path: Path, small: None) -> None:
    images = tmp_path / "images"
    images.mkdir()
    loader.make_images(images, 1)
    result = training_step.measure(CpuClock(), images, ["original", "ours", "ours-fast"], rounds=1)
    assert results.save(result, tmp_path).is_file()
    text = training_step.steps_table(result) + training_step.split_table(result)
    assert re.search(r"^\| original, float32 \|.*\| 1\.00x \|$", text, re.MULTILINE)
    assert text.count("liif-fast train, float32") == 2
    result["entries"]["ours"] = {"failed": "out of memory"}
    assert "| out of memory |" in training_step.steps_table(result)
    text = loader.table(loader.measure(images, "cpu", rounds=1, count=1, steps=1, max_workers=0))
    assert "cache in_memory, 0 workers" in text and "keeps up with the training step, bf16" in text


@pytest.mark.prove
def test_the_patched_loops_are_measured_and_tabulated(monkeypatch: pytest.MonkeyPatch, small: None) -> None:
    monkeypatch.setattr(patched, "SIZE", 8)
    with liif_fast.patched(patched._Patched):
        loops = [patched.make_loops(cls, torch.device("cpu")) for cls in (training_step.OriginalLIIF, patched._Patched)]
        for name in patched.LOOPS:
            torch.testing.assert_close(loops[1][name](), loops[0][name]())
    result = patched.measure(CpuClock(), rounds=1)
    assert patched.table(result).count("x |\n") == 2
    assert blocks.BLOCKS["patch"]([{**result, "path": ""}]).count("as fast") == 2  # type: ignore[union-attr]


@pytest.fixture
def small_relatives(small: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(relatives, "SPEC", SMALL)
    for name, size in (("CHANNELS", 8), ("SIZE", 6), ("SCALE", 3), ("CROP", 5), ("SAMPLES", 30)):
        monkeypatch.setattr(relatives, name, size)
    for decoder in relatives.RELATIVES.values():
        monkeypatch.setattr(decoder, "chunk", tuple(min(each, 50) for each in decoder.chunk))


@pytest.mark.parametrize("relative", relatives.RELATIVES)
def test_the_decoders_of_a_relative_agree(relative: str, small_relatives: None) -> None:
    torch.manual_seed(0)
    model = relatives.Model(relative).double()
    leaves = [each for each in model.parameters() if each.requires_grad]
    inp, truth = torch.rand(2, 3, 6, 5, dtype=torch.float64), torch.rand(2, 70, 3, dtype=torch.float64)
    coord, cell = torch.rand(2, 70, 2, dtype=torch.float64) * 2 - 1, torch.full((2, 70, 2), 0.1, dtype=torch.float64)
    found = []
    for model.decoder.around_ops in (False, True):
        with torch.no_grad():
            image = model(inp[:1], coord[:1], cell[:1])
        out = model(inp, coord, cell)
        grads = torch.autograd.grad((out - truth).square().sum(), leaves)
        found.append([image, out, *grads])
    assert found[0][0].std() > 1e-3 and all(grad.any() for grad in found[0][2:])
    torch.testing.assert_close(found[1], found[0], rtol=1e-8, atol=1e-10)


@pytest.mark.prove
def test_the_relatives_are_measured_and_tabulated(small_relatives: None) -> None:
    result = relatives.measure(CpuClock(), 1, "relatives-decode", ["climate with topography", "guided depth"])
    assert relatives.table(result).count("x |\n") == 4
    assert "guided depth, training step" in (blocks.BLOCKS["relatives-decode"]([{**result, "path": ""}]) or "")
