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
}
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


@needs_nvcc
@pytest.mark.parametrize("arch", BUDGET)
def test_the_decode_is_compiled_to_what_its_comments_say(arch, tmp_path):
    budget, cubin = BUDGET[arch], tmp_path / "probe.cubin"
    command = [toolkit().command[0], *setup_py().NVCC_FLAGS, f"-arch=compute_{arch}", f"-code=sm_{arch}"]
    command += ["-Xptxas", "-v", f"-DROWS={budget['rows']}", "-I", HERE.parents[1] / "csrc"]
    result = subprocess.run(
        [*command, "-cubin", HERE / "decode_probe.cu", "-o", cubin], capture_output=True, text=True, check=True
    )
    codes = sass.read_kernels(cuobjdump(), cubin)
    for name, pattern in KERNELS.items():
        (code,) = [code for mangled, code in codes.items() if re.search(pattern, mangled)]
        found = {**usage(result.stdout + result.stderr, f".*{pattern}"), **sass.measure(code)}
        assert found.keys() == budget[name].keys()
        over = {
            key: (value, budget[name][key])
            for key, value in found.items()
            if (value < budget[name][key] if key in AT_LEAST else value > budget[name][key])
        }
        assert not over, f"{name}: (found, allowed)"
