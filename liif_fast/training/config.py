"""Configurations of training and evaluation: the original's YAML files as they are, a few keys more, all checked.

Every mistake is one sentence with the file and the key: an unknown or missing key, a wrong type, a folder that is not
there, an argument that a dataset, wrapper or model does not take.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import importlib.util
import inspect
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, NamedTuple, Union, get_args, get_origin, get_type_hints

import torch
import yaml

from liif_fast import data
from liif_fast.models import registry

OPTIMIZERS: dict[str, type[torch.optim.Optimizer]] = {"adam": torch.optim.Adam, "sgd": torch.optim.SGD}
Config = dict[str, Any]


class ConfigError(ValueError):
    """A configuration that cannot be run; the message is one sentence with file and key."""


class _Place(NamedTuple):
    """Where in which file something stands, for messages."""

    source: str
    key: str = ""

    def below(self, key: str) -> _Place:
        return _Place(self.source, f"{self.key}.{key}" if self.key else key)

    def error(self, what: str) -> ConfigError:
        return ConfigError(f"{self.source}: {self.key} {what}" if self.key else f"{self.source} {what}")


_Check = Callable[[Any, _Place], None]


# ------------------------------------------------------------------------------------------------------ single values


def _number(low: float = -float("inf"), *, above: bool = False, whole: bool = False) -> _Check:
    def check(value: Any, place: _Place) -> None:
        kind = "a whole number" if whole else "a number"
        if isinstance(value, bool) or not isinstance(value, int if whole else (int, float)):
            raise place.error(f"is {value!r}; it must be {kind}")
        if not (value > low if above else value >= low):
            raise place.error(f"is {value!r}; it must be {'above' if above else 'at least'} {low:g}")

    return check


def _text(value: Any, place: _Place) -> None:
    if not isinstance(value, str) or not value:
        raise place.error(f"is {value!r}; it must be text")


def _flag(value: Any, place: _Place) -> None:
    if not isinstance(value, bool):
        raise place.error(f"is {value!r}; it must be true or false")


def _one_of(*choices: str) -> _Check:
    def check(value: Any, place: _Place) -> None:
        if value not in choices:
            raise place.error(f"is {value!r}; it must be one of {', '.join(choices)}")

    return check


def _list_of(item: _Check, *, filled: bool = False) -> _Check:
    def check(value: Any, place: _Place) -> None:
        if not isinstance(value, list) or (filled and not value):
            raise place.error(f"is {value!r}; it must be a list{' of at least one entry' if filled else ''}")
        for index, each in enumerate(value):
            item(each, place.below(str(index)))

    return check


def _file(value: Any, place: _Place) -> None:
    _text(value, place)
    if not Path(value).is_file():
        raise place.error(f"names the file {value!r}, which does not exist")


def _eval_type(value: Any, place: _Place) -> None:
    if not isinstance(value, str) or not re.fullmatch(r"(div2k|benchmark)-[1-9]\d*", value):
        raise place.error(f"is {value!r}; it must be div2k-N or benchmark-N with a whole scale N, or be left out")


# ------------------------------------------------------------------------------------------------ dictionaries of keys


@dataclasses.dataclass(frozen=True)
class _Keys:
    """A dictionary's keys and the check of each. `required` must be there; all others may be left out or null."""

    checks: Mapping[str, _Check]
    required: Sequence[str] = ()

    def __call__(self, value: Any, place: _Place) -> None:
        if not isinstance(value, dict):
            raise place.error(f"is {value!r}; it must hold the keys {', '.join(self.checks)}")
        for key in value:
            if key not in self.checks:
                raise place.below(str(key)).error(f"is not a known key{_suggestion(key, self.checks)}")
        for key in self.required:
            if value.get(key) is None:
                raise place.below(key).error("is missing")
        for key, each in value.items():
            if each is not None:
                self.checks[key](each, place.below(key))


def _suggestion(key: Any, known: Sequence[str] | Mapping[str, Any]) -> str:
    close = difflib.get_close_matches(str(key), known, n=1)
    return f"; did you mean {close[0]}?" if close else f"; known here are {', '.join(known)}"


# ----------------------------------------------------------------------------- specs: a registered name and arguments


def _spec(kind: str, known: Callable[[], Mapping[str, Callable[..., Any]]], given: Sequence[str] = ()) -> _Check:
    """{'name', 'args'} of something registered; `given` are arguments that the program fills in."""

    def check(value: Any, place: _Place) -> None:
        _Keys({"name": _text, "args": _mapping}, ["name"])(value, place)
        factories = known()
        if value["name"] not in factories:
            hint = _suggestion(value["name"], sorted(factories))
            raise place.below("name").error(f"is {value['name']!r}, but no {kind} is registered by that name{hint}")
        _arguments(factories[value["name"]], value.get("args") or {}, place, given)

    return check


def _mapping(value: Any, place: _Place) -> None:
    if not isinstance(value, dict):
        raise place.error(f"is {value!r}; it must hold keys and values")


_VARIADIC = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)


def _arguments(factory: Callable[..., Any], args: dict[str, Any], place: _Place, given: Sequence[str]) -> None:
    """Hold `args` against the factory's signature: names, what may not be left out, and plain types."""
    signature = inspect.signature(factory).parameters
    parameters = {name: parameter for name, parameter in signature.items() if name not in given}
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    named = {name: each for name, each in parameters.items() if each.kind not in _VARIADIC}
    types = _hints(factory)
    inside = place.below("args")
    for name, value in args.items():
        if name not in named and not takes_any:
            raise inside.below(str(name)).error(f"is not an argument of it{_suggestion(name, named)}")
        left_out = value is None and (name not in named or named[name].default is None)
        if name.endswith("_spec") and not left_out:
            _MODEL(value, inside.below(name))
        elif name.startswith("root_path"):
            _text(value, inside.below(name))
            if not Path(value).is_dir():
                raise inside.below(name).error(f"names the folder {value!r}, which does not exist")
        elif name == "split_file" and value is not None:
            _file(value, inside.below(name))
        elif name in types and not _fits(value, types[name]):
            raise inside.below(name).error(f"is {value!r}; it must be {_describe(types[name])}")
    for name, parameter in named.items():
        if parameter.default is parameter.empty and name not in args:
            raise inside.below(name).error("is missing")


def _hints(factory: Callable[..., Any]) -> dict[str, Any]:
    target = factory.__init__ if inspect.isclass(factory) else factory
    try:
        return get_type_hints(target)
    except (NameError, TypeError):  # a user's class with annotations that mean nothing at run time
        return {}


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value from YAML is what an annotation asks for; True where the annotation is beyond plain types."""
    origin, args = get_origin(hint), get_args(hint)
    if _is_union(hint):
        return any(_fits(value, each) for each in args)
    if origin is Literal:
        return value in args
    if origin is not None and isinstance(origin, type) and issubclass(origin, Sequence):
        return isinstance(value, list | tuple) and all(_fits(each, args[0]) for each in value)
    if hint is NoneType:
        return value is None
    if hint in (int, float):
        return isinstance(value, int if hint is int else int | float) and not isinstance(value, bool)
    if hint in (bool, str):
        return isinstance(value, hint)
    return not isinstance(value, bool) if hint is Path else True


def _describe(hint: Any) -> str:
    """A plain type in words: 'a whole number or null'."""
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "text", Path: "a path"}
    each = get_args(hint) if _is_union(hint) else (hint,)
    return " or ".join(dict.fromkeys("null" if one is NoneType else names.get(one, "a list") for one in each))


def _is_union(hint: Any) -> bool:
    return get_origin(hint) in (Union, UnionType)


_MODEL = _spec("model", registry.registered, given=("in_dim",))
_DATASET = _Keys(
    {
        "dataset": _spec("dataset", data.registered),
        "wrapper": _spec("wrapper", data.registered, given=("dataset",)),
        "batch_size": _number(1, whole=True),
        "loader": _one_of("workers", "device"),
        "num_workers": _number(0, whole=True),
    },
    ["dataset", "wrapper", "batch_size"],
)
_SIDE = _Keys({part: _list_of(_number(), filled=True) for part in ("sub", "div")}, ["sub", "div"])
_DATA_NORM = _Keys({"inp": _SIDE, "gt": _SIDE}, ["inp", "gt"])
_COMMON: dict[str, _Check] = {
    "data_norm": _DATA_NORM,
    "eval_type": _eval_type,
    "eval_bsize": _number(1, whole=True),
    "imports": _list_of(_text),  # modules or .py files that register models, encoders, datasets
    "backend": _text,
    "num_workers": _number(0, whole=True),
}
_TRAIN = _Keys(
    {
        **_COMMON,
        "train_dataset": _DATASET,
        "val_dataset": _DATASET,
        "model": _MODEL,
        "optimizer": _spec("optimizer", lambda: OPTIMIZERS, given=("params",)),
        "multi_step_lr": _Keys(
            {"milestones": _list_of(_number(1, whole=True)), "gamma": _number(0, above=True)}, ["milestones"]
        ),
        "epoch_max": _number(1, whole=True),
        "epoch_val": _number(1, whole=True),
        "epoch_save": _number(1, whole=True),
        "resume": _file,
        "init": _text,
        "seed": _number(0, whole=True),
        "autocast": _one_of("bf16", "fp16"),
        "channels_last": _flag,
        "compile_encoder": _flag,
        "cuda_graphs": _flag,
        "clip_grad": _number(0, above=True),
        "accumulate": _number(1, whole=True),
        "ema": _number(0),
        "tensorboard": _flag,
        "plots": _flag,
    },
    ["train_dataset", "model", "optimizer", "epoch_max"],
)
_TEST = _Keys({**_COMMON, "test_dataset": _DATASET}, ["test_dataset"])
KINDS = {"train": _TRAIN, "test": _TEST}


# ------------------------------------------------------------------------------------------------------------ reading


class _Loader(yaml.SafeLoader):
    """YAML in which 1e-4 is a number, as in YAML 1.2, and a key that stands twice is a mistake."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            if key_node.value in seen and key_node.tag != "tag:yaml.org,2002:merge":
                twice = f"{key_node.value} stands twice"
                raise yaml.constructor.ConstructorError(None, None, twice, key_node.start_mark)
            seen.add(key_node.value)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def load(path: str | os.PathLike[str], kind: str = "train", overrides: Sequence[str] = ()) -> Config:
    """Read a configuration, apply overrides such as 'optimizer.args.lr=1e-3', import what it names, and check it.

    kind: 'train' or 'test'. Returns the dictionary as it stands in the file.
    Raises ConfigError, FileNotFoundError for a file that is not there.
    """
    source = str(path)
    if not Path(path).is_file():
        raise FileNotFoundError(f"the configuration {source} does not exist")
    content = _parse(Path(path).read_text(encoding="utf-8"), source)
    if not isinstance(content, dict):
        raise ConfigError(f"{source} is no configuration: it must hold keys such as {', '.join(KINDS[kind].required)}")
    for override in overrides:
        _override(content, override)
    check(content, kind, source, folder=Path(path).parent)
    return content


def check(content: Config, kind: str = "train", source: str = "the configuration", folder: Path | None = None) -> None:
    """Raise ConfigError, naming `source` and the key, for the first mistake in a configuration of that kind.

    What `imports` names is imported first, files as seen from `folder` (None: the working directory).
    """
    place = _Place(source)
    names = content.get("imports")
    if names is not None:
        _list_of(_text)(names, place.below("imports"))
        for name in names:
            _import(name, folder or Path(), place.below("imports"))
    KINDS[kind](content, place)
    if kind == "train":
        _check_together(content, place)


def _check_together(content: Config, place: _Place) -> None:
    """What no key can say alone."""
    if (content.get("ema") or 0) >= 1:
        raise place.below("ema").error(f"is {content['ema']!r}; it must be below 1")
    parts, batch = content.get("accumulate") or 1, content["train_dataset"]["batch_size"]
    if batch % parts:
        raise place.below("accumulate").error(f"is {parts}, which does not divide the batch_size {batch}")


def _parse(text: str, source: str) -> Any:
    try:
        return yaml.load(text, _Loader)  # a SafeLoader: plain containers only
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark else ""
        raise ConfigError(f"{source}{where} is not YAML: {getattr(error, 'problem', None) or error}") from None


def _override(content: Config, text: str) -> None:
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise ConfigError(f"--set {text} is not key=value, such as optimizer.args.lr=1e-3")
    *parents, last = key.split(".")
    target: Any = content
    for parent in parents:
        if target.get(parent) is None:
            target[parent] = {}
        target = target[parent]
        if not isinstance(target, dict):
            raise ConfigError(f"--set {text} goes below {parent}, which is {target!r} and holds no keys")
    target[last] = _parse(value, f"--set {text}")


def _import(name: str, folder: Path, place: _Place) -> None:
    """Import a module, or a .py file once."""
    try:
        if not name.endswith(".py"):
            importlib.import_module(name)
            return
        file = (folder / name).resolve()
        module_name = f"liif_fast_import_{file.stem}_{abs(hash(str(file))):x}"
        if module_name in sys.modules:
            return
        if not file.is_file():
            raise place.error(f"names the file {str(file)!r}, which does not exist")
        found = importlib.util.spec_from_file_location(module_name, file)
        assert found is not None and found.loader is not None
        module = importlib.util.module_from_spec(found)
        sys.modules[module_name] = module  # DataLoader workers and pickles look classes up here
        found.loader.exec_module(module)
    except ImportError as error:
        raise place.error(f"names {name!r}, which cannot be imported ({error})") from None
