"""How much memory is available, checked in advance: an error message is better than an out-of-memory kill."""

from __future__ import annotations

from pathlib import Path

_CGROUPS = Path("/sys/fs/cgroup")


class NotEnoughMemory(MemoryError):
    """More memory is needed than is available; the message is one sentence with both numbers."""


def available() -> int | None:
    """Bytes of main memory that this process may still allocate, or None if the system does not report them.

    The smaller of Linux's MemAvailable and the rest of the control group's limit (containers).
    """
    amounts = []
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                amounts.append(int(line.split()[1]) * 1024)
    except OSError:
        pass
    for limit, used in (
        (_CGROUPS / "memory.max", _CGROUPS / "memory.current"),
        (_CGROUPS / "memory/memory.limit_in_bytes", _CGROUPS / "memory/memory.usage_in_bytes"),
    ):
        try:
            amounts.append(max(0, int(limit.read_text()) - int(used.read_text())))
        except (OSError, ValueError):  # there is no such control group, or the limit is the word "max"
            continue
    return min(amounts, default=None)


def require(needed: float, what: str, advice: str) -> None:
    """Raise NotEnoughMemory if more than the available memory is needed.

    Args:
        needed: bytes, an estimate.
        what: the subject of the message, such as "A result of 10x20 pixels".
        advice: the remedy, at the end of the message.
    """
    free = available()
    if free is not None and needed > free:
        raise NotEnoughMemory(
            f"{what} needs about {readable(needed)} of memory, but {readable(free)} are available: {advice}."
        )


def readable(amount: float) -> str:
    """A number of bytes as text: 1.5 GB, 300 MB."""
    for unit, size in (("PB", 1e15), ("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if amount >= size:
            return f"{amount / size:.3g} {unit}" if amount < 1e18 else f"{amount / size:.1e} {unit}"
    return f"{amount:.0f} bytes"
