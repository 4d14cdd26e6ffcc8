"""A run's files: checkpoints in the original's format, and the state from which a run resumes bit for bit.

epoch-last.pth, epoch-best.pth, epoch-N.pth     {'model': {'name', 'args', 'sd'}, 'optimizer': {...}, 'epoch'}, as the
                                                original writes and reads them
epoch-last.safetensors, epoch-best.safetensors  the model with its normalization. With `ema` these two files and
                                                epoch-best.pth hold the averaged weights.
state.pth                                       everything that a resumed run needs

All files hold tensors and plain containers and are read with `weights_only=True`. state.pth is written first and has
its own copy of the weights, so a run that is killed between two files resumes from the last complete epoch.
"""

from __future__ import annotations

import copy
import io
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from liif_fast.models import checkpoints
from liif_fast.utils.files import write_atomically

STATE = "state.pth"
_VERSION = 1


class ResumeError(ValueError):
    """A run that cannot resume from a file; the message is one sentence with the path."""


class RunState(NamedTuple):
    """The state of a run after an epoch; fields that the original's format lacks have defaults."""

    epoch: int
    model: dict[str, Any]  # {'name', 'args', 'sd'}
    optimizer: dict[str, Any]  # {'name', 'args', 'sd'}
    scaler: dict[str, Any] | None = None
    average: dict[str, Any] | None = None  # state_dict of the averaged model
    best: float | None = None
    steps: int = 0
    seconds: float = 0.0
    history: Sequence[Mapping[str, float]] = ()
    random: Sequence[Mapping[str, Any]] = ()  # one entry per process


def with_weights(spec: Mapping[str, Any], module: Any) -> dict[str, Any]:
    """The original's {'name', 'args', 'sd'}: a spec with the state_dict of its model or optimizer."""
    return {"name": spec["name"], "args": copy.deepcopy(spec.get("args") or {}), "sd": module.state_dict()}


def save_torch(content: Mapping[str, Any], path: Path) -> None:
    """torch.save that never leaves an incomplete file."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    write_atomically(path, buffer.getvalue())


def save_checkpoint(state: RunState, path: Path, weights: nn.Module | None = None) -> None:
    """Write a checkpoint in the original's format, with the state_dict of `weights` if it is given."""
    model = dict(state.model)
    if weights is not None:
        model["sd"] = weights.state_dict()
    save_torch({"model": model, "optimizer": state.optimizer, "epoch": state.epoch}, path)


def save_state(state: RunState, folder: Path) -> None:
    """Write state.pth."""
    save_torch({"version": _VERSION, **state._asdict()}, folder / STATE)


def save_model(model: nn.Module, path: Path) -> None:
    """Write a model as .safetensors."""
    checkpoints.save(model, path, metadata={"trained_by": "liif-fast train"})


def load_state(path: str | Path) -> RunState:
    """Read state.pth or a checkpoint in the original's format; raises ResumeError."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a broken pickle can raise anything
        text = " ".join(str(error).split())[:120]
        raise ResumeError(f"{path} cannot be read as a checkpoint ({text}); resume from another one") from None
    if not isinstance(content, dict) or not {"epoch", "model", "optimizer"} <= content.keys():
        raise ResumeError(f"{path} holds no model, optimizer and epoch; resume from a state.pth or an epoch-*.pth")
    if content.get("version", _VERSION) != _VERSION:
        raise ResumeError(f"{path} has format {content['version']}, but this version of liif_fast reads {_VERSION}")
    return RunState(**{name: content[name] for name in RunState._fields if name in content})


def starting_point(folder: Path, resume: str | Path | None) -> Path | None:
    """The file from which a run in `folder` resumes; None for a new run.

    resume: None requires a new folder; 'auto' uses the folder's newest state, if there is one; a file is used for a new
    folder or for its own folder. Raises ResumeError if a file is missing or would be overwritten.
    """
    if resume is None:
        if folder.exists():
            raise ResumeError(
                f"{folder} exists already: resume it with --resume auto, or choose another --name or --tag"
            )
        return None
    if str(resume) == "auto":
        return next((file for file in (folder / STATE, folder / "epoch-last.pth") if file.exists()), None)
    file = Path(resume)
    if not file.is_file():
        raise ResumeError(f"{file} does not exist: resume from another file, or give auto")
    if folder.exists() and file.resolve().parent != folder.resolve():
        raise ResumeError(f"{folder} exists already and {file} is not in it: choose another --name or --tag")
    return file


def check_same(state: RunState, spec: Mapping[str, Any], optimizer: Mapping[str, Any], path: Path) -> None:
    """Raise ResumeError if the model or the optimizer of a configuration differs from that of a file."""
    for part, saved, given in (("model", state.model, spec), ("optimizer", state.optimizer, optimizer)):
        before, now = ((each["name"], each.get("args") or {}) for each in (saved, given))
        if before != now:
            raise ResumeError(
                f"{path} was made with the {part} {before[0]} {before[1]}, but the configuration has {now[0]} "
                f"{now[1]}: use the run's own configuration, or start a new run with init"
            )


def random_states() -> dict[str, Any]:
    """The states of the generators of Python, numpy and PyTorch, in plain containers."""
    kind, keys, position, has_gauss, gauss = np.random.get_state()  # noqa: NPY002 (users' code may draw from it)
    return {
        "python": random.getstate(),
        "numpy": (kind, torch.from_numpy(np.asarray(keys, dtype=np.int64)), position, has_gauss, gauss),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
    }


def restore_random_states(states: Mapping[str, Any]) -> None:
    """Restore the states that `random_states` returned."""
    random.setstate(states["python"])
    kind, keys, position, has_gauss, gauss = states["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), position, has_gauss, gauss))  # noqa: NPY002
    torch.set_rng_state(states["torch"])
    if states["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])
