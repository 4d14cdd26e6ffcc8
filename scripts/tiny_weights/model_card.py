"""Write the model card of trained weights from the files of their run; no number in the card is typed.

tiny.yaml lists all commands, from the training to the card.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from liif_fast.evaluation import tables
from liif_fast.evaluation.comparison import BICUBIC, ScoreRecord, read_records
from liif_fast.models import checkpoints
from liif_fast.utils.files import write_atomically
from liif_fast.utils.tables import markdown

MANIFEST_COLUMNS = ("file", "author", "licence", "source_package", "source_version", "transform")


def read_manifest(path: Path) -> list[list[str]]:
    """The rows of a CSV file with the source of every image; raises ValueError for a missing column."""
    with open(path, newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        missing = [column for column in MANIFEST_COLUMNS if column not in (reader.fieldnames or ())]
        if missing:
            raise ValueError(f"{str(path)!r} has no column {', '.join(missing)}: add the source of every image")
        return [[row[column] for column in MANIFEST_COLUMNS] for row in reader]


def card(weights: Path, run: Path, scores: Path, train_manifest: Path, val_manifest: Path) -> str:
    """The card as Markdown.

    weights: the shipped .safetensors. run: folder of `liif-fast train`. scores: scores.csv of `liif-fast evaluate`.
    train_manifest, val_manifest: CSV files with MANIFEST_COLUMNS, one row per image.
    """
    model: Any = checkpoints.load(weights)
    config = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))
    train, val = read_manifest(train_manifest), read_manifest(val_manifest)
    args = config["train_dataset"]["wrapper"]["args"]
    encoder, imnet = (config["model"]["args"][part]["args"] for part in ("encoder_spec", "imnet_spec"))
    content = weights.read_bytes()
    parameters = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    records = [record for record in read_records(scores) if record.method in (BICUBIC, weights.stem)]
    highest = f"x{args['scale_max']:g}"
    sections = [
        f"# {weights.stem}",
        f"A LIIF of {parameters:,} parameters: {config['model']['args']['encoder_spec']['name']} with "
        f"{encoder['n_resblocks']} residual blocks of {encoder['n_feats']} channels, imnet with hidden layers "
        f"{' and '.join(map(str, imnet['hidden_list']))}; feature unfolding, local ensemble and cell decoding as in "
        f"the paper. {len(content) / 1e6:.2f} MB, sha256 `{hashlib.sha256(content).hexdigest()}`. Written by "
        "`scripts/tiny_weights/model_card.py` from the files of the run.",
        "## PSNR in dB, and bicubic on the same files",
        f"Pillow's bicubic shrinks the {len(val)} validation images below. These images are not a public benchmark: "
        "compare with bicubic here, not with published tables.",
        tables.markdown(records, protocol="div2k", trained_up_to=args["scale_max"]),
        "Every image:",
        _every_image(records),
        "## Training",
        *_training(run, config),
        "No validation image was used for training. The weights are those of the last epoch, not of the best one.",
        "## Limits",
        f"Trained for clean photographs that an antialiased bicubic filter has shrunk by x{args['scale_min']:g} to "
        f"{highest}; beyond {highest} the model extrapolates. It does not remove noise, JPEG artifacts, blur or the "
        "effects of other filters, and may sharpen them. The images were not chosen for text, drawings or faces. The "
        "L1 loss rewards the median of all likely images, so fine texture stays smooth. Detail is estimated: do not "
        "use enlarged images as evidence.",
        "## Data",
        f"{len(train)} photographs for training and {len(val)} for validation, from the packages below. The weights "
        "contain none of them. Some licenses require attribution or share-alike; check the list for your use.",
        "### Training images",
        markdown(MANIFEST_COLUMNS, train, "l" * len(MANIFEST_COLUMNS)),
        "### Validation images",
        markdown(MANIFEST_COLUMNS, val, "l" * len(MANIFEST_COLUMNS)),
    ]
    return "\n\n".join(section.rstrip("\n") for section in sections) + "\n"


def _every_image(records: Sequence[ScoreRecord]) -> str:
    bicubic = {(record.image, record.scale): record.psnr for record in records if record.method == BICUBIC}
    rows = []
    for record in records:
        if record.method != BICUBIC:
            base = bicubic[record.image, record.scale]
            cells = [f"{base:.2f}", f"{record.psnr:.2f}", f"{record.psnr - base:+.2f}"]
            rows.append([record.image, f"x{record.scale:g}", *cells])
    return markdown(("image", "scale", "bicubic", "model", "gain"), rows)


def _training(run: Path, config: dict[str, Any]) -> list[str]:
    """The course and the settings of a run, as sections."""
    with open(run / "log.csv", newline="", encoding="utf-8") as file:
        log = list(csv.DictReader(file))
    validated = [list(row.values()) for row in log if row["psnr"]]
    minutes = float(log[-1]["seconds"]) / 60
    return [
        f"{len(log)} epochs in {minutes:.0f} minutes with `liif-fast train` (L1 loss). The settings:",
        markdown(("key", "value"), [(key, str(value)) for key, value in _leaves(config)], "ll"),
        "Validation during training:",
        markdown(list(log[0]), validated),
    ]


def _leaves(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of all values in nested dictionaries."""
    if isinstance(value, dict):
        for name, each in value.items():
            yield from _leaves(each, f"{key}.{name}" if key else name)
    else:
        yield key, value


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--weights", required=True, type=Path, help="the .safetensors to ship")
    parser.add_argument("--run", required=True, type=Path, help="folder of the training run")
    parser.add_argument("--scores", required=True, type=Path, help="scores.csv of `liif-fast evaluate`")
    parser.add_argument("--train-manifest", required=True, type=Path, help="CSV, sources of the training images")
    parser.add_argument("--val-manifest", required=True, type=Path, help="CSV, sources of the validation images")
    parser.add_argument("--out", required=True, type=Path, help="Markdown file to write")
    options = vars(parser.parse_args(arguments))
    out = options.pop("out")
    try:
        write_atomically(out, card(**options).encode())
    except (OSError, ValueError) as error:
        print(f"model card: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
