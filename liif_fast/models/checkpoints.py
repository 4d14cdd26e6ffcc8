"""Loading and saving models: the original's and MMagic's .pth files, and .safetensors of our own.

A .pth file is read with `torch.load(weights_only=True)`: tensors and plain containers, nothing else is ever unpickled.
Every refusal is one sentence that names the file.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from liif_fast.models import default_data_norm, make_model, mmagic
from liif_fast.utils.files import write_atomically

WEIGHTS = Path(__file__).resolve().parents[1] / "weights"  # the models that come with the package
DEFAULT = "tiny"
_FORMAT = "liif_fast"


class CheckpointError(ValueError):
    """A file that holds no model we can read; the message is one sentence with the path."""


def load(path: str | os.PathLike[str] | None = None, *, device: torch.device | str = "cpu") -> nn.Module:
    """A model with its weights, in eval mode on `device`.

    path: a .safetensors file written by `save`, a .pth file of yinboc/liif ({'model': {'name', 'args', 'sd'}, ...}) or
        of MMagic ({'state_dict', ...}), or the name of a model that comes with the package; None = 'tiny'.
    The model's `data_norm` comes from the file where it says one; otherwise it is the paper's, or that of MMagic's
    configs. Parameters are float32, or float64 where all of the file's are.
    Raises FileNotFoundError, or CheckpointError for a file that is none of these or whose weights do not fit its spec.
    """
    file = find(path)
    with open(file, "rb") as handle:
        start = handle.read(9)
    with torch.random.fork_rng(devices=[]):  # initial weights, about to be replaced, use up no random numbers
        if start[8:] == b"{":
            model = _from_safetensors(file)
        elif start[:2] == b"PK" or start[:1] == b"\x80":
            model = _from_pth(file)
        else:
            raise CheckpointError(f"{file} is not a model: it is neither a .safetensors nor a .pth file")
    return model.to(device).eval()


def save(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    dtype: torch.dtype | None = None,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write a model as .safetensors, with its spec and normalisation in the metadata.

    model: made by `make_model`, or a LIIF or MetaSR whose parts are still those of its spec.
    dtype: the floating-point dtype to store; None = as they are. `load` widens 16-bit weights to float32.
    metadata: more strings to store; the names 'format', 'spec' and 'data_norm' are taken.
    The file appears under its name only when it is complete; what stood there before is replaced.
    Raises ValueError for a model that its spec does not describe, another suffix, or metadata that is not strings.
    """
    file = Path(path)
    if file.suffix != ".safetensors":
        raise ValueError(f"a model is saved as .safetensors, not as {file.name!r}: change the name's ending")
    model = _unwrapped(model)
    spec = getattr(model, "spec", None)
    if spec is None:
        raise ValueError(f"this {type(model).__name__} has no spec to save: build it with make_model")
    _check_fits(model, spec, file)
    try:
        text = json.dumps(spec)
    except TypeError as error:
        raise ValueError(f"{file} was not written because its spec is not plain numbers and strings: {error}") from None
    data_norm = _checked_norm(getattr(model, "data_norm", None), file)
    header = {"format": _FORMAT, "spec": text, "data_norm": json.dumps(data_norm)}
    for key, value in (metadata or {}).items():
        if key in header or not isinstance(value, str):
            raise ValueError(
                f"metadata takes strings under names other than {', '.join(header)}, not {key!r}: {value!r}"
            )
        header[key] = value
    tensors = {}
    for key, tensor in model.state_dict().items():
        stored = dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype
        # A copy of its own for every key: the format takes no two keys with one memory.
        tensors[key] = tensor.detach().to("cpu", stored, copy=True).contiguous()
    write_atomically(file, safetensors.torch.save(tensors, header))


def find(path: str | os.PathLike[str] | None) -> Path:
    """The file that `load` would read; raises as `load` does where there is none."""
    file = Path(DEFAULT if path is None else path)
    if file.is_file():
        return file
    shipped = WEIGHTS / f"{file}.safetensors"
    if file.name == str(file) and shipped.is_file():
        return shipped
    if file.exists():
        raise CheckpointError(f"{file} is a folder, not a model: name the file in it")
    names = sorted(weights.stem for weights in WEIGHTS.glob("*.safetensors"))
    hint = f", and no model of that name comes with the package (there is {', '.join(names)})" if names else ""
    raise FileNotFoundError(f"{file} does not exist{hint}")


def _from_safetensors(file: Path) -> nn.Module:
    try:
        with safetensors.safe_open(file, "pt") as handle:
            header = handle.metadata() or {}
            weights = {key: handle.get_tensor(key) for key in handle.keys()}  # noqa: SIM118 (no dictionary)
    except safetensors.SafetensorError as error:
        raise CheckpointError(f"{file} is a broken .safetensors file: {_one_line(error)}") from None
    if header.get("format") != _FORMAT or "spec" not in header:
        raise CheckpointError(f"{file} holds tensors but no model: its metadata has no liif_fast spec")
    try:
        spec, data_norm = json.loads(header["spec"]), json.loads(header.get("data_norm", "null"))
    except json.JSONDecodeError as error:
        raise CheckpointError(f"{file} has a broken spec in its metadata: {error}") from None
    return _build(spec, weights, data_norm, file)


def _from_pth(file: Path) -> nn.Module:
    try:
        content = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # a broken pickle can raise anything
        raise CheckpointError(_why_unread(file, error)) from None
    if isinstance(content, dict):
        spec = content.get("model")
        if isinstance(spec, dict) and "name" in spec and _is_state_dict(spec.get("sd")):
            return _build(spec, spec["sd"], content.get("data_norm"), file)
        if _is_state_dict(content.get("state_dict")):
            try:
                return _build(*mmagic.convert(content["state_dict"]), file)
            except mmagic.NotLIIFError as error:
                raise CheckpointError(f"{file} is no LIIF checkpoint: {error}") from None
    raise CheckpointError(
        f"{file} is no LIIF checkpoint: it has neither 'model' with name, args and sd (yinboc/liif) nor 'state_dict' "
        "(MMagic)"
    )


def _why_unread(file: Path, error: Exception) -> str:
    if foreign := re.search(r"GLOBAL ([\w.]+)", str(error)):
        return (
            f"{file} holds {foreign.group(1)} beside tensors and plain containers, which is never unpickled: where the "
            "file comes from, save its spec and state_dict alone"
        )
    if "weights_only" in str(error):  # a page of advice that does not apply
        return f"{file} is a broken pickle, or not one of torch.save's usual protocol"
    return f"{file} is a broken .pth file: {_one_line(error)}"


def _is_state_dict(content: object) -> bool:
    return isinstance(content, Mapping) and all(
        isinstance(key, str) and isinstance(tensor, Tensor) for key, tensor in content.items()
    )


def _build(spec: dict[str, Any], weights: Mapping[str, Tensor], data_norm: object, file: Path) -> nn.Module:
    try:
        model = make_model(spec)
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{file} describes a model that cannot be built: {_one_line(error)}") from None
    weights = {re.sub(r"^(module\.|_orig_mod\.)+", "", key): tensor for key, tensor in weights.items()}
    if all(tensor.dtype == torch.float64 for tensor in weights.values() if tensor.is_floating_point()):
        model.double()
    # Some files leave out the mean colours, which are never applied.
    colors = {key: tensor for key, tensor in model.state_dict().items() if re.search(r"\b(sub|add)_mean\.", key)}
    weights = {**colors, **weights}
    problem = _misfit(model.state_dict(), weights)
    if problem:
        raise CheckpointError(f"the weights in {file} do not fit its spec: {problem}")
    model.load_state_dict(weights)
    model.data_norm = _checked_norm(data_norm, file)  # type: ignore[assignment]
    return model


def _checked_norm(data_norm: Any, file: Path) -> dict[str, dict[str, list[float]]]:
    if data_norm is None:
        return default_data_norm()
    try:
        return {
            side: {part: [float(value) for value in data_norm[side][part]] for part in ("sub", "div")}
            for side in ("inp", "gt")
        }
    except (KeyError, TypeError, ValueError):
        raise CheckpointError(
            f"{file} has a normalisation that is not {{'inp': {{'sub', 'div'}}, 'gt': {{'sub', 'div'}}}}: {data_norm!r}"
        ) from None


def _unwrapped(model: nn.Module) -> nn.Module:
    """The model itself where torch.compile or a data-parallel wrapper holds it."""
    while True:
        if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            model = model.module
        elif isinstance(inner := getattr(model, "_orig_mod", None), nn.Module):
            model = inner
        else:
            return model


def _check_fits(model: nn.Module, spec: dict[str, Any], file: Path) -> None:
    with torch.device("meta"):  # shapes alone
        expected = make_model(spec).state_dict()
    problem = _misfit(expected, model.state_dict())
    if problem:
        raise ValueError(f"{file} was not written because the model is no longer what its spec says: {problem}")


def _misfit(expected: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> str:
    """Why `found` cannot be loaded where `expected` is; '' where it can."""
    problems = []
    if missing := [key for key in expected if key not in found]:
        problems.append(f"missing {_some(missing)}")
    if unexpected := [key for key in found if key not in expected]:
        problems.append(f"unexpected {_some(unexpected)}")
    for key in expected:
        if not problems and expected[key].shape != found[key].shape:
            problems.append(f"{key!r} is {list(found[key].shape)} instead of {list(expected[key].shape)}")
    return ", ".join(problems)


def _some(keys: Sequence[str], limit: int = 5) -> str:
    return ", ".join(map(repr, keys[:limit])) + (f" and {len(keys) - limit} more keys" if len(keys) > limit else "")


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 200 else text[:197] + "..."
