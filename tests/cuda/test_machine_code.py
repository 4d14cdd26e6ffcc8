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
from tests.cuda.test_cuda_build import needs_nvcc, setup_py, toolkit

HERE = Path(__file__).parent
BUDGET = json.loads((HERE / "machine_code.json").read_text())
KERNELS = {
    "forward": r"decode_forward_kernel.*Lb0E",
    "forward that saves": r"decode_forward_kernel.*Lb1E",
    "backward": "decode_backward_kernel",
    "weights": "decode_weights_kernel",
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
SM_90A = ("-arch=compute_90a", "-code=sm_90a")
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


def usage(report: str, pattern: str) -> dict[str, int]:
    """Registers and spills of a kernel in ptxas's report."""
    (part,) = [text for text in report.split("Compiling entry function '")[1:] if re.match(pattern, text.split("'")[0])]
    spills = re.findall(r"(\d+) bytes (?:stack frame|spill stores|spill loads)", part)
    return {
        "registers": int(re.search(r"Used (\d+) registers", part)[1]),
        "spill_bytes": sum(map(int, spills)),
    }


def is_within(key: str, value: int, allowed: int) -> bool:
    return value == allowed if key in EXACT else value >= allowed if key in AT_LEAST else value <= allowed


def compile_probe(command: list, cubin: Path) -> str:
    """What the compiler says."""
    command = [toolkit().command[0], *setup_py().NVCC_FLAGS, "-Xptxas", "-v", "-I", HERE.parents[1] / "csrc", *command]
    result = subprocess.run([*command, "-cubin", "-o", cubin], capture_output=True, text=True, check=True)
    return result.stdout + result.stderr


def check(budgets: dict, patterns: dict, measure: Callable, command: list, cubin: Path) -> str:
    """Compile a probe and compare its kernels with their budgets; returns what the compiler says."""
    report = compile_probe(command, cubin)
    codes = sass.read_kernels(cuobjdump(), cubin)
    for name, pattern in patterns.items():
        (code,) = [code for mangled, code in codes.items() if re.search(pattern, mangled)]
        found, budget = {**usage(report, f".*{pattern}"), **measure(code)}, budgets[name]
        assert found.keys() == budget.keys()
        over = {key: (value, budget[key]) for key, value in found.items() if not is_within(key, value, budget[key])}
        assert not over, f"{name}: (found, allowed)"
    return report


@needs_nvcc
@pytest.mark.parametrize("arch", [arch for arch in BUDGET if arch not in ("hopper", "convolution")])
def test_the_decode_is_compiled_to_what_its_comments_say(arch, tmp_path):
    command = [f"-arch=compute_{arch}", f"-code=sm_{arch}", f"-DROWS={BUDGET[arch]['rows']}", HERE / "decode_probe.cu"]
    check(BUDGET[arch], KERNELS, sass.measure_decode, command, tmp_path / "probe.cubin")


@needs_nvcc
@pytest.mark.parametrize("arch", ["80", "90a"])
def test_the_convolution_is_compiled_to_what_its_comments_say(arch, tmp_path):
    command = [f"-arch=compute_{arch}", f"-code=sm_{arch}", HERE.parents[1] / "csrc" / "cuda" / "convolution.cu"]
    budgets = dict.fromkeys(CONVOLUTIONS, BUDGET["convolution"])
    check(budgets, CONVOLUTIONS, sass.measure_convolution, command, tmp_path / "convolution.cubin")


@needs_nvcc
def test_the_hopper_decode_is_compiled_to_what_its_comments_say(tmp_path):
    """An edit anywhere may make ptxas serialize the products, which it says in a note, or spill."""
    command = [*SM_90A, HERE / "hopper_probe.cu"]
    report = check(BUDGET["hopper"], HOPPER_KERNELS, sass.measure_hopper, command, tmp_path / "probe.cubin")
    assert not NOTES.findall(report)


@needs_nvcc
def test_the_probes_of_the_hopper_decode_neither_spill_nor_wait_for_each_product(tmp_path):
    report = compile_probe([*SM_90A, HERE.parent / "gpu" / "hopper_probes.cu"], tmp_path / "probes.cubin")
    spills = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", report)
    assert spills == [("0", "0", "0")] * 8 and not NOTES.findall(report)
