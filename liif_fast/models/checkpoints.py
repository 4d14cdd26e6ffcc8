"""Loading and saving models: .pth files of yinboc/liif and MMagic, and .safetensors files of liif_fast.

A .pth file is read with `torch.load(weights_only=True)`, which unpickles only tensors and plain containers. Every error
is one sentence that names the file.
"""

from __future__ import annotations

import copy
import inspect
import json
import logging
import os
import re
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from liif_fast.models import catalog, mmagic
from liif_fast.models.registry import make_model, registered
from liif_fast.utils.files import write_atomically
from liif_fast.utils.normalization import default_data_norm

WEIGHTS_FILE, CONFIG_FILE = "model.safetensors", "config.json"  # in a folder written by `save_pretrained`
_FORMAT = "liif_fast"
_SETTINGS = ("local_ensemble", "res_scale")  # what changes a model's results, but not the shapes of its weights
_log = logging.getLogger(__name__)
_building = threading.RLock()
_Parts = tuple[dict[str, Any], Mapping[str, Tensor], object]  # spec, weights, data_norm


class CheckpointError(ValueError):
    """A file without a model that can be read; the message is one sentence with the path."""


class MissingSpecError(CheckpointError):
    """A .safetensors file with weights, but without the description of a model."""


def load(
    path: str | os.PathLike[str] | None = None,
    *,
    device: torch.device | str = "cpu",
    settings: Mapping[str, Any] | None = None,
) -> nn.Module:
    """A model with its weights, in eval mode on `device`.

    path: a .safetensors file written by `save`, a .pth file of yinboc/liif ({'model': {'name', 'args', 'sd'}, ...}) or
        of MMagic ({'state_dict', ...}), a folder of `save_pretrained`, or a name that `liif-fast models` lists. None =
        the published model 'edsr-baseline-liif' where it has been fetched, else 'tiny'; the log says which.
    settings: {'local_ensemble': bool, 'res_scale': float}, or one of them, instead of the file's. The weights of MMagic
        do not tell them: give them for a model that was trained without the ensemble or with another res_scale.
    The model's `data_norm` is that of the file, by default the paper's, or that of MMagic's configs. Parameters are
    float32, or float64 if all parameters in the file are float64; torch's default dtype and device have no influence.
    Raises FileNotFoundError, or CheckpointError for any other file, weights that do not fit the file's spec or are not
    finite, or settings that the model does not have.
    """
    file = catalog.report_default().file if path is None else find(path)
    with open(file, "rb") as handle:
        start = handle.read(9)
    with torch.device("cpu"):  # not torch's default device
        if start[8:] == b"{":
            parts = _from_safetensors(file)
        elif start[:2] == b"PK" or start[:1] == b"\x80":
            parts = _from_pth(file, settings or {})
        else:
            raise CheckpointError(f"{file} is not a model: it is neither a .safetensors nor a .pth file")
        model = _build(parts, file, settings or {})
    return model.to(device).eval()


def save(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    dtype: torch.dtype | None = None,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write a model as .safetensors, with its spec and normalization in the metadata.

    model: made by `make_model`, or a LIIF or MetaSR whose parts still match its spec.
    dtype: the floating-point dtype to store; None = the weights' own. `load` widens 16-bit weights to float32.
    metadata: more strings to store, under names other than 'format', 'spec' and 'data_norm'.
    An existing file is replaced only after the new one is complete.
    Raises ValueError for a model that its spec does not describe, another suffix, or metadata other than strings.
    """
    file = Path(path)
    if file.suffix != ".safetensors":
        raise ValueError(f"a model is saved as .safetensors, not as {file.name!r}: change the name's ending")
    model = unwrapped(model)
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
        # One copy per key, because the format does not allow two keys that share memory.
        tensors[key] = tensor.detach().to("cpu", stored, copy=True).contiguous()
    write_atomically(file, _with_sorted_metadata(safetensors.torch.save(tensors, header)))


def _with_sorted_metadata(data: bytes) -> bytes:
    """The same .safetensors file with its metadata in order of name: safetensors writes it in a random order.

    With it, equal models are equal files, and their hashes can be compared.
    """
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:end])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors begin at a multiple of 8 bytes
    return len(text).to_bytes(8, "little") + text + data[end:]


def find(path: str | os.PathLike[str] | None) -> Path:
    """The file that `load` would read; raises like `load` if there is none."""
    if path is None:
        return catalog.default().file
    file = Path(path)
    if file.is_file():
        return file
    named = [entry for entry in catalog.CATALOG if entry.name == os.fspath(path)]
    if named and named[0].file.is_file():
        return named[0].file
    if file.exists():
        if (file / WEIGHTS_FILE).is_file():
            return file / WEIGHTS_FILE
        raise CheckpointError(f"{file} is a folder, not a model: give the path of the file in it")
    if named:
        raise FileNotFoundError(f"the model {file} is not here yet: `liif-fast models get {file}` fetches it")
    raise FileNotFoundError(
        f"{file} does not exist, and no model has that name: give a file or choose one of {catalog.names()}"
    )


def _from_safetensors(file: Path) -> _Parts:
    try:
        with safetensors.safe_open(file, "pt") as handle:
            header = handle.metadata() or {}
            weights = {key: handle.get_tensor(key) for key in handle.keys()}  # noqa: SIM118 (no dictionary)
    except safetensors.SafetensorError as error:
        raise CheckpointError(f"{file} is a broken .safetensors file: {_one_line(error)}") from None
    header = _with_config(header, file)
    if header.get("format") != _FORMAT or "spec" not in header:
        raise MissingSpecError(f"{file} has tensors but no model: its metadata has no liif_fast spec")
    try:
        spec, data_norm = json.loads(header["spec"]), json.loads(header.get("data_norm", "null"))
    except json.JSONDecodeError as error:
        raise CheckpointError(f"{file} has a broken spec in its metadata: {error}") from None
    return spec, weights, data_norm


def _with_config(header: dict[str, str], file: Path) -> dict[str, str]:
    """The metadata of a .safetensors file; config.json next to it replaces lost metadata and must agree with the rest.

    Programs that rewrite a .safetensors file often drop its metadata.
    """
    config_file = file.with_name(CONFIG_FILE)
    if file.name != WEIGHTS_FILE or not config_file.is_file():
        return header
    try:
        config = json.loads(config_file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{config_file} is no JSON: {_one_line(error)}") from None
    if not isinstance(config, dict) or config.get("library_name") != _FORMAT:
        return header
    for part in ("spec", "data_norm"):
        try:
            agrees = part not in header or json.loads(header[part]) == config.get(part)
        except json.JSONDecodeError:
            continue  # `_from_safetensors` reports it
        if not agrees:
            difference = f"{config_file} and the metadata of {file.name} have different {part}s"
            raise CheckpointError(f"{difference}: delete {CONFIG_FILE} to use the metadata")
    return {"format": _FORMAT, **{part: json.dumps(config.get(part)) for part in ("spec", "data_norm")}, **header}


def _from_pth(file: Path, settings: Mapping[str, Any]) -> _Parts:
    try:
        content = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # a broken pickle can raise anything
        raise CheckpointError(_why_unread(file, error)) from None
    if isinstance(content, dict):
        spec = content.get("model")
        if isinstance(spec, dict) and "name" in spec and _is_state_dict(spec.get("sd")):
            return spec, spec["sd"], content.get("data_norm")
        if _is_state_dict(content.get("state_dict")):
            try:
                parts = mmagic.convert(content["state_dict"])
            except mmagic.NotLIIFError as error:
                raise CheckpointError(f"{file} is no LIIF checkpoint: {error}") from None
            _report_assumptions(parts[0], file, settings)
            return parts
    lacks = "it has neither 'model' with name, args and sd (yinboc/liif) nor 'state_dict' (MMagic)"
    raise CheckpointError(f"{file} is no LIIF checkpoint: {lacks}")


def _report_assumptions(spec: dict[str, Any], file: Path, settings: Mapping[str, Any]) -> None:
    """Log the settings that the weights of MMagic do not tell."""
    assumed = {"local_ensemble": True, **spec["args"]["encoder_spec"]["args"]}
    told = [f"{name}={json.dumps(assumed[name])}" for name in _SETTINGS if name in assumed and name not in settings]
    if told:
        _log.info(
            "%s: the weights of MMagic do not tell %s, which is assumed; for a model that was trained otherwise, add "
            "--set res_scale=0.1 or local_ensemble=false",
            file,
            " and ".join(told),
        )


def _why_unread(file: Path, error: Exception) -> str:
    if foreign := re.search(r"GLOBAL ([\w.]+)", str(error)):
        return (
            f"{file} contains {foreign.group(1)}, but only tensors and plain containers are unpickled: save only the "
            "model's spec and state_dict"
        )
    if "weights_only" in str(error):  # PyTorch's long advice does not apply here
        return f"{file} is a broken pickle, or has another protocol than torch.save's default"
    return f"{file} is a broken .pth file: {_one_line(error)}"


def _is_state_dict(content: object) -> bool:
    return isinstance(content, Mapping) and all(
        isinstance(key, str) and isinstance(tensor, Tensor) for key, tensor in content.items()
    )


def _build(parts: _Parts, file: Path, settings: Mapping[str, Any]) -> nn.Module:
    spec, weights, data_norm = parts
    # The initial weights are replaced, so they take no random numbers. The state of these belongs to all threads.
    with _building, torch.random.fork_rng(devices=[]):
        try:
            model = make_model(spec)
        except (ValueError, TypeError) as error:
            raise CheckpointError(f"{file} describes a model that cannot be built: {_one_line(error)}") from None
        if settings:
            model = make_model(_with_settings(spec, settings, file))
    model.float()  # whatever torch's default dtype is
    weights = {re.sub(r"^(module\.|_orig_mod\.)+", "", key): tensor for key, tensor in weights.items()}
    if all(tensor.dtype == torch.float64 for tensor in weights.values() if tensor.is_floating_point()):
        model.double()
    # Some files omit the mean colors, which are never applied.
    colors = {key: tensor for key, tensor in model.state_dict().items() if re.search(r"\b(sub|add)_mean\.", key)}
    weights = {**colors, **weights}
    problem = _misfit(model.state_dict(), weights)
    if problem:
        raise CheckpointError(f"the weights in {file} do not fit its spec: {problem}")
    model.load_state_dict(weights)
    for key, tensor in model.state_dict().items():
        if not tensor.isfinite().all():
            raise CheckpointError(f"{file} has NaN or infinite numbers in {key}: its training has failed")
    model.data_norm = _checked_norm(data_norm, file)  # type: ignore[assignment]
    return model


def _with_settings(spec: dict[str, Any], settings: Mapping[str, Any], file: Path) -> dict[str, Any]:
    """A copy of a spec with `settings` instead of its own values."""
    spec = copy.deepcopy(spec)
    for name, value in settings.items():
        if name not in _SETTINGS:
            raise CheckpointError(
                f"{name} cannot be set: the weights of {file} determine everything but {' and '.join(_SETTINGS)}"
            )
        if isinstance(value, bool) != (name == "local_ensemble") or not isinstance(value, bool | int | float):
            raise CheckpointError(f"{name} is {value!r}, but must be {'a number' if name == 'res_scale' else 'a bool'}")
        part = spec if name == "local_ensemble" else spec["args"].get("encoder_spec", {"name": None})
        factory = registered().get(part["name"])
        if factory is None or name not in inspect.signature(factory).parameters:
            raise CheckpointError(f"{name} cannot be set: the {part['name'] or spec['name']} in {file} has none")
        part["args"] = {**(part.get("args") or {}), name: value}
    return spec


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
            f"{file} has a normalization other than {{'inp': {{'sub', 'div'}}, 'gt': {{'sub', 'div'}}}}: {data_norm!r}"
        ) from None


def unwrapped(model: Any) -> Any:
    """The model without wrappers of torch.compile and data parallelism."""
    while True:
        if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            model = model.module
        elif isinstance(inner := getattr(model, "_orig_mod", None), nn.Module):
            model = inner
        else:
            return model


def _check_fits(model: nn.Module, spec: dict[str, Any], file: Path) -> None:
    with torch.device("meta"):  # only shapes are needed
        expected = make_model(spec).state_dict()
    problem = _misfit(expected, model.state_dict())
    if problem:
        raise ValueError(f"{file} was not written because the model no longer matches its spec: {problem}")


def _misfit(expected: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> str:
    """Why a module with the weights `expected` cannot load `found`; '' if it can."""
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


def from_state_dict(state: Mapping[str, Any], *, source: str = "the state_dict") -> nn.Module:
    """A model of a dictionary that another program has read from a file, in eval mode on the CPU.

    state: {'name', 'args', 'sd'}, as in the original's files; or weights alone, with the keys of the original or of
        MMagic, whose spec is determined by their shapes as in `mmagic.convert`.
    source: names the dictionary in errors.
    Raises CheckpointError.
    """
    try:
        spec, weights, data_norm = (state, state["sd"], None) if "sd" in state else mmagic.convert(state)
    except mmagic.NotLIIFError as error:
        raise CheckpointError(f"{source} is no LIIF: {error}") from None
    return _build((dict(spec), weights, data_norm), Path(source), {}).eval()
