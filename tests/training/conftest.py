"""Folders with images for the configurations, and a finished run."""

from pathlib import Path

import pytest

from tests.training.runs import run
from tests.training.training_data import make_folders


@pytest.fixture(scope="module", autouse=True)
def folders(tmp_path_factory):
    """The folders of the configurations, as the working directory."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(make_folders(tmp_path_factory.mktemp("data")))
        yield Path.cwd()


@pytest.fixture(scope="module")
def finished(folders, tmp_path_factory):
    """A finished run of two epochs; tests must not change it."""
    folder = tmp_path_factory.mktemp("runs") / "finished"
    run(folder)
    return folder
