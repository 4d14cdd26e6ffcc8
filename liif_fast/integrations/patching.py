"""One line that speeds up existing LIIF code: `liif_fast.patch()` replaces `query_rgb` of its classes.

The replacement runs the ops where they compute the same, and the class's own code everywhere else. Only the function in
the class changes: models, their state_dicts, pickles and hooks do not.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import logging
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from liif_fast import ops
from liif_fast.integrations.self_check import SWITCHES, Setup, difference
from liif_fast.models.base import ImplicitModel, linear_chain, linear_layers
from liif_fast.models.latent_map import LatentMapHolder
from liif_fast.ops.backends import OpRequest, choose
from liif_fast.ops.query import latent_map_for

_QUERIES = ("coord", "cell")  # the last parameters of query_rgb; MMagic's has the features before them
_log = logging.getLogger("liif_fast")
_patched: dict[type, Any] = {}  # of every patched class the replacement
_thread = threading.local()  # .holder: the latent map of the thread's current loop over chunks


def patch(*targets: type[nn.Module] | nn.Module) -> tuple[type, ...]:
    """Let LIIF classes of yinboc/liif, of MMagic and of their relatives decode with the ops.

    targets: classes, or models, of which every LIIF inside is meant; none = the LIIF classes in imported modules.
    Returns the classes whose `query_rgb` is replaced. It is the class that defines `query_rgb`, so all models of the
    class and of its subclasses change, except for subclasses with a `query_rgb` of their own. A second call changes
    nothing more.

    The class's own code still runs for imnets other than Linear and ReLU, for imnets with hooks or parametrizations, on
    devices without kernels, in exported models and under `torch.func`. At the first call for a class, its switches and
    the shape of its imnet, the replacement is compared with the class's own code on a small map. Where they differ, a
    RuntimeWarning says so and the class's own code runs.

    With gradients disabled, calls in a row with the same features share one latent map, as in a loop over chunks.
    Raises LookupError if no imported module has a LIIF class, TypeError for a target that is no LIIF.
    """
    classes = [found for target in targets for found in _classes_of(target)] if targets else _imported_classes()
    if not classes:
        raise LookupError(
            "no imported module has a LIIF class: import your models before liif_fast.patch(), or pass the class to it"
        )
    for cls in classes:
        if cls.__dict__["query_rgb"] is not _patched.get(cls):
            original = cls.__dict__["query_rgb"]
            _patched[cls] = replacement = _replacement(original)
            cls.query_rgb = replacement  # type: ignore[attr-defined]
    return tuple(dict.fromkeys(classes))


def unpatch(*targets: type[nn.Module] | nn.Module) -> tuple[type, ...]:
    """Undo `patch` for some classes or models, or for all of them; returns the classes that have their own code again.

    Classes that are not patched stay as they are. Raises TypeError for a target that is no LIIF.
    """
    wanted = [found for target in targets for found in _classes_of(target)] if targets else list(_patched)
    return tuple(cls for cls in dict.fromkeys(wanted) if _restore(cls))


@contextlib.contextmanager
def patched(*targets: type[nn.Module] | nn.Module) -> Iterator[tuple[type, ...]]:
    """`patch` for the length of a `with` block; classes that were patched before stay patched after it."""
    before = set(_patched)
    classes = patch(*targets)
    try:
        yield classes
    finally:
        for cls in classes:
            if cls not in before:
                _restore(cls)


def _restore(cls: type) -> bool:
    if cls not in _patched:
        return False
    replacement = _patched.pop(cls)
    if cls.__dict__.get("query_rgb") != replacement:
        _log.warning("%s.query_rgb was replaced after liif_fast.patch(); it stays as it is", cls.__qualname__)
        return False
    cls.query_rgb = replacement.__wrapped__  # type: ignore[attr-defined]
    return True


# --------------------------------------------------------------------------------------------- which classes to patch


def _defining_class(cls: type) -> type | None:
    """The class that defines the query_rgb of cls, if that function takes (coord, cell) or (features, coord, cell)."""
    for base in cls.__mro__:
        function = base.__dict__.get("query_rgb")
        if function is not None:
            ours = base.__module__.startswith("liif_fast.models.")
            return base if inspect.isfunction(function) and not ours and _parameters(function) else None
    return None


def _parameters(function: Callable[..., Any]) -> tuple[str, ...]:
    """The parameters of query_rgb after self, (coord, cell) or (features, coord, cell); empty for another function."""
    names = tuple(inspect.signature(function).parameters)[1:]
    return names if names[-2:] == _QUERIES and len(names) <= 3 else ()


def _imported_classes() -> list[type]:
    """Every class of an imported module that has the shape of LIIF and overrides no other one's query_rgb."""
    found: dict[type, None] = {}
    for module in list(sys.modules.values()):
        for value in list(getattr(module, "__dict__", {}).values()):
            # `isinstance` would evaluate lazy objects, which some modules have.
            if issubclass(type(value), type) and "query_rgb" in value.__dict__ and _is_liif(value):
                found[value] = None
    return [cls for cls in found if not any(base in found for base in cls.__mro__[1:])]


def _is_liif(cls: type) -> bool:
    """Whether a class that defines query_rgb has the shape of LIIF and is not one of ours."""
    if nn.Module not in cls.__mro__ or ImplicitModel in cls.__mro__ or _defining_class(cls) is not cls:
        return False
    inits = [base.__dict__["__init__"] for base in cls.__mro__ if inspect.isfunction(base.__dict__.get("__init__"))]
    return any(set(SWITCHES) <= set(inspect.signature(init).parameters) for init in inits)


def _classes_of(target: type[nn.Module] | nn.Module) -> list[type]:
    """The classes that define query_rgb for a class, or for the LIIF models in a model. Raises TypeError for none."""
    if isinstance(target, nn.Module):
        candidates = [type(module) for module in target.modules()]
    elif isinstance(target, type) and issubclass(target, nn.Module):
        candidates = [target]
    else:
        raise TypeError(f"patch takes a LIIF class or a model, not {target!r}")
    found = [cls for cls in map(_defining_class, candidates) if cls is not None]
    if not found:
        name = candidates[0].__qualname__
        reason = f"{name} has no query_rgb(coord, cell) or query_rgb(feature, coord, cell)"
        if any(issubclass(cls, ImplicitModel) for cls in candidates):
            reason = f"{name} of liif_fast runs the ops already"
        raise TypeError(f"nothing to patch: {reason}")
    return found


# ----------------------------------------------------------------------------------------------------- the replacement


def _replacement(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The function that takes the place of a class's query_rgb."""
    names = _parameters(original)
    takes_feat = len(names) == 3
    verdicts: dict[Setup, bool] = {}
    said: set[tuple[type, str]] = set()

    @_constant_in_traces
    def agrees(*facts: Any) -> bool:
        setup = Setup(*facts)
        key = setup._replace(device=torch.device(setup.device.type))
        if key not in verdicts:
            reason = difference(setup, original, takes_feat)
            verdicts[key] = not reason
            if reason:
                warnings.warn(f"{_name(setup.model)} keeps its own query_rgb: {reason}", RuntimeWarning, stacklevel=3)
        return verdicts[key]

    @_constant_in_traces
    def say(cls: type, reason: str) -> None:
        if (cls, reason) not in said:
            said.add((cls, reason))
            _log.warning("%s keeps its own query_rgb: %s", _name(cls), reason)

    @functools.wraps(original)
    def query_rgb(self: Any, *args: Any, **kwargs: Any) -> Tensor:
        given = {**dict(zip(names, args)), **kwargs}
        if len(given) < len(args) + len(kwargs) or not set(names[:-1]) <= set(given) <= set(names):
            return original(self, *args, **kwargs)  # which raises its TypeError
        feat: Any = given[names[0]] if takes_feat else getattr(self, "feat", None)
        imnet: Any = getattr(self, "imnet", None)
        if imnet is None or _is_transformed() or not _is_plain(feat):
            return original(self, *args, **kwargs)
        layers = _layers(imnet)
        if layers is None:
            say(
                type(self), f"its imnet, {_name(type(imnet))}, is not Linear and ReLU without hooks or parametrizations"
            )
            return original(self, *args, **kwargs)
        if reason := _refusal(feat, layers):
            say(type(self), reason)
            return original(self, *args, **kwargs)
        switches = tuple([bool(getattr(self, name, True)) for name in SWITCHES])
        widths = (layers[0].weight.shape[1], *[layer.weight.shape[0] for layer in layers])
        training = (self.training, imnet.training)
        if not agrees(type(self), type(imnet), switches, widths, training, feat.device):
            return original(self, *args, **kwargs)
        return _decode(feat, given["coord"], given.get("cell"), layers, switches)

    return query_rgb


def _constant_in_traces(function: Callable[..., Any]) -> Callable[..., Any]:
    """Let torch.compile call the function while it traces and take its result for a constant.

    `torch.compiler.assume_constant_result` does the same, but first imports torch._dynamo, which takes seconds.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def _name(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def _is_transformed() -> bool:
    """Whether the call is recorded for another program, or differentiated in a way that the ops do not support."""
    return (
        torch.jit.is_tracing()
        or torch.compiler.is_exporting()
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
    )


def _is_plain(tensor: Any) -> bool:
    """Whether it is a tensor with values, not a subclass (fake, distributed, quantized)."""
    return type(tensor) in (Tensor, nn.Parameter)


def _layers(imnet: nn.Module) -> list[nn.Linear] | None:
    """The Linear layers of an imnet that the ops can compute, also if it is another code's MLP with `layers`."""
    found = linear_layers(imnet)
    if found is None and list(imnet._modules) == ["layers"]:
        found = linear_chain(imnet.layers, imnet)  # type: ignore[arg-type]
    return found


def _refusal(feat: Tensor, layers: list[nn.Linear]) -> str:
    """Why the ops do not decode these features with these layers; '' where they do."""
    tensors = [tensor for layer in layers for tensor in (layer.weight, layer.bias)]
    kind = feat.device.type
    if odd := [type(tensor) for tensor in tensors if not _is_plain(tensor)]:
        return f"a layer of its imnet holds a {_name(odd[0])}"
    if not torch.is_autocast_enabled(kind) and any(tensor.dtype != feat.dtype for tensor in tensors):
        return f"its features are {feat.dtype} and its imnet is not"
    widths = tuple([layer.weight.shape[0] for layer in layers])
    if choose(OpRequest.on(feat, "decode", widths)) == "reference":
        return "LIIF_FAST_BACKEND is 'reference', which is slower"
    return ""


def _decode(
    feat: Tensor, coord: Tensor, cell: Tensor | None, layers: list[nn.Linear], switches: tuple[bool, ...]
) -> Tensor:
    flags: dict[str, Any] = dict(zip(SWITCHES, switches))
    weights, latent_map = [layer.weight for layer in layers], None
    if not torch.compiler.is_compiling():
        unfold = flags["feat_unfold"]
        holder = _thread.__dict__.setdefault("holder", LatentMapHolder())
        latent_map = holder.get(feat, weights[:1], (unfold,), lambda: latent_map_for(feat, weights, feat_unfold=unfold))
    biases = [layer.bias for layer in layers]
    return ops.query(feat, coord, cell, weights, biases, latent_map=latent_map, **flags)
