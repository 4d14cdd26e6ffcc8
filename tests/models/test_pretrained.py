"""save_pretrained, from_pretrained and push_to_hub; the Hub's real client, where installed, talks to a small server."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import safetensors
import safetensors.torch
import torch

import liif_fast
from liif_fast.models import LIIF, MetaSR
from liif_fast.models.checkpoints import CheckpointError
from tests.models import fake_hub, small_models

NORM = {"inp": {"sub": [0.4, 0.5, 0.6], "div": [1.0, 1.0, 1.0]}, "gt": {"sub": [0.25], "div": [0.5]}}


def model_with_norm() -> LIIF:
    model = small_models.liif(local_ensemble=False).float()
    model.data_norm = NORM
    return model.eval()


def assert_same(found, model):
    assert type(found) is type(model)
    assert found.spec == model.spec
    assert found.data_norm == NORM
    assert not found.training
    for key, tensor in model.state_dict().items():
        assert torch.equal(found.state_dict()[key], tensor), key


def without_metadata(file):
    safetensors.torch.save_file(safetensors.torch.load_file(file), file)


def test_a_folder_keeps_everything(tmp_path):
    model = model_with_norm()
    model.save_pretrained(tmp_path / "new" / "model")
    folder = tmp_path / "new" / "model"
    assert sorted(file.name for file in folder.iterdir()) == ["README.md", "config.json", "model.safetensors"]
    assert_same(LIIF.from_pretrained(folder), model)
    assert_same(liif_fast.load(folder), model)
    assert_same(liif_fast.load(folder / "model.safetensors"), model)
    config = json.loads((folder / "config.json").read_text())
    assert config["data_norm"] == NORM and config["spec"] == model.spec and config["model_type"] == "liif"
    assert f"{sum(p.numel() for p in model.parameters()):,} parameters" in (folder / "README.md").read_text()


def test_config_replaces_lost_metadata(tmp_path):
    model = model_with_norm()
    model.save_pretrained(tmp_path)
    without_metadata(tmp_path / "model.safetensors")
    assert_same(LIIF.from_pretrained(tmp_path), model)


def test_weights_alone_are_enough(tmp_path):
    model = model_with_norm()
    model.save_pretrained(tmp_path)
    (tmp_path / "config.json").unlink()
    assert_same(LIIF.from_pretrained(tmp_path), model)


@pytest.mark.parametrize("part", ["spec", "data_norm"])
def test_a_config_of_another_model_is_an_error(tmp_path, part):
    model_with_norm().save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    config = json.loads(file.read_text())
    config[part] = {"name": "liif", "args": {}} if part == "spec" else None
    file.write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=f"different {part}s: delete config.json"):
        LIIF.from_pretrained(tmp_path)


def test_broken_and_foreign_configs(tmp_path):
    model_with_norm().save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"config.json is no JSON"):
        LIIF.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    assert LIIF.from_pretrained(tmp_path).data_norm == NORM


def test_the_card_of_a_folder_stays_unless_one_is_given(tmp_path):
    card = tmp_path / "README.md"
    card.write_text("mine")
    model_with_norm().save_pretrained(tmp_path)
    assert card.read_text() == "mine"
    model_with_norm().save_pretrained(tmp_path, card="another")
    assert card.read_text() == "another"


def test_dtype_and_metasr(tmp_path):
    model = small_models.metasr().float()
    model.save_pretrained(tmp_path, dtype=torch.float16)
    with safetensors.safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert {file.get_tensor(key).dtype for key in file.keys()} == {torch.float16}  # noqa: SIM118
    assert isinstance(MetaSR.from_pretrained(tmp_path), MetaSR)
    with pytest.raises(CheckpointError, match=r"holds a MetaSR, not a LIIF: use MetaSR.from_pretrained"):
        LIIF.from_pretrained(tmp_path)


def test_neither_folder_nor_repository(tmp_path):
    with pytest.raises(FileNotFoundError, match="neither a folder nor the name of a repository"):
        LIIF.from_pretrained(tmp_path / "missing")
    with pytest.raises(CheckpointError, match="is a folder, not a model"):
        LIIF.from_pretrained(tmp_path)


def test_a_model_that_left_its_spec_leaves_no_folder_half_written(tmp_path):
    model = model_with_norm()
    model.imnet = torch.nn.Linear(3, 3)
    with pytest.raises(ValueError, match="no longer matches its spec"):
        model.save_pretrained(tmp_path)
    assert list(tmp_path.iterdir()) == []


WITHOUT_HUB = """
import sys
sys.modules["huggingface_hub"] = None
from liif_fast import LIIF
LIIF.from_pretrained(sys.argv[1]).save_pretrained(sys.argv[2])
for call in (lambda: LIIF.from_pretrained("owner/name"), lambda: LIIF.from_pretrained(sys.argv[2]).push_to_hub("o/n")):
    try:
        call()
    except ImportError as error:
        print(error)
"""


@pytest.mark.prove
def test_without_the_hubs_client_folders_still_load(tmp_path):
    model_with_norm().save_pretrained(tmp_path / "a")
    command = [sys.executable, "-c", WITHOUT_HUB, str(tmp_path / "a"), str(tmp_path / "b")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("pip install huggingface_hub") == 2
    assert_same(LIIF.from_pretrained(tmp_path / "b"), model_with_norm())


@pytest.fixture
def hub(monkeypatch):
    """The files of the server's repositories; the real client talks to the server."""
    constants = pytest.importorskip("huggingface_hub.constants")
    with fake_hub.running() as (url, repos):
        monkeypatch.setattr(constants, "ENDPOINT", url)
        template = url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        yield repos


def test_push_and_download_with_the_real_client(hub, tmp_path):
    model = model_with_norm()
    url = model.push_to_hub("me/small", token="hf_x")
    assert url.endswith(f"/me/small/commit/{fake_hub.COMMIT}")
    assert sorted(hub["me/small"]) == ["README.md", "config.json", "model.safetensors"]
    assert b"LIIF.from_pretrained('me/small')" in hub["me/small"]["README.md"]
    cache = {"cache_dir": tmp_path / "cache", "token": False}
    assert_same(LIIF.from_pretrained("me/small", **cache), model)
    hub.clear()
    assert_same(LIIF.from_pretrained("me/small", local_files_only=True, **cache), model)


def test_a_card_on_the_hub_stays_unless_one_is_given(hub):
    hub["me/small"] = {"README.md": b"mine"}
    model_with_norm().push_to_hub("me/small", token="hf_x")
    assert hub["me/small"]["README.md"] == b"mine"
    model_with_norm().push_to_hub("me/small", token="hf_x", card="another")
    assert hub["me/small"]["README.md"] == b"another"


def test_repositories_without_config_and_missing_ones(hub, tmp_path):
    model_with_norm().push_to_hub("me/small", token="hf_x")
    del hub["me/small"]["config.json"]
    cache = {"cache_dir": tmp_path / "cache", "token": False}
    assert_same(LIIF.from_pretrained("me/small", **cache), model_with_norm())
    for missing in ("me/other", "me/empty"):
        hub["me/empty"] = {}
        with pytest.raises(FileNotFoundError, match=f"^{missing} is no folder here, and model"):
            LIIF.from_pretrained(missing, **cache)
    with pytest.raises(FileNotFoundError, match="could not be downloaded"):
        LIIF.from_pretrained("me/other", local_files_only=True, **cache)
