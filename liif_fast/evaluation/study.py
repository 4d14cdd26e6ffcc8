"""The paper's comparison on a folder of images: methods x cells x scales x images, resumable, split over processes.

Every image is shrunk by Pillow's bicubic (8 bits) and enlarged by every method. A row of results carries a fingerprint
of the model's bytes, the image's bytes and the settings: a run that is started again computes only what is new.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import math
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tqdm import tqdm

from liif_fast.data import list_images, read_pixels, resize_bicubic, shrink_whole, to_tensor
from liif_fast.data.pictures import MODES
from liif_fast.evaluation.metrics import METRICS
from liif_fast.evaluation.scores import predict
from liif_fast.models import checkpoints
from liif_fast.utils import distributed
from liif_fast.utils.files import write_atomically

PROTOCOLS = ("div2k", "benchmark", "none")
BICUBIC = "bicubic"
OWN_CELL = "1/s"  # the cell that belongs to the scale
_SCHEMA = 1  # part of every fingerprint: raise it where the same inputs give other scores
_SAVE_SECONDS = 5.0


@dataclass(frozen=True)
class Method:
    """A row of the tables. files: checkpoint by scale, or under None for every scale; empty for bicubic."""

    name: str
    files: Mapping[float | None, str]

    def file(self, scale: float) -> str | None:
        return self.files.get(scale, self.files.get(None))


class Row(NamedTuple):
    """Scores of one method on one image at one scale; a metric that was not asked for is NaN."""

    method: str
    cell: str
    scale: float
    image: str
    psnr: float
    ssim: float
    fingerprint: str

    @property
    def label(self) -> str:
        return self.method if self.cell == OWN_CELL else f"{self.method}, cell {self.cell}"


@dataclass(frozen=True)
class Settings:
    """What is compared.

    methods, scales: rows and columns. cells: of models that decode with cells, '1/s' or '1/N'; '1/N' pretends the scale
    N and is computed where the scale is larger. metrics: of metrics.METRICS. protocol: 'div2k' (RGB, scale + 6 pixels
    shaved), 'benchmark' (luma, scale shaved) or 'none' (RGB, all pixels). n_colors: 1 (grey), 3 or 4, as the images are
    read and the models trained. device, backend: for the models.
    Raises ValueError for what does not exist.
    """

    methods: Sequence[Method]
    scales: Sequence[float] = (2, 3, 4, 6, 12, 18, 24, 30)
    cells: Sequence[str] = (OWN_CELL,)
    metrics: Sequence[str] = ("psnr",)
    protocol: str = "div2k"
    n_colors: int = 3
    device: torch.device | str = "cpu"
    backend: str | None = None

    def __post_init__(self) -> None:
        if not self.methods or not self.scales or OWN_CELL not in self.cells or "psnr" not in self.metrics:
            raise ValueError("a comparison needs at least one method, one scale, the cell 1/s and the metric psnr")
        if bad := [scale for scale in self.scales if not 1 <= scale < math.inf]:
            raise ValueError(f"scale {bad[0]:g} cannot be evaluated; scales must be at least 1")
        if bad_cells := [cell for cell in self.cells if cell != OWN_CELL and not re.fullmatch(r"1/[1-9]\d*", cell)]:
            raise ValueError(f"cell {bad_cells[0]!r} is not known; give 1/s or 1/N with a whole number N, such as 1/4")
        if unknown := [name for name in self.metrics if name not in METRICS]:
            raise ValueError(f"no metric is named {unknown[0]!r}; choose of {', '.join(METRICS)}")
        if self.protocol not in PROTOCOLS:
            raise ValueError(f"protocol is {self.protocol!r}; choose one of {', '.join(PROTOCOLS)}")
        if self.n_colors not in MODES:
            raise ValueError(f"n_colors is {self.n_colors}; images have 1 (grey), 3 (RGB) or 4 (RGBA)")


def resolve_methods(names: Sequence[str] | None, models: Sequence[str]) -> list[Method]:
    """Methods from the command line's words.

    names: 'bicubic', names given in `models`, 'liif' for the model that comes with the package, or the name of another
        one that does; None: bicubic and whatever `models` names, or liif.
    models: 'NAME=FILE', or 'NAME@SCALE=FILE' for a file that serves one scale only.
    Raises ValueError for a name without a file and for a file without a name in `names`, FileNotFoundError for a file
    that is not there.
    """
    files: dict[str, dict[float | None, str]] = {}
    for text in models:
        name, separator, file = text.partition("=")
        name, at, scale = name.partition("@")
        if not separator or not name or not file:
            raise ValueError(f"--model {text!r} is not NAME=FILE, nor NAME@SCALE=FILE")
        try:
            key = float(scale) if at else None
        except ValueError:
            raise ValueError(f"--model {text!r} names the scale {scale!r}, which is no number") from None
        checkpoints.find(file)  # said now, not after the first method's hours
        files.setdefault(name, {})[key] = file
    if names is None:
        names = [BICUBIC, *(files or ["liif"])]
    if BICUBIC in files:
        raise ValueError(f"--model names {BICUBIC!r}, which is Pillow's; give the model another name")
    if unused := [name for name in files if name not in names]:
        raise ValueError(f"--model names {unused[0]!r}, which --methods does not list; add it there")
    found = []
    for name in dict.fromkeys(names):
        if name == BICUBIC:
            found.append(Method(name, {}))
        elif name in files:
            found.append(Method(name, files[name]))
        elif name == "liif" or (checkpoints.WEIGHTS / f"{name}.safetensors").is_file():
            found.append(Method(name, {None: checkpoints.DEFAULT if name == "liif" else name}))
        else:
            raise ValueError(f"method {name!r} needs a model: add --model {name}=FILE")
    return found


def run(folder: str | Path, settings: Settings, out: str | Path, *, progress: bool = False) -> list[Row]:
    """Score everything that `out` does not know yet; returns the rows asked for and writes `out`/scores.csv.

    Processes of one launch share the images; every one returns all rows. A kill loses the last seconds' scores. Rows of
    methods, scales and images that are not asked for this time stay in the file.
    Raises ValueError for unusable images, models or settings.
    """
    folder, out = Path(folder), Path(out)
    out.mkdir(parents=True, exist_ok=True)
    known = {row.fingerprint: row for path in sorted(out.glob("scores*.csv")) for row in read_rows(path)}
    distributed.barrier()  # nobody writes while another still reads
    mine = list_images(folder)[distributed.rank() :: distributed.world_size()]
    part = out / f"scores.rank{distributed.rank()}.csv"
    rows: list[Row] = []
    saved, computed = time.monotonic(), 0

    def save() -> None:
        done = {row.fingerprint for row in rows}
        write_rows([*rows, *(row for row in known.values() if row.fingerprint not in done)], part)

    try:
        bar = tqdm(_jobs(mine, settings), total=_count(mine, settings), unit="score", disable=not progress, leave=False)
        for job in bar:
            fingerprint = job.fingerprint(settings)
            row = known.get(fingerprint)
            if row is None:
                scores = job.scores(settings)
                if scores is None:
                    continue
                computed += 1
                row = Row(job.method.name, job.cell, job.scale, job.path.name, scores[0], scores[1], fingerprint)
            rows.append(row._replace(method=job.method.name, image=job.path.name))
            if computed and time.monotonic() - saved > _SAVE_SECONDS:
                save()
                saved = time.monotonic()
    finally:
        if computed:
            save()
    gathered = distributed.gather([tuple(row) for row in rows])
    everything = [Row(*row) for part_rows in gathered for row in part_rows]
    if distributed.is_main():
        keys = {row[:4] for row in everything}
        write_rows([*everything, *(row for row in known.values() if row[:4] not in keys)], out / "scores.csv")
        for path in out.glob("scores.rank*.csv"):
            path.unlink()
    distributed.barrier()
    return everything


class _Models:
    """The one model in use: loading it again for every image would take longer than small images do."""

    def __init__(self, settings: Settings) -> None:
        self._settings, self._file, self._model = settings, "", None

    def get(self, file: str) -> Any:
        if file != self._file:
            self._model = None  # not two at a time
            model: Any = checkpoints.load(file, device=self._settings.device)
            model.backend = self._settings.backend
            self._file, self._model = file, model
        return self._model


@dataclass(frozen=True)
class _Job:
    method: Method
    cell: str
    scale: float
    path: Path
    models: _Models
    digests: dict[str, str]

    def fingerprint(self, settings: Settings) -> str:
        file = self.method.file(self.scale)
        parts = [_SCHEMA, self.cell, self.scale, settings.protocol, sorted(settings.metrics), settings.n_colors]
        for name in (str(self.path), None if file is None else str(checkpoints.find(file))):
            if name is not None and name not in self.digests:
                self.digests[name] = hashlib.sha256(Path(name).read_bytes()).hexdigest()
            parts.append(None if name is None else self.digests[name])
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]

    def scores(self, settings: Settings) -> tuple[float, float] | None:
        """(PSNR, SSIM), or None where the method has nothing to say at this scale."""
        file = self.method.file(self.scale)
        model = None if file is None else self.models.get(file)
        if model is not None and not applies(model, self.scale, self.cell):
            return None
        if model is not None and getattr(model.encoder, "n_colors", 3) != settings.n_colors:
            raise ValueError(
                f"{file} is for images of {model.encoder.n_colors} channels, not {settings.n_colors}: set --n-colors"
            )
        low, high = shrink_whole(read_pixels(self.path, settings.n_colors), self.scale)
        pred = enlarge(model, low, (high.shape[0], high.shape[1]), self.cell)
        protocol = None if settings.protocol == "none" else f"{settings.protocol}-{math.ceil(self.scale)}"
        try:
            found = {name: METRICS[name](pred, to_tensor(high), protocol) for name in settings.metrics}
        except ValueError as error:
            raise ValueError(f"{self.path} at x{self.scale:g}: {error}") from error
        return found["psnr"], found.get("ssim", math.nan)


def applies(model: Any, scale: float, cell: str) -> bool:
    """Whether a model can be asked for a scale with a cell.

    An encoder that upsamples by itself serves its own scale; another cell than 1/s means something to cell decoding
    alone, and below its own scale nothing.
    """
    own_scale = getattr(model, "imnet", model) is None
    if own_scale and scale != getattr(model.encoder, "scale", None):
        return False
    if cell == OWN_CELL:
        return True
    return not own_scale and getattr(model, "cell_decode", False) and scale > int(cell[2:])


def enlarge(model: Any, low: Any, size: tuple[int, int], cell: str) -> torch.Tensor:
    """uint8 [h, w, C] -> float32 [C, H, W] in [0, 1] by a model; model None is Pillow's bicubic, in 8 bits."""
    if model is None:
        return to_tensor(resize_bicubic(low, size))
    if cell == OWN_CELL:
        return predict(model, low, size)
    latents = int(cell[2:]) * low.shape[0], int(cell[2:]) * low.shape[1]
    return predict(model, low, size, (2 / latents[0], 2 / latents[1]))


def _jobs(paths: Sequence[Path], settings: Settings) -> Iterator[_Job]:
    models, digests = _Models(settings), dict[str, str]()
    for method, cell, scale in _columns(settings):
        for path in paths:
            yield _Job(method, cell, scale, path, models, digests)


def _columns(settings: Settings) -> Iterator[tuple[Method, str, float]]:
    for method in settings.methods:
        for cell in settings.cells if method.files else (OWN_CELL,):
            for scale in settings.scales:
                if not method.files or method.file(scale) is not None:
                    yield method, cell, scale


def _count(paths: Sequence[Path], settings: Settings) -> int:
    return len(list(_columns(settings))) * len(paths)


def write_rows(rows: Sequence[Row], path: str | Path) -> None:
    """Save rows as CSV, one column a field."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(Row._fields)
    for row in rows:
        ssim = "" if math.isnan(row.ssim) else f"{row.ssim:.6f}"
        writer.writerow(row._replace(scale=f"{row.scale:g}", psnr=f"{row.psnr:.6f}", ssim=ssim))  # type: ignore
    write_atomically(path, text.getvalue().encode())


def read_rows(path: str | Path) -> list[Row]:
    """Read what `write_rows` saved; ValueError for another file."""
    with open(path, newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        if tuple(reader.fieldnames or ()) != Row._fields:
            raise ValueError(f"{path} is not a table of scores of this program; move it away or choose another --out")
        return [
            Row(
                line["method"],
                line["cell"],
                float(line["scale"]),
                line["image"],
                float(line["psnr"]),
                float(line["ssim"] or "nan"),
                line["fingerprint"],
            )
            for line in reader
        ]
