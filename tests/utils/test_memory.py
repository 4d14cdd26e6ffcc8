"""Available memory, and sizes as text."""

import pytest

from liif_fast.utils import memory


def test_available_memory_is_a_sensible_number():
    amount = memory.available()
    assert amount is None or 1e6 < amount < 1e15


@pytest.mark.parametrize(
    ("amount", "text"), [(12, "12 bytes"), (1500, "1.5 kB"), (3.2e8, "320 MB"), (1.5e9, "1.5 GB"), (4e12, "4 TB")]
)
def test_readable_sizes(amount, text):
    assert memory.readable(amount) == text
