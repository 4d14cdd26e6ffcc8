"""Every test ends without a patched class."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

import liif_fast
from tests.integrations import original_classes as classes


@pytest.fixture(autouse=True)
def nothing_stays_patched() -> Iterator[None]:
    yield
    liif_fast.unpatch()
    classes.calls.clear()
