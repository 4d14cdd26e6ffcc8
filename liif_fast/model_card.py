"""The model card of trained weights, rendered from what the run saved: no number in it is typed.

`python -m liif_fast.model_card --run DIR --name tiny --train-manifest CSV --val-manifest CSV --out tiny.md`
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from liif_fast.evaluation import markdown_table, mean_scores, read_csv
from liif_fast.utils.files import write_atomically

MANIFEST_COLUMNS = ("file", "author", "licence", "source_package", "source_version", "transform")


def read_manifest(path: str | Path) -> list[dict[str, str]]:
    """Rows of a CSV that says where each picture comes from; ValueError where one of MANIFEST_COLUMNS is missing."""
    with open(path, newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        missing = [column for column in MANIFEST_COLUMNS if column not in (reader.fieldnames or ())]
        if missing:
            raise ValueError(
                f"{str(path)!r} has no column {', '.join(missing)}; a manifest names every picture's source"
            )
        return list(reader)


def render_card(run_folder: str | Path, name: str, train_manifest: str | Path, val_manifest: str | Path) -> str:
    """The card as Markdown.

    run_folder, name: what training.budget.train wrote (`<name>.safetensors`, -run.json, -curve.csv, -psnr.csv).
    train_manifest, val_manifest: CSV files with MANIFEST_COLUMNS, one row a picture.
    """
    folder = Path(run_folder)
    weights = (folder / f"{name}.safetensors").read_bytes()
    run = json.loads((folder / f"{name}-run.json").read_text(encoding="utf-8"))
    scores = read_csv(folder / f"{name}-psnr.csv")
    train, val = read_manifest(train_manifest), read_manifest(val_manifest)
    settings = run["settings"]
    encoder, imnet = (run["spec"]["args"][part]["args"] for part in ("encoder_spec", "imnet_spec"))
    highest = f"x{settings['scale_max']:g}"
    sections = [
        f"# {name}",
        f"A LIIF of {run['parameters']:,} parameters: {run['spec']['args']['encoder_spec']['name']} with "
        f"{encoder['n_resblocks']} residual blocks of {encoder['n_feats']} channels, imnet with hidden layers "
        f"{' and '.join(map(str, imnet['hidden_list']))}; feature unfolding, local ensemble and cell decoding as in "
        f"the paper. {len(weights) / 1e6:.2f} MB, stored as {run['stored_as']}, sha256 "
        f"`{hashlib.sha256(weights).hexdigest()}`. Rendered by `liif_fast.model_card` from the files of the run.",
        "## PSNR in dB, and bicubic on the same files",
        f"Mean over the {len(val)} validation pictures below: shrunk by Pillow's bicubic, RGB, scale + 6 pixels "
        "shaved. They are not a public benchmark: compare with bicubic here, not with published tables.",
        markdown_table(mean_scores(scores)),
        "Every picture:",
        markdown_table(scores),
        "## Training",
        *_training(folder, name),
        "The settings were chosen by short runs judged on the same validation pictures; no picture of them was trained "
        "on, and the weights are those at the end of the budget, not the best on the way.",
        "## Limits",
        f"Trained for clean photographs shrunk by an antialiased bicubic filter, x{settings['scale_min']:g} to "
        f"{highest}; beyond {highest} the model extrapolates. Noise, JPEG artefacts, blur and other ways of shrinking "
        "are not removed and may be sharpened; the pictures were not chosen for text, drawings or faces. L1 rewards "
        "the middle of what is likely, so fine texture stays smooth. Detail is estimated: do not read evidence out of "
        "enlarged pictures.",
        "## Data",
        f"{len(train)} photographs for training, {len(val)} for validation, from the packages named below. The "
        "weights hold none of them. Some licences ask for attribution or share-alike; the list is here so that you can "
        "judge what follows for your use.",
        "### Training pictures",
        _table(MANIFEST_COLUMNS, [[row[column] for column in MANIFEST_COLUMNS] for row in train]),
        "### Validation pictures",
        _table(MANIFEST_COLUMNS, [[row[column] for column in MANIFEST_COLUMNS] for row in val]),
    ]
    return "\n\n".join(sections) + "\n"


def _training(folder: Path, name: str) -> list[str]:
    """What a run did, as sections; a run that began with another one's weights has its files beside its own, as
    `<name>-start-run.json` and `<name>-start-curve.csv`."""
    run = json.loads((folder / f"{name}-run.json").read_text(encoding="utf-8"))
    with open(folder / f"{name}-curve.csv", newline="", encoding="utf-8") as file:
        curve = list(csv.DictReader(file))
    settings = run["settings"]
    goes_on = bool(settings.get("init")) and (folder / f"{name}-start-run.json").exists()
    if goes_on:
        start = "The start is the averaged weights of an earlier run, which is described below this one."
    elif settings.get("init"):
        start = f"The start is {settings['init']}, its {settings['init_part']}."
    elif settings["bilinear_start"]:
        start = "The start is exact bilinear interpolation (`liif_fast.initialization`)."
    else:
        start = "The start is random."
    earlier = ["### The earlier run", *_training(folder, f"{name}-start")] if goes_on else []
    return [
        f"{run['steps']:,} steps in {run['seconds'] / 60:.0f} minutes of wall clock on a CPU with {run['threads']} "
        f"threads (torch {run['torch']}), L1, Adam. Weights are the running average. {start} Settings, as "
        "`liif_fast.training.budget.Settings` explains them:",
        _table(("setting", "value"), [(key, _plain(value)) for key, value in settings.items()]),
        "The averaged weights on the way:",
        _curve_table(curve),
        *earlier,
    ]


def _plain(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *([cell.replace("|", "\\|") for cell in row] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _curve_table(curve: Sequence[dict[str, str]]) -> str:
    """The curve's rows with a validation in them."""
    columns = list(curve[0]) if curve else []
    return _table(columns, [list(row.values()) for row in curve if row[columns[-1]]])


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m liif_fast.model_card", description=__doc__.splitlines()[0])
    parser.add_argument("--run", required=True, help="the out folder of a training run")
    parser.add_argument("--name", default="tiny", help="name that the run was given (%(default)s)")
    parser.add_argument("--train-manifest", required=True, help="CSV with the sources of the training pictures")
    parser.add_argument("--val-manifest", required=True, help="CSV with the sources of the validation pictures")
    parser.add_argument("--out", required=True, help="Markdown file to write")
    options = parser.parse_args(arguments)
    try:
        card = render_card(options.run, options.name, options.train_manifest, options.val_manifest)
        write_atomically(options.out, card.encode())
    except (OSError, ValueError) as error:
        print(f"model card: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
