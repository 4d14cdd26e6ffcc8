"""What the kernels promise, and whether a saved result keeps it."""

from __future__ import annotations

from typing import Any, NamedTuple

CREDIBLE_FRACTION = 1.02  # of the multiply-add loop's rate: nothing computes faster than that but by noise


class Target(NamedTuple):
    """`field` of `method` in `workload` must be at least `wanted` (at most, for bytes: what the result allows).

    field: a key of the method's entry, or `speedup_over RIVAL`.
    """

    what: str
    workload: str
    method: str
    field: str
    wanted: float
    device: str = "cpu"


_GPU_DECODE, _OVER_FOLDED, _OVER_AMP = (
    "decode-256-to-1024",
    "speedup_over folded-compiled-bf16",
    "speedup_over original-bf16",
)
TARGETS = (
    Target("decoding in float32, against the original", "decode-64-to-256", "cpu-fp32", "speedup", 3.5),
    Target("float32, of the multiply-add loop's rate", "decode-64-to-256", "cpu-fp32", "fraction_of_loop", 0.80),
    Target("decoding in bfloat16, against the original", "decode-64-to-256", "cpu-bf16", "speedup", 7.0),
    Target("bfloat16, of its loop's rate", "decode-64-to-256", "cpu-bf16", "fraction_of_loop", 0.70),
    Target("training step, against the original", "training-step", "cpu-fp32", "speedup", 2.0),
    Target("peak extra memory in float32", "size-2048", "cpu-fp32", "peak_bytes", 0),
    Target("peak extra memory in bfloat16", "size-2048", "cpu-bf16", "peak_bytes", 0),
    Target("CUDA decode, of the matrix product's rate", _GPU_DECODE, "cuda-bf16", "fraction_of_gemm", 0.44, "cuda"),
    Target("CUDA decode, against folded + compile", _GPU_DECODE, "cuda-bf16", _OVER_FOLDED, 1.8, "cuda"),
    Target("CUDA decode, against the original's AMP", _GPU_DECODE, "cuda-bf16", _OVER_AMP, 8.0, "cuda"),
    Target("CUDA training step, against the original's AMP", "training-step", "cuda-bf16", _OVER_AMP, 5.0, "cuda"),
    Target("CUDA gather, of the copy's rate", "gather", "cuda-fp32", "fraction_of_copy", 0.80, "cuda"),
    Target("Triton decode, of the matrix product's rate", _GPU_DECODE, "triton-bf16", "fraction_of_gemm", 0.40, "cuda"),
    Target("Triton decode, against folded + compile", _GPU_DECODE, "triton-bf16", _OVER_FOLDED, 1.6, "cuda"),
    Target("Triton training step, against the original's AMP", "training-step", "triton-bf16", _OVER_AMP, 4.0, "cuda"),
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
    field, _, rival = target.field.partition(" ")
    number = entry.get(field)
    if number is not None and rival:
        number = number.get(rival)
    if number is None:
        return Verdict(target.what, "", entry.get("reason", "not measured"), False)
    if field == "peak_bytes":
        allowed = entry["allowed_bytes"]
        return Verdict(target.what, f"<= {allowed / 1e6:.0f} MB", f"{number / 1e6:.0f} MB", number <= allowed)
    median = number["median"]
    if field.startswith("speedup"):
        return Verdict(target.what, f">= {target.wanted:g} x", f"{median:.2f} x", median >= target.wanted)
    credible = median <= CREDIBLE_FRACTION or field != "fraction_of_loop"
    return Verdict(target.what, f">= {target.wanted:.0%}", f"{median:.1%}", target.wanted <= median and credible)


def verdicts(result: dict[str, Any]) -> list[Verdict]:
    """Every promise about the result's device that the result can tell of."""
    device = result["machine"]["device"]
    judged = (judge(target, result["workloads"]) for target in TARGETS if target.device == device)
    return [verdict for verdict in judged if verdict is not None]
