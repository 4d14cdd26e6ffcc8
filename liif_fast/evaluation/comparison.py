"""The paper's comparison on a folder of images: methods x cells x scales x images, resumable, in several processes.

Pillow's bicubic shrinks every image to 8 bits, and every method enlarges it. Each score has a fingerprint of the
model's bytes, the image's bytes and the settings. A repeated run computes only scores without a known fingerprint.
"""

from __future__ import annotations

import csv
import hashlib
import json
import math
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from liif_fast.data import list_images, naming, read_pixels, resize_bicubic, shrink_whole, to_tensor
from liif_fast.data.pictures import MODES
from liif_fast.evaluation.metrics import METRICS, check_metrics
from liif_fast.models import catalog, checkpoints
from liif_fast.utils import distributed, tables
from liif_fast.utils.files import sha256
from liif_fast.utils.normalization import normalizations

PROTOCOLS = ("div2k", "benchmark", "none")
BICUBIC = "bicubic"
OWN_CELL = "1/s"  # the cell of the scale itself
_SCHEMA = 1  # part of every fingerprint: increase it if a change of the code gives other scores
_SAVE_SECONDS = 5.0


@dataclass(frozen=True)
class Method:
    """A row of the tables. files: the checkpoint for each scale, or for all scales under None; empty for bicubic."""

    name: str
    files: Mapping[float | None, str]

    def file(self, scale: float) -> str | None:
        return self.files.get(scale, self.files.get(None))


class ScoreRecord(NamedTuple):
    """Scores of one method on one image at one scale; a metric that was not computed is NaN.

    model: the first 16 digits of the sha256 of the model's file; '' for bicubic.
    """

    method: str
    cell: str
    scale: float
    image: str
    psnr: float
    ssim: float
    fingerprint: str
    model: str = ""

    @property
    def label(self) -> str:
        return self.method if self.cell == OWN_CELL else f"{self.method}, cell {self.cell}"


@dataclass(frozen=True)
class ComparisonConfig:
    """The methods and scales of a comparison, and how they are scored.

    methods, scales: rows and columns of the tables.
    cells: for models that decode with cells, '1/s' or '1/N'; '1/N' decodes with the cell of scale N, at larger scales.
    metrics: names in metrics.METRICS.
    protocol: 'div2k' (RGB without a border of scale + 6 pixels), 'benchmark' (luma without a border of scale pixels) or
        'none' (RGB, all pixels).
    n_colors: channels of the images and of the models: 1 (gray), 3 or 4. device, backend: for the models.
    settings: of `checkpoints.load`, for all models.
    Raises ValueError for a value that does not exist.
    """

    methods: Sequence[Method]
    scales: Sequence[float] = (2, 3, 4, 6, 12, 18, 24, 30)
    cells: Sequence[str] = (OWN_CELL,)
    metrics: Sequence[str] = ("psnr",)
    protocol: str = "div2k"
    n_colors: int = 3
    device: torch.device | str = "cpu"
    backend: str | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.methods or not self.scales or OWN_CELL not in self.cells or "psnr" not in self.metrics:
            raise ValueError("a comparison needs at least one method, one scale, the cell 1/s and the metric psnr")
        if bad := [scale for scale in self.scales if not 1 <= scale < math.inf]:
            raise ValueError(f"scale {bad[0]:g} cannot be evaluated; it must be at least 1")
        if bad_cells := [cell for cell in self.cells if cell != OWN_CELL and not re.fullmatch(r"1/[1-9]\d*", cell)]:
            raise ValueError(f"cell {bad_cells[0]!r} is not known; give 1/s or 1/N with a whole number N, such as 1/4")
        check_metrics(self.metrics)
        if "rmse" in self.metrics:
            raise ValueError("tables of a folder have psnr and ssim; rmse needs a test configuration (--config)")
        if self.protocol not in PROTOCOLS:
            raise ValueError(f"protocol is {self.protocol!r}; choose one of {', '.join(PROTOCOLS)}")
        if self.n_colors not in MODES:
            raise ValueError(f"n_colors is {self.n_colors}; it must be 1 (gray), 3 (RGB) or 4 (RGBA)")


def resolve_methods(names: Sequence[str] | None, models: Sequence[str]) -> list[Method]:
    """Methods from the options --methods and --model.

    names: 'bicubic', names in `models`, names in the catalog, or 'liif' for the default model, which the log tells;
        None means bicubic and all names in `models`, or bicubic and liif.
    models: 'NAME=FILE', a name in the catalog, or 'NAME@SCALE=FILE' for a file that is used at one scale only.
    Raises ValueError for a name without a file and for a file without a name in `names`, FileNotFoundError for a
    missing file.
    """
    files: dict[str, dict[float | None, str]] = {}
    known = [entry.name for entry in catalog.CATALOG]
    for text in models:
        name, separator, file = (text, "=", text) if text in known else text.partition("=")
        name, at, scale = name.partition("@")
        if not separator or not name or not file:
            raise ValueError(f"--model {text!r} is not NAME=FILE, nor NAME@SCALE=FILE")
        try:
            key = float(scale) if at else None
        except ValueError:
            raise ValueError(f"--model {text!r} has the scale {scale!r}, which is not a number") from None
        checkpoints.find(file)  # a missing file is an error before the first method runs
        files.setdefault(name, {})[key] = file
    if names is None:
        names = [BICUBIC, *(files or ["liif"])]
    if BICUBIC in files:
        raise ValueError(f"--model names {BICUBIC!r}, which is Pillow's resize; give the model another name")
    if unused := [name for name in files if name not in names]:
        raise ValueError(f"--model names {unused[0]!r}, which --methods does not list; add it there")
    found = []
    for name in dict.fromkeys(names):
        if name == BICUBIC:
            found.append(Method(name, {}))
        elif name in files:
            found.append(Method(name, files[name]))
        elif name == "liif":
            found.append(Method(name, {None: catalog.report_default().name}))
        elif name in known:
            checkpoints.find(name)
            found.append(Method(name, {None: name}))
        else:
            raise ValueError(f"method {name!r} needs a model: add --model {name}=FILE")
    return found


def run(folder: str | Path, config: ComparisonConfig, out: str | Path, *, progress: bool = False) -> list[ScoreRecord]:
    """Compute the scores that are not yet in `out`; writes `out`/scores.csv and returns the comparison's records.

    The processes of one launch split the images, and each returns all records. A kill loses the scores of the last few
    seconds. Records of other methods, scales and images stay in the file.
    Raises ValueError for unusable images, models or settings.
    """
    folder, out = Path(folder), Path(out)
    out.mkdir(parents=True, exist_ok=True)
    known = {record.fingerprint: record for path in sorted(out.glob("scores*.csv")) for record in read_records(path)}
    distributed.barrier()  # all processes read before the first one writes
    jobs = _jobs(list_images(folder)[distributed.rank() :: distributed.world_size()], config)
    own_file = out / f"scores.rank{distributed.rank()}.csv"
    scorer = _Scorer(config)
    records: list[ScoreRecord] = []
    saved, computed = time.monotonic(), 0

    def save() -> None:
        done = {record.fingerprint for record in records}
        write_records([*records, *(known[key] for key in known if key not in done)], own_file)

    try:
        for job in tqdm(jobs, unit="score", disable=not progress, leave=False):
            fingerprint = scorer.fingerprint(job)
            record = known.get(fingerprint)
            if record is None:
                scores = scorer.scores(job)
                if scores is None:
                    continue
                computed += 1
                record = ScoreRecord(job.method.name, job.cell, job.scale, job.path.name, *scores, fingerprint)
            model = scorer.model_digest(job)[:16]
            records.append(record._replace(method=job.method.name, image=job.path.name, model=model))
            if computed and time.monotonic() - saved > _SAVE_SECONDS:
                save()
                saved = time.monotonic()
    finally:
        if computed:
            save()
    gathered = distributed.gather([tuple(record) for record in records])
    everything = [ScoreRecord(*fields) for part in gathered for fields in part]
    if distributed.is_main():
        keys = {record[:4] for record in everything}
        write_records([*everything, *(each for each in known.values() if each[:4] not in keys)], out / "scores.csv")
        for path in out.glob("scores.rank*.csv"):
            path.unlink()
    distributed.barrier()
    return everything


class _Job(NamedTuple):
    method: Method
    cell: str
    scale: float
    path: Path


def _jobs(paths: Sequence[Path], config: ComparisonConfig) -> list[_Job]:
    return [
        _Job(method, cell, scale, path)
        for method in config.methods
        for cell in (config.cells if method.files else (OWN_CELL,))
        for scale in config.scales
        if not method.files or method.file(scale) is not None
        for path in paths
    ]


class _Scorer:
    """Scores jobs, with at most one model in memory."""

    def __init__(self, config: ComparisonConfig) -> None:
        self._config, self._file, self._model = config, "", None
        self._digests: dict[Path, str] = {}

    def _load(self, file: str) -> Any:
        if file != self._file:
            self._model = None  # frees the last model before the next one is loaded
            model: Any = checkpoints.load(file, device=self._config.device, settings=self._config.settings)
            model.backend = self._config.backend
            self._file, self._model = file, model
        return self._model

    def fingerprint(self, job: _Job) -> str:
        config = self._config
        parts = [_SCHEMA, job.cell, float(job.scale), config.protocol, sorted(config.metrics), config.n_colors]
        parts += [self._digest(job.path), self.model_digest(job) or None]
        if config.settings and job.method.files:
            parts.append(dict(config.settings))
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]

    def model_digest(self, job: _Job) -> str:
        """The sha256 of the model's file; '' for bicubic."""
        file = job.method.file(job.scale)
        return "" if file is None else self._digest(checkpoints.find(file))

    def _digest(self, path: Path) -> str:
        if path not in self._digests:
            self._digests[path] = sha256(path)
        return self._digests[path]

    def scores(self, job: _Job) -> tuple[float, float] | None:
        """(PSNR, SSIM), or None if the method does not apply at this scale."""
        file, config = job.method.file(job.scale), self._config
        model = None if file is None else self._load(file)
        if model is not None and not applies(model, job.scale, job.cell):
            return None
        if model is not None and getattr(model.encoder, "n_colors", 3) != config.n_colors:
            raise ValueError(
                f"{file} is for images of {model.encoder.n_colors} channels, not {config.n_colors}: set --n-colors"
            )
        pixels = read_pixels(job.path, config.n_colors)
        protocol = None if config.protocol == "none" else f"{config.protocol}-{math.ceil(job.scale)}"
        with naming(f"{job.path} at x{job.scale:g}"):
            low, high = shrink_whole(pixels, job.scale)
            pred = enlarge(model, low, (high.shape[0], high.shape[1]), job.cell)
            found = {name: METRICS[name](pred, to_tensor(high), protocol) for name in config.metrics}
        return found["psnr"], found.get("ssim", math.nan)


def applies(model: Any, scale: float, cell: str) -> bool:
    """Whether a model can enlarge by a scale with a cell.

    An encoder that upsamples by itself has one scale. A cell 1/N other than 1/s needs a model that decodes with cells,
    and a scale above N.
    """
    own_scale = getattr(model, "imnet", model) is None
    if own_scale and scale != getattr(model.encoder, "scale", None):
        return False
    if cell == OWN_CELL:
        return True
    return not own_scale and getattr(model, "cell_decode", False) and scale > int(cell[2:])


@torch.no_grad()
def predict(model: Any, low: np.ndarray, size: tuple[int, int], cell: tuple[float, float] | None = None) -> Tensor:
    """Enlarge an 8-bit image with a model: uint8 [h, w, C] -> float32 [C, H, W] in [0, 1], size = (H, W).

    cell: (rows, cols) size of a query's pixel in coordinates, for models that decode with cells; None = (2/H, 2/W).
    """
    parameter = next(model.parameters())
    inp_norm, gt_norm = normalizations(model.data_norm, parameter.device, parameter.dtype)
    out = model.encode(inp_norm.normalize(to_tensor(low).to(parameter)[None])).render(size, cell=cell)
    return gt_norm.restore(out)[0].clamp(0, 1).float().cpu()


def enlarge(model: Any, low: Any, size: tuple[int, int], cell: str) -> torch.Tensor:
    """uint8 [h, w, C] -> float32 [C, H, W] in [0, 1] with a model, or with Pillow's 8-bit bicubic for None."""
    if model is None:
        return to_tensor(resize_bicubic(low, size))
    if cell == OWN_CELL:
        return predict(model, low, size)
    latents = int(cell[2:]) * low.shape[0], int(cell[2:]) * low.shape[1]
    return predict(model, low, size, (2 / latents[0], 2 / latents[1]))


def write_records(records: Sequence[ScoreRecord], path: str | Path) -> None:
    """Save records as CSV, one column per field."""
    rows = []
    for record in records:
        ssim = "" if math.isnan(record.ssim) else f"{record.ssim:.6f}"
        rows.append(record._replace(scale=f"{record.scale:g}", psnr=f"{record.psnr:.6f}", ssim=ssim))  # type: ignore
    tables.write_csv(path, ScoreRecord._fields, rows)


def read_records(path: str | Path) -> list[ScoreRecord]:
    """Read the file of `write_records`, or of a version without the column `model`; ValueError for another file."""
    with open(path, newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        if tuple(reader.fieldnames or ()) not in (ScoreRecord._fields, ScoreRecord._fields[:-1]):
            raise ValueError(f"{path} is not a table of scores of liif-fast evaluate: move it or choose another --out")
        numbers, lines = ("scale", "psnr", "ssim"), list[dict[str, Any]](reader)
        return [ScoreRecord(**{**line, **{key: float(line[key] or "nan") for key in numbers}}) for line in lines]
