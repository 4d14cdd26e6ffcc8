"""The folders of tests/configs/*.yaml with small images, and settings that tests share."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from PIL import Image

CONFIGS = Path(__file__).parents[1] / "configs"
NAMES = sorted(path.name for path in CONFIGS.glob("train_*.yaml"))
QUICK = ["num_workers=0", "tensorboard=false", "plots=false"]


def make_folders(root: Path) -> Path:
    """Fill `root`/load with images of stripes and noise, from which a model can learn."""
    rng = np.random.default_rng(0)

    def picture(path: Path, height: int, width: int) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        stripes = ((np.arange(height)[:, None] + 2 * np.arange(width)) // 9 % 2)[..., None] * np.array([150, 90, 40])
        noise = rng.integers(0, 60, (height, width, 3))
        Image.fromarray((stripes + noise).astype(np.uint8)).save(path)

    for number in range(3):
        picture(root / f"load/HR/{number}.png", 64, 72)
        for folder, size in (("pairs/HR", (48, 40)), ("pairs/X2", (24, 20)), ("celebAHQ/16", (16, 16))):
            picture(root / f"load/{folder}/{number}.png", *size)
        picture(root / f"load/celebAHQ/64/{number}.png", 64, 64)
    split = {"train": ["0.png", "1.png"], "val": ["2.png"]}
    (root / "load/celebAHQ/split.json").write_text(json.dumps(split))
    return root
