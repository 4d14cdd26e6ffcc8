"""The fused decode's machine code against machine_code.json, so that the kernels stay what their comments say.

Registers and spills alone do not show a 16-byte store that became four, a load that waits for the one before it, or a
refill of the weights in front of the products. A cycle model over this code is where the modeled rates come from.
"""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cuda import sass
from tests.cuda.test_cuda_build import ROOT, compiled_object, needs_nvcc, reports, setup_py, toolkit

BUDGET = json.loads(Path(__file__).with_name("machine_code.json").read_text())
KERNELS = {
    "forward": r"decode_forward_kernel.*Li256ELi{rows}EEELb0E",
    "forward that saves": r"decode_forward_kernel.*Li256ELi{rows}EEELb1E",
    "backward": r"decode_backward_kernel.*Li256ELi{rows}EE",
    "weights": r"decode_weights_kernel.*Li256ELi128EE",
}
HOPPER_KERNELS = {
    "paper": r"decode_hopper_kernel.*bfloat16Li4ELi3ELi3E",
    "128 channels": r"decode_hopper_kernelINS_10HopperTileI6__halfLi4ELi4ELi0ELi128E",
    "128 channels, one corner": r"decode_hopper_kernelINS_10HopperTileI13__nv_bfloat16Li1ELi4ELi0ELi128E",
    **{
        f"{name}, {width} channels{', one corner' if corners == '1' else ''}": (
            rf"decode_hopper_{kernel}INS_16HopperSaving.*{element}Li{corners}ELi4ELi0ELi{width}E"
        )
        for name, kernel in (("training", "kernel"), ("backward", "backward_kernel"))
        for width, corners, element in (
            ("256", "4", "bfloat16"),
            ("256", "1", "half"),
            ("128", "4", "half"),
            ("128", "1", "bfloat16"),
        )
    },
}
CONVOLUTIONS = {name: rf"[0-9]convolution_kernel.*{name}" for name in ("bfloat16", "half")}
NOTES = re.compile(r"\(C7\d+\)[^\n]*")  # ptxas's, where it serializes products
EXACT = ("products", "fences", "waits", "stores", "stores_of_16_bytes", "wide_loads", "reductions")
EXACT += ("fragment_loads", "copies", "stores_to_shared", "fragments_of_the_map", "fragments_of_weights")
AT_LEAST = ("wide_stores", "loads_in_flight", "copies_under_products")  # the other numbers are upper limits


def cuobjdump() -> Path:
    """The toolkit's, else the one in Triton's wheel."""
    spec = importlib.util.find_spec("triton")
    inside = Path(spec.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump" if spec and spec.origin else Path()
    found = shutil.which("cuobjdump", path=toolkit().root / "bin") or (str(inside) if inside.is_file() else None)
    return Path(found) if found else pytest.skip("no cuobjdump was found, neither nvcc's nor Triton's")


def read_report(report: str, arch: str) -> dict[str, str]:
    """{mangled name: ptxas's report} of every kernel for an architecture."""
    parts = re.split(r"Compiling entry function '(\w+)' for 'sm_(\w+)'", report)
    return {parts[i]: parts[i + 2] for i in range(1, len(parts), 3) if parts[i + 1] == arch}


def usage(report: str) -> dict[str, int]:
    """Registers and spills in ptxas's report on a kernel."""
    spills = re.findall(r"(\d+) bytes (?:stack frame|spill stores|spill loads)", report)
    return {
        "registers": int(re.search(r"Used (\d+) registers", report)[1]),
        "spill_bytes": sum(map(int, spills)),
    }


def is_within(key: str, value: int, allowed: int) -> bool:
    return value == allowed if key in EXACT else value >= allowed if key in AT_LEAST else value <= allowed


def check(budgets: dict, patterns: dict, measure: Callable, arch: str, *names: str) -> None:
    """Compare the kernels of sources in csrc/cuda, as the build has compiled them, with their budgets."""
    checked = []
    for source in (ROOT / "csrc" / "cuda" / name for name in names):
        report = reports()[source]
        assert not NOTES.findall(report)
        kernels = read_report(report, arch)
        wanted = [(name, one) for name, pattern in patterns.items() for one in kernels if re.search(pattern, one)]
        codes = sass.read_kernels(cuobjdump(), compiled_object(source), arch, [one for _, one in wanted])
        for name, mangled in wanted:
            found, budget = {**usage(kernels[mangled]), **measure(codes[mangled])}, budgets[name]
            assert found.keys() == budget.keys()
            over = {key: (value, budget[key]) for key, value in found.items() if not is_within(key, value, budget[key])}
            assert not over, f"{name}: (found, allowed)"
        checked += [name for name, _ in wanted]
    assert sorted(checked) == sorted(patterns)


@needs_nvcc
@pytest.mark.parametrize("arch", [arch for arch in BUDGET if arch not in ("hopper", "convolution")])
def test_the_decode_is_compiled_to_what_its_comments_say(arch):
    rows = BUDGET[arch]["rows"]
    patterns = {name: pattern.format(rows=rows) for name, pattern in KERNELS.items()}
    check(BUDGET[arch], patterns, sass.measure_decode, arch, "decode/bfloat16.cu")


@needs_nvcc
@pytest.mark.parametrize("arch", ["80", "90a"])
def test_the_convolution_is_compiled_to_what_its_comments_say(arch):
    budgets = dict.fromkeys(CONVOLUTIONS, BUDGET["convolution"])
    check(budgets, CONVOLUTIONS, sass.measure_convolution, arch, "convolution.cu")


@needs_nvcc
def test_the_hopper_decode_is_compiled_to_what_its_comments_say():
    """An edit anywhere may make ptxas serialize the products, which it says in a note, or spill."""
    check(
        BUDGET["hopper"],
        HOPPER_KERNELS,
        sass.measure_hopper,
        "90a",
        "decode/hopper_bfloat16.cu",
        "decode/hopper_float16.cu",
    )


@needs_nvcc
def test_the_probes_of_the_hopper_decode_neither_spill_nor_wait_for_each_product(tmp_path):
    command = [toolkit().command[0], *setup_py().NVCC_FLAGS, "-Xptxas", "-v", "-I", ROOT / "csrc", "-cubin"]
    command += ["-arch=compute_90a", "-code=sm_90a", ROOT / "tests" / "gpu" / "hopper_probes.cu"]
    result = subprocess.run([*command, "-o", tmp_path / "cubin"], capture_output=True, text=True, check=True)
    report = result.stdout + result.stderr
    spills = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", report)
    assert spills == [("0", "0", "0")] * 8 and not NOTES.findall(report)
