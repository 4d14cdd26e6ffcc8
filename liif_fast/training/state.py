"""What a run keeps on disk: checkpoints in the original's dictionary, and the state from which it goes on bit for bit.

epoch-last.pth, epoch-best.pth, epoch-N.pth   {'model': {'name', 'args', 'sd'}, 'optimizer': {...}, 'epoch'}, as the
                                              original writes and reads them
epoch-last.safetensors, epoch-best.safetensors   the model alone, normalisation included; averaged weights where the
                                              run averages them, and so in epoch-best.pth
state.pth                                     everything else a resumed run needs

All of it is tensors and plain containers, read with `weights_only=True`. state.pth is written first and holds its own
copy of the weights: whatever file a kill leaves behind half done, the run goes on from the last whole epoch.
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
    """A run that cannot go on from a file; the message is one sentence with the path."""


class RunState(NamedTuple):
    """Where a run stands after an epoch; the parts beyond the original's dictionary are None where a file has none."""

    epoch: int
    model: dict[str, Any]  # {'name', 'args', 'sd'}
    optimizer: dict[str, Any]  # {'name', 'args', 'sd'}
    scaler: dict[str, Any] | None = None
    average: dict[str, Any] | None = None  # state_dict of the averaged model
    best: float | None = None
    steps: int = 0
    seconds: float = 0.0
    history: Sequence[Mapping[str, float]] = ()
    random: Sequence[Mapping[str, Any]] = ()  # of each process


def with_weights(spec: Mapping[str, Any], module: Any) -> dict[str, Any]:
    """The original's {'name', 'args', 'sd'}: a spec and the state_dict of the model or optimiser made from it."""
    return {"name": spec["name"], "args": copy.deepcopy(spec.get("args") or {}), "sd": module.state_dict()}


def save_torch(content: Mapping[str, Any], path: Path) -> None:
    """torch.save that leaves a whole file or none."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    write_atomically(path, buffer.getvalue())


def save_checkpoint(state: RunState, path: Path, weights: nn.Module | None = None) -> None:
    """Write the original's dictionary; with `weights`, that model's instead of the trained one's."""
    model = dict(state.model)
    if weights is not None:
        model["sd"] = weights.state_dict()
    save_torch({"model": model, "optimizer": state.optimizer, "epoch": state.epoch}, path)


def save_state(state: RunState, folder: Path) -> None:
    """Write state.pth."""
    save_torch({"version": _VERSION, **state._asdict()}, folder / STATE)


def save_model(model: nn.Module, path: Path) -> None:
    """Write .safetensors, where the model is one that its spec describes; a user's own may be more than that."""
    checkpoints.save(model, path, metadata={"trained_by": "liif-fast train"})


def load_state(path: str | Path) -> RunState:
    """Read state.pth, or a checkpoint in the original's dictionary; raises ResumeError."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a broken pickle can raise anything
        text = " ".join(str(error).split())[:120]
        raise ResumeError(f"{path} cannot be read as a checkpoint ({text}); resume from another one") from None
    if not isinstance(content, dict) or not {"epoch", "model", "optimizer"} <= content.keys():
        raise ResumeError(f"{path} holds no model, optimizer and epoch, so that no run can go on from it")
    if content.get("version", _VERSION) != _VERSION:
        raise ResumeError(f"{path} has the format {content['version']}, and this version reads {_VERSION}")
    return RunState(**{name: content[name] for name in RunState._fields if name in content})


def starting_point(folder: Path, resume: str | Path | None) -> Path | None:
    """The file from which a run in `folder` begins, None for its beginning.

    resume: None demands a new folder; 'auto' goes on where the folder stands, which may be nowhere yet; a file is taken
    as it is, for a new folder or the one it lies in. Raises ResumeError where something would be overwritten or is
    missing.
    """
    if resume is None:
        if folder.exists():
            raise ResumeError(
                f"{folder} exists already: go on with it by --resume auto, or choose another --name or --tag"
            )
        return None
    if str(resume) == "auto":
        return next((file for file in (folder / STATE, folder / "epoch-last.pth") if file.exists()), None)
    file = Path(resume)
    if not file.is_file():
        raise ResumeError(f"{file} does not exist, so that no run can go on from it: give a file or auto")
    if folder.exists() and file.resolve().parent != folder.resolve():
        raise ResumeError(f"{folder} exists already and {file} is not in it: choose another --name or --tag")
    return file


def check_same(state: RunState, spec: Mapping[str, Any], optimizer: Mapping[str, Any], path: Path) -> None:
    """Raise ResumeError where a configuration's model or optimiser is not the one in a file."""
    for what, theirs, ours in (("model", state.model, spec), ("optimizer", state.optimizer, optimizer)):
        before, now = ((each["name"], each.get("args") or {}) for each in (theirs, ours))
        if before != now:
            raise ResumeError(
                f"{path} was made with the {what} {before[0]} {before[1]}, but the configuration says {now[0]} "
                f"{now[1]}; use its own configuration, or start a new run with init"
            )


def random_states() -> dict[str, Any]:
    """The states of Python's, numpy's and PyTorch's generators, in plain containers."""
    kind, keys, position, has_gauss, gauss = np.random.get_state()  # noqa: NPY002 (users' code may draw from it)
    return {
        "python": random.getstate(),
        "numpy": (kind, torch.from_numpy(np.asarray(keys, dtype=np.int64)), position, has_gauss, gauss),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
    }


def restore_random_states(states: Mapping[str, Any]) -> None:
    """Set what `random_states` returned."""
    random.setstate(states["python"])
    kind, keys, position, has_gauss, gauss = states["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), position, has_gauss, gauss))  # noqa: NPY002
    torch.set_rng_state(states["torch"])
    if states["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])
