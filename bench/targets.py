"""What the CPU kernels promise, and whether a saved result keeps it."""

from __future__ import annotations

from typing import Any, NamedTuple

CREDIBLE_FRACTION = 1.02  # of the multiply-add loop's rate: nothing computes faster than that but by noise


class Target(NamedTuple):
    """`field` of `method` in `workload` must be at least `wanted` (at most, for bytes: what the result allows)."""

    what: str
    workload: str
    method: str
    field: str
    wanted: float


TARGETS = (
    Target("decoding in float32, against the original", "decode-64-to-256", "cpu-fp32", "speedup", 3.5),
    Target("float32, of the multiply-add loop's rate", "decode-64-to-256", "cpu-fp32", "fraction_of_loop", 0.80),
    Target("decoding in bfloat16, against the original", "decode-64-to-256", "cpu-bf16", "speedup", 7.0),
    Target("bfloat16, of its loop's rate", "decode-64-to-256", "cpu-bf16", "fraction_of_loop", 0.70),
    Target("training step, against the original", "training-step", "cpu-fp32", "speedup", 2.0),
    Target("peak extra memory in float32", "memory-512-to-2048", "cpu-fp32", "peak_bytes", 0),
    Target("peak extra memory in bfloat16", "memory-512-to-2048", "cpu-bf16", "peak_bytes", 0),
)


class Verdict(NamedTuple):
    what: str
    wanted: str
    measured: str
    met: bool


def judge(target: Target, workloads: dict[str, Any]) -> Verdict | None:
    """The target against a result's workloads; None where these do not hold it."""
    entry = workloads.get(target.workload, {}).get("methods", {}).get(target.method)
    if entry is None:
        return None
    number = entry.get(target.field)
    if number is None:
        return Verdict(target.what, "", entry.get("reason", "not measured"), False)
    if target.field == "peak_bytes":
        allowed = entry["allowed_bytes"]
        return Verdict(target.what, f"<= {allowed / 1e6:.0f} MB", f"{number / 1e6:.0f} MB", number <= allowed)
    median = number["median"]
    if target.field == "speedup":
        return Verdict(target.what, f">= {target.wanted:g} x", f"{median:.2f} x", median >= target.wanted)
    met = target.wanted <= median <= CREDIBLE_FRACTION
    return Verdict(target.what, f">= {target.wanted:.0%}", f"{median:.1%}", met)
