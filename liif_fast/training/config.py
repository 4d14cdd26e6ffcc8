"""Configurations of training and evaluation: the original's YAML files unchanged, with a few more keys, all checked.

Every error is one sentence with the file, the key, the wrong value and the rule for it.
"""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import inspect
import os
import re
import sys
import traceback
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin, get_type_hints

import torch
import yaml

from liif_fast import data
from liif_fast.data.loader import REMOVED_LOADER_KEY
from liif_fast.models import registry

OPTIMIZERS: dict[str, type[torch.optim.Optimizer]] = {"adam": torch.optim.Adam, "sgd": torch.optim.SGD}
Config = dict[str, Any]


class ConfigError(ValueError):
    """A configuration that cannot be run; the message is one sentence with file and key."""


# ------------------------------------------------------------------------------------------------------------- the keys


class _Rule(NamedTuple):
    """A condition on a value of the right type, and its words in the error 'it must be ...'."""

    holds: Callable[[Any], Any]
    words: str


class _Spec(NamedTuple):
    """{'name', 'args'} of a registered factory; the program fills in the `provided` arguments."""

    kind: str
    registered: Callable[[], Mapping[str, Callable[..., Any]]]
    provided: Collection[str] = ()


_Text = Annotated[str, _Rule(bool, "text")]
_File = Annotated[_Text, _Rule(os.path.isfile, "a file that exists")]
_Folder = Annotated[_Text, _Rule(os.path.isdir, "a folder that exists")]
_Count = Annotated[int, _Rule(lambda value: value >= 0, "at least 0")]
_Whole = Annotated[int, _Rule(lambda value: value >= 1, "at least 1")]
_Positive = Annotated[float, _Rule(lambda value: value > 0, "above 0")]
_NotNegative = Annotated[float, _Rule(lambda value: value >= 0, "at least 0")]
_Numbers = Annotated[list[float], _Rule(bool, "a list of at least one entry")]
_EVAL_TYPE = _Rule(re.compile(r"(div2k|benchmark)-[1-9]\d*").fullmatch, "div2k-N or benchmark-N with a whole scale N")
_MODEL = _Spec("model", registry.registered, ["in_dim"])

# A dictionary's keys with their types; keys with a question mark may be left out or null.
_SECTION = {
    "dataset": _Spec("dataset", data.registered),
    "wrapper": _Spec("wrapper", data.registered, ["dataset"]),
    "batch_size": _Whole,
    "num_workers?": _Count,
}
_SIDE = {"sub": _Numbers, "div": _Numbers}
_COMMON = {
    "data_norm?": {"inp": _SIDE, "gt": _SIDE},
    "eval_type?": Annotated[str, _EVAL_TYPE],
    "eval_bsize?": _Whole,
    "imports?": list[_Text],  # modules or .py files that register models, encoders, datasets
    "backend?": _Text,
    "num_workers?": _Count,
}
_TRAIN = {
    "train_dataset": _SECTION,
    "model": _MODEL,
    "optimizer": _Spec("optimizer", lambda: OPTIMIZERS, ["params"]),
    "epoch_max": _Whole,
    "val_dataset?": _SECTION,
    "multi_step_lr?": {"milestones": list[_Whole], "gamma?": _Positive},
    "cosine_lr?": {"min_lr?": _NotNegative, "warmup?": _Count},
    "max_minutes?": _Positive,
    "epoch_val?": _Whole,
    "epoch_save?": _Whole,
    "resume?": _File,
    "init?": _Text,
    "seed?": _Count,
    "autocast?": Literal["bf16", "fp16"],
    "channels_last?": bool,
    "compile_encoder?": bool,
    "cuda_graphs?": bool,
    "clip_grad?": _Positive,
    "accumulate?": _Whole,
    "ema?": Annotated[_NotNegative, _Rule(lambda value: value < 1, "below 1")],
    "tensorboard?": bool,
    "plots?": bool,
}
KINDS: dict[str, dict[str, Any]] = {"train": {**_TRAIN, **_COMMON}, "test": {"test_dataset": _SECTION, **_COMMON}}
_REMOVED = {"loader": REMOVED_LOADER_KEY}


# ------------------------------------------------------------------------------------------------------------ checking


_WORDS = {int: "a whole number", float: "a number", bool: "true or false", str: "text", dict: "a dictionary"}
_WORDS |= {Path: "a path", NoneType: "null"}


def _check(value: Any, hint: Any, key: str) -> None:
    """Check a value against an annotation or one of the tables above; unknown annotations accept every value."""
    kind, parts = get_origin(hint) or hint, get_args(hint)
    if isinstance(hint, dict):
        _check_keys(value, hint, key)
    elif isinstance(hint, _Spec):
        _check_spec(value, hint, key)
    elif kind is Annotated:
        _check(value, parts[0], key)
        for rule in parts[1:]:
            if not rule.holds(value):
                raise ConfigError(f"{key} is {value!r}; it must be {rule.words}")
    elif kind is Literal:
        if value not in parts:
            raise ConfigError(f"{key} is {value!r}; it must be one of {', '.join(map(str, parts))}")
    elif kind in (Union, UnionType):
        if not any(_fits(value, each, key) for each in parts):
            words = dict.fromkeys(_WORDS.get(each, "a list") for each in parts)
            raise ConfigError(f"{key} is {value!r}; it must be {' or '.join(words)}")
    elif kind in (list, tuple, Sequence) and parts:
        if not isinstance(value, list | tuple):
            raise ConfigError(f"{key} is {value!r}; it must be a list")
        for index, each in enumerate(value):
            _check(each, parts[0], f"{key}.{index}")
    elif kind in _WORDS:
        types = {float: int | float, Path: str}.get(kind, kind)
        if not isinstance(value, types) or (isinstance(value, bool) and kind is not bool):
            raise ConfigError(f"{key} is {value!r}; it must be {_WORDS[kind]}")


def _fits(value: Any, hint: Any, key: str) -> bool:
    try:
        _check(value, hint, key)
    except ConfigError:
        return False
    return True


def _check_keys(value: Any, table: Mapping[str, Any], key: str) -> None:
    types = {name.rstrip("?"): hint for name, hint in table.items()}
    if not isinstance(value, dict):
        raise ConfigError(f"{key} is {value!r}; it must hold the keys {', '.join(types)}")
    prefix = f"{key}." if key else ""
    for name in value:
        if name not in types:
            raise ConfigError(
                prefix + f"{name} {_REMOVED.get(name) or f'is not a known key; {_suggestion(name, types)}'}"
            )
    for name in types:
        if value.get(name) is not None:
            _check(value[name], types[name], prefix + name)
        elif name in table:
            raise ConfigError(f"{prefix}{name} is missing")


def _suggestion(name: Any, known: Collection[str]) -> str:
    close = difflib.get_close_matches(str(name), known, n=1)
    return f"did you mean {close[0]}?" if close else f"known here are {', '.join(known)}"


def _check_spec(value: Any, spec: _Spec, key: str) -> None:
    """Check a spec's name, and its args against the factory's signature: names, missing ones and plain types."""
    _check(value, {"name": _Text, "args?": dict}, key)
    name, args, factories = value["name"], value.get("args") or {}, spec.registered()
    if name not in factories:
        problem = f"is {name!r}, but no {spec.kind} is registered by that name"
        raise ConfigError(f"{key}.name {problem}; {_suggestion(name, sorted(factories))}")
    factory = factories[name]
    parameters = {
        each: found for each, found in inspect.signature(factory).parameters.items() if each not in spec.provided
    }
    kinds = {found.kind for found in parameters.values()}
    named = {
        each: found for each, found in parameters.items() if found.kind not in (found.VAR_KEYWORD, found.VAR_POSITIONAL)
    }
    try:
        types = get_type_hints(factory.__init__ if inspect.isclass(factory) else factory)
    except (NameError, TypeError):  # a user's class with annotations that do not exist at run time
        types = {}
    for each, argument in args.items():
        if each not in named and inspect.Parameter.VAR_KEYWORD not in kinds:
            raise ConfigError(f"{key}.args.{each} is not an argument of it; {_suggestion(each, named)}")
        if argument is not None or (each in named and named[each].default is not None):
            _check(argument, _by_name(each) or types.get(each, Any), f"{key}.args.{each}")
    for each, found in named.items():
        if found.default is found.empty and each not in args:
            raise ConfigError(f"{key}.args.{each} is missing")


def _by_name(argument: str) -> Any:
    """The rule that an argument's name implies for its value, instead of its annotation; None for other names."""
    if argument.endswith("_spec"):
        return _MODEL
    return _Folder if argument.startswith("root_path") else _File if argument == "split_file" else None


# ------------------------------------------------------------------------------------------------------------ reading


class _Loader(yaml.SafeLoader):
    """YAML in which 1e-4 is a number, as in YAML 1.2, and a repeated key is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            if key_node.value in seen and key_node.tag != "tag:yaml.org,2002:merge":
                twice = f"{key_node.value} appears twice"
                raise yaml.constructor.ConstructorError(None, None, twice, key_node.start_mark)
            seen.add(key_node.value)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def load(path: str | os.PathLike[str], kind: str = "train", overrides: Sequence[str] = ()) -> Config:
    """Read a configuration, apply overrides such as 'optimizer.args.lr=1e-3', import its modules, and check it.

    kind: 'train' or 'test'. Returns the dictionary of the file with the overrides.
    Raises ConfigError, or FileNotFoundError for a missing file.
    """
    source = str(path)
    if not Path(path).is_file():
        raise FileNotFoundError(f"the configuration {source} does not exist")
    content = _parse(Path(path).read_text(encoding="utf-8"), source)
    if not isinstance(content, dict):
        raise ConfigError(f"{source} is no configuration: it must hold keys such as {kind}_dataset")
    for override in overrides:
        _override(content, override)
    check(content, kind, source, folder=Path(path).parent)
    return content


def check(content: Config, kind: str = "train", source: str = "the configuration", folder: Path | None = None) -> None:
    """Raise ConfigError, naming `source` and the key, for the first error in a configuration of that kind.

    The modules of `imports` are imported first; paths of files start at `folder` (None: the working directory).
    """
    try:
        names = content.get("imports") or []
        _check(names, list[_Text], "imports")
        for name in names:
            import_code(name, folder or Path())
        _check(content, KINDS[kind], "")
        if content.get("multi_step_lr") is not None and content.get("cosine_lr") is not None:
            raise ConfigError("cosine_lr and multi_step_lr are both set; leave one of them out")
        parts = content.get("accumulate") or 1
        if parts > 1 and content["train_dataset"]["batch_size"] % parts:
            batch = content["train_dataset"]["batch_size"]
            raise ConfigError(f"accumulate is {parts}, which does not divide the batch_size {batch}")
    except ConfigError as error:
        raise ConfigError(f"{source}: {error}") from None


def _parse(text: str, source: str) -> Any:
    try:
        return yaml.load(text, _Loader)  # a SafeLoader: plain containers only
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        raise ConfigError(f"{source}{line} is not YAML: {getattr(error, 'problem', None) or error}") from None


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


def import_code(name: str, folder: Path = Path()) -> None:
    """Import a module, or once a .py file, whose path starts at `folder`; raises ConfigError for any error in it."""
    file = (folder / name).resolve()
    module_name = f"liif_fast_import_{file.stem}_{abs(hash(str(file))):x}"
    try:
        if not name.endswith(".py"):
            importlib.import_module(name)
            return
        if module_name in sys.modules:
            return
        if not file.is_file():
            raise ConfigError(f"imports names the file {str(file)!r}, which does not exist")
        found = importlib.util.spec_from_file_location(module_name, file)
        assert found is not None and found.loader is not None
        module = importlib.util.module_from_spec(found)
        sys.modules[module_name] = module  # DataLoader workers and pickles look classes up here
        found.loader.exec_module(module)
    except ConfigError:
        raise
    except Exception as error:  # the code of users can raise anything
        sys.modules.pop(module_name, None)
        lines = [each.lineno for each in traceback.extract_tb(error.__traceback__) if each.filename == str(file)]
        reason = f"{f'line {lines[-1]}: ' if lines else ''}{type(error).__name__}: {error}"
        raise ConfigError(f"imports names {name!r}, which cannot be imported ({reason})") from None
