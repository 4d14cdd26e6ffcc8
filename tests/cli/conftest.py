"""Runs `liif-fast upscale` in this process, on a small picture with a small model."""

import numpy as np
import pytest
import torch
from PIL import Image

from liif_fast.cli import main
from liif_fast.models import checkpoints
from tests.models import small_models

H, W = 6, 9


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "small.safetensors"
    checkpoints.save(small_models.liif().float(), path)
    return str(path)


@pytest.fixture
def photo(tmp_path):
    values = np.random.default_rng(0).integers(0, 256, (H, W, 3), dtype=np.uint8)
    path = tmp_path / "photo.png"
    Image.fromarray(values).save(path)
    return path


@pytest.fixture
def run(weights, capsys, monkeypatch):
    """Runs `liif-fast upscale` on arguments -> (exit code, stdout, stderr)."""
    threads, largest = torch.get_num_threads(), Image.MAX_IMAGE_PIXELS
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", largest)

    def run(*arguments, model=weights, command="upscale"):
        chosen = ["--model", model] if command == "upscale" and "--model" not in arguments else []
        try:
            code = main.main([command, *map(str, arguments), *chosen])
        except SystemExit as end:
            code = end.code
        finally:
            torch.set_num_threads(threads)
        return (code, *capsys.readouterr())

    return run


def sentence(error):
    """stderr, after a check that it is one sentence and no traceback."""
    assert error.startswith("liif-fast") and error.endswith(".\n"), error
    assert error.count("\n") == 1 and "Traceback" not in error, error
    return error
