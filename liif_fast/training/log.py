"""The log of a run: log.txt, log.csv, TensorBoard and PNG curves; TensorBoard and matplotlib are optional."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from liif_fast.utils import tables
from liif_fast.utils.files import write_atomically

COLUMNS = ("epoch", "lr", "loss", "psnr", "rmse", "images_per_second", "seconds")


class RunLog:
    """The log of one run's folder.

    tensorboard, plots: True requires them, False turns them off, None uses them if the library is installed, and
    otherwise logs one line. report: called with every line of log.txt. epoch: the last epoch of a resumed run.
    Raises ValueError if a required library is missing.
    """

    def __init__(
        self,
        folder: Path,
        *,
        tensorboard: bool | None = None,
        plots: bool | None = None,
        report: Callable[[str], None] = print,
        epoch: int = 0,
    ) -> None:
        self.folder, self._report = folder, report
        self._writer = self._optional("tensorboard", tensorboard, lambda: _tensorboard(folder, epoch))
        self._figure = self._optional("plots", plots, _matplotlib)

    def _optional(self, switch: str, wanted: bool | None, make: Callable[[], Any]) -> Any:
        if wanted is False:
            return None
        try:
            return make()
        except ImportError as error:
            library = (error.name or switch).partition(".")[0]
            advice = f"{library} is not installed (pip install {library})"
            if wanted:
                raise ValueError(f"{switch} is true, but {advice}: install it or set {switch} to false") from None
            self.line(f"without {switch}: {advice}")
            return None

    def line(self, text: str) -> None:
        """Append a line to log.txt and report it."""
        with open(self.folder / "log.txt", "a", encoding="utf-8") as file:
            file.write(text + "\n")
        self._report(text)

    def epoch(self, history: Sequence[Mapping[str, float]]) -> None:
        """Rewrite log.csv with all epochs, and add the last epoch to TensorBoard."""
        rows = ([None if (cell := row.get(column)) is None else f"{cell:.8g}" for column in COLUMNS] for row in history)
        tables.write_csv(self.folder / "log.csv", COLUMNS, rows)
        if self._writer is not None:
            last = history[-1]
            for column in COLUMNS[1:-1]:
                if last.get(column) is not None:
                    self._writer.add_scalar(column, last[column], int(last["epoch"]))
            self._writer.flush()

    def draw(self, history: Sequence[Mapping[str, float]]) -> None:
        """Redraw the curves of loss and PSNR: loss.png, psnr.png."""
        if self._figure is None:
            return
        for column, unit in (("loss", "L1 loss"), ("psnr", "validation PSNR in dB")):
            points = [(row["epoch"], row[column]) for row in history if math.isfinite(row.get(column, math.nan))]
            if points:
                figure = self._figure(figsize=(6, 4), layout="constrained")
                axes = figure.add_subplot(xlabel="epoch", ylabel=unit)
                axes.plot(*zip(*points), marker="o" if len(points) < 20 else None)
                axes.grid(alpha=0.3)
                picture = io.BytesIO()
                figure.savefig(picture, format="png", dpi=120)
                write_atomically(self.folder / f"{column}.png", picture.getvalue())

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()


def _tensorboard(folder: Path, epoch: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ModuleNotFoundError as error:
        raise ImportError(str(error), name="tensorboard") from None
    return SummaryWriter(str(folder / "tensorboard"), purge_step=epoch + 1 if epoch else None)


def _matplotlib() -> Any:
    from matplotlib.figure import Figure  # not pyplot, which keeps every figure in memory

    return Figure
