"""The ops' place in torch.ops, and how an op gets there."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch._ops import OpOverload

# "liif_fast", and for a copy under another name (a kernel of the Hub, a vendored package) that name with underscores:
# copies run side by side.
NAMESPACE = (__package__ or "").rpartition(".")[0].replace(".", "_") or "liif_fast"
NATIVE_NAMESPACE = f"{NAMESPACE}_C"  # of the compiled extension

_home = getattr(torch.ops, NAMESPACE)
if "library" in vars(_home):  # the package was imported before, and removed from sys.modules
    _home.library._destroy()
LIBRARY = _home.library = torch.library.Library(NAMESPACE, "FRAGMENT")


def register_op(schema: str) -> Callable[[Callable[..., Any]], OpOverload[..., Any]]:
    """A decorator that makes a function the op `name(arguments) -> results`, on every device.

    torch.library.custom_op does the same, but its first call imports PyTorch's compiler, which takes two seconds.
    """

    def register(function: Callable[..., Any]) -> OpOverload[..., Any]:
        @functools.wraps(function)
        def kernel(*arguments: Any) -> Any:
            # The compiler must not look into the kernel where PyTorch calls it from a function that is compiled.
            is_compiled = "torch._dynamo" in sys.modules
            return untraced()(*arguments) if is_compiled else function(*arguments)

        @functools.cache
        def untraced() -> Callable[..., Any]:
            return torch.compiler.disable(function)

        LIBRARY.define(schema, tags=torch.Tag.pt2_compliant_tag)
        name = schema.partition("(")[0]
        LIBRARY.impl(name, kernel, "CompositeExplicitAutograd")
        overload: OpOverload[..., Any] = getattr(_home, name).default
        return overload

    return register
