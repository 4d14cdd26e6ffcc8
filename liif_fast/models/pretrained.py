"""`from_pretrained`, `save_pretrained` and `push_to_hub`: models in folders and on the Hugging Face Hub.

A folder holds model.safetensors, config.json and the model card README.md. `liif_fast.load` reads the folder too.
The package huggingface_hub is optional: only a download and an upload need it.
"""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any, TypeVar, cast

import safetensors
import torch
from torch import nn

from liif_fast.models import checkpoints
from liif_fast.models.checkpoints import CONFIG_FILE, WEIGHTS_FILE, CheckpointError
from liif_fast.utils.files import write_atomically

try:
    import huggingface_hub
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, LocalEntryNotFoundError
except ImportError:
    huggingface_hub = None

_CARD_FILE = "README.md"
_CARD = """---
library_name: liif_fast
pipeline_tag: image-to-image
tags:
- super-resolution
- liif
---

# {title}

A {kind} of {parameters:,} parameters. It enlarges images by any factor.

```python
import liif_fast

model = liif_fast.{kind}.from_pretrained({source!r})
large = liif_fast.upscale(image, scale=3.7, model=model)
```

Encoder: `{encoder}`. Normalization of colors in [0, 1]: `{data_norm}`.
"""
_Self = TypeVar("_Self", bound="Pretrained")


class Pretrained:
    """Mixin of the models: saves them to a folder or to the Hub, and loads them from there."""

    @classmethod
    def from_pretrained(
        cls: type[_Self],
        source: str | os.PathLike[str],
        *,
        device: torch.device | str = "cpu",
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        local_files_only: bool = False,
    ) -> _Self:
        """A model with its weights and its `data_norm`, in eval mode on `device`.

        source: a folder with model.safetensors, or a repository of the Hub, 'owner/name'. A folder wins.
        revision, token, cache_dir, local_files_only: as in `huggingface_hub.hf_hub_download`.
        Raises FileNotFoundError if there is neither, ImportError for a repository without huggingface_hub, and
        `checkpoints.CheckpointError` for a model that cannot be read or is of another class.
        """
        folder = Path(source)
        if not folder.is_dir():
            options = {"token": token, "cache_dir": cache_dir, "local_files_only": local_files_only}
            folder = _download(os.fspath(source), revision=revision, **options)
        model = checkpoints.load(folder, device=device)
        if not isinstance(model, cls):
            found = type(model).__name__
            raise CheckpointError(f"{source} holds a {found}, not a {cls.__name__}: use {found}.from_pretrained")
        return model

    def save_pretrained(
        self, folder: str | os.PathLike[str], *, dtype: torch.dtype | None = None, card: str | None = None
    ) -> None:
        """Write model.safetensors, config.json and a model card README.md into `folder`, which is made if needed.

        dtype: the floating-point dtype to store; None = the weights' own.
        card: the text of the model card; None = a short one, unless the folder has a card already.
        Raises ValueError like `liif_fast.save`.
        """
        self._write(Path(folder), dtype, card, title=Path(folder).resolve().name, source=os.fspath(folder))

    def push_to_hub(
        self,
        repo_id: str,
        *,
        revision: str | None = None,
        token: str | bool | None = None,
        private: bool | None = None,
        commit_message: str = "Upload a model of liif_fast",
        dtype: torch.dtype | None = None,
        card: str | None = None,
    ) -> str:
        """Upload the files of `save_pretrained` to a repository -> the address of the commit.

        repo_id: 'owner/name'. revision, token, private, commit_message: as in `huggingface_hub.HfApi`.
        dtype, card: as in `save_pretrained`.
        The repository is made if needed, private if `private`. A model card in it is replaced only by a given `card`.
        Raises ImportError without huggingface_hub, whose own errors pass.
        """
        _require_hub(f"upload to {repo_id}")
        api = huggingface_hub.HfApi(token=token, library_name="liif_fast")
        with tempfile.TemporaryDirectory() as folder:
            self._write(Path(folder), dtype, card, title=repo_id.split("/")[-1], source=repo_id)
            repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
            if card is None and api.file_exists(repo_id, _CARD_FILE, revision=revision):
                (Path(folder) / _CARD_FILE).unlink()
            done = api.upload_folder(
                repo_id=repo_id, folder_path=folder, revision=revision, commit_message=commit_message
            )
        return done.commit_url

    def _write(self, folder: Path, dtype: torch.dtype | None, card: str | None, *, title: str, source: str) -> None:
        model = cast(Any, self)
        folder.mkdir(parents=True, exist_ok=True)
        checkpoints.save(cast(nn.Module, self), folder / WEIGHTS_FILE, dtype=dtype)
        with safetensors.safe_open(folder / WEIGHTS_FILE, "pt") as written:
            header = written.metadata()
        config = {part: json.loads(header[part]) for part in ("spec", "data_norm")}
        config = {"library_name": header["format"], "model_type": config["spec"]["name"], **config}
        write_atomically(folder / CONFIG_FILE, (json.dumps(config, indent=2) + "\n").encode())
        if card is None and not (folder / _CARD_FILE).exists():
            card = _CARD.format(
                title=title,
                kind=type(self).__name__,
                parameters=sum(parameter.numel() for parameter in model.parameters()),
                source=source,
                encoder=json.dumps(config["spec"]["args"]["encoder_spec"]),
                data_norm=json.dumps(config["data_norm"]),
            )
        if card is not None:
            write_atomically(folder / _CARD_FILE, card.encode())


def _require_hub(task: str) -> None:
    if huggingface_hub is None:
        raise ImportError(f"to {task}, install the client of the Hub: pip install huggingface_hub")


def _download(repo_id: str, **options: Any) -> Path:
    """The folder of a repository's model in the cache of the Hub's client."""
    if repo_id.count("/") != 1 or repo_id.startswith((".", "/", "~")):
        raise FileNotFoundError(f"{repo_id} is neither a folder nor the name of a repository, 'owner/name'")
    _require_hub(f"download {repo_id}, which is no folder here")
    options["library_name"] = "liif_fast"
    try:
        try:
            huggingface_hub.hf_hub_download(repo_id, CONFIG_FILE, **options)  # the Hub counts downloads of this file
        except EntryNotFoundError as error:  # optional: model.safetensors says everything
            if isinstance(error, LocalEntryNotFoundError):
                raise
        return Path(huggingface_hub.hf_hub_download(repo_id, WEIGHTS_FILE, **options)).parent
    except (HfHubHTTPError, LocalEntryNotFoundError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise FileNotFoundError(
            f"{repo_id} is no folder here, and {WEIGHTS_FILE} could not be downloaded from the Hub: {reason}"
        ) from error
