"""Corrects Triton's interpreter where it multiplies bfloat16 wrong, and makes it faster. For tests only.

The interpreter keeps bfloat16 as bit patterns: casts truncate, and products multiply the patterns. Kernels load, store,
cast and multiply matrices in bfloat16 and do everything else in float32, so only casts and `dot` need a correction.
"""

from __future__ import annotations

from functools import cache

import numpy as np
import triton.language as tl
from triton.runtime import interpreter


def widen(bits: np.ndarray) -> np.ndarray:
    """Bit patterns of bfloat16 -> float32."""
    return (np.ascontiguousarray(bits).view(np.uint16).astype(np.uint32) << 16).view(np.float32).reshape(bits.shape)


def narrow(values: np.ndarray) -> np.ndarray:
    """float32 -> bit patterns of bfloat16, to nearest, ties to even."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32).reshape(values.shape)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded)


@cache
def correct() -> None:
    """Patches the interpreter of this process, once."""
    convert = interpreter._convert_float
    dot = interpreter.InterpreterBuilder.create_dot

    def convert_float(values, source, target, rounding):
        if source == tl.bfloat16 and target == tl.float32:
            return widen(values).view(np.uint32)
        if source == tl.float32 and target == tl.bfloat16:
            return narrow(values.view(np.float32))
        return convert(values, source, target, rounding)

    def widened(handle):
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        return interpreter.TensorHandle(widen(handle.data), tl.float32)

    interpreter._convert_float = convert_float
    interpreter.InterpreterBuilder.create_dot = lambda self, a, b, *rest: dot(self, widened(a), widened(b), *rest)
    interpreter.InterpretedFunction.__call__ = _call


def _call(self, *args, **options):
    """A kernel's call of another function: patches the language only if the launch has not done so."""
    language = self.fn.__globals__.get("tl", tl.core)
    if tl.core.is_builtin(language.arange):
        interpreter._patch_lang(self.fn)
    return self.rewrite()(*args, **options)
