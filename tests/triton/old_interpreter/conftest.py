"""Triton's interpreter must be chosen before Triton is imported, so these tests run in a process of their own.

`tests/triton/test_triton_interpreter.py` starts them; by hand:
`TRITON_INTERPRET=1 python -m pytest tests/triton/interpreter`.
"""

from __future__ import annotations

import importlib.util
import os

RUNS = os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("triton") is not None
collect_ignore_glob = [] if RUNS else ["test_*.py"]

if RUNS:
    from tests.triton.interpreter import bf16

    bf16.mend()
