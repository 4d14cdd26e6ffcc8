"""Compiles every Triton kernel for one architecture without a GPU, through the launchers, and prints its properties.

    python tests/triton/aot/compile_all.py 90

A driver that only names the architecture replaces the device, and launches stop after compiling: signatures,
constants and options are those of real launches. Prints JSON: a list of {kernel, variant, registers, shared, stack,
hgmma, tensor, tf32, fma}. tensor: products on tensor cores in the PTX, tf32: those of them that multiply TF32, fma:
fused multiply-adds of float32 or float64.
"""

from __future__ import annotations

import itertools
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.runtime import driver, jit

ROOT = Path(__file__).resolve().parents[3]
sys.path.insert(0, str(ROOT))
BIN = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


class NamedArchitecture:
    """The methods of a driver that compiling calls."""

    def __init__(self, arch: int) -> None:
        self.target = GPUTarget("cuda", arch, 32)

    def get_current_target(self):
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, _device) -> int:
        return 0


def disassemble(cubin: bytes) -> tuple[str, str]:
    """Resource usage and SASS."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return tuple(
            subprocess.run([BIN / tool, option, file.name], capture_output=True, text=True, check=True).stdout
            for tool, option in (("cuobjdump", "-res-usage"), ("nvdisasm", "-c"))
        )


def facts(kernel: str, variant: str, compiled) -> dict:
    usage, sass = disassemble(compiled.asm["cubin"])
    products = re.findall(r"\b(?:wgmma\.mma_async|mma\.sync|tcgen05\.mma)\.\S*", compiled.asm["ptx"])
    registers, stack = (int(re.search(rf"{word}:(\d+)", usage)[1]) for word in ("REG", "STACK"))
    return {
        "kernel": kernel,
        "variant": variant,
        "registers": registers,
        "shared": compiled.metadata.shared,
        "stack": stack,
        "hgmma": len(re.findall(r"\bHGMMA", sass)),
        "tensor": len(products),
        "tf32": sum("tf32" in product for product in products),
        "fma": len(re.findall(r"\bfma\.rn\.f(?:32|64)", compiled.asm["ptx"])),
    }


def variant_of(options: dict) -> str:
    """The name of one of a kernel's compilations in the budget."""
    names = [name.lower() for name in ("SAVE", "COORD", "GRID") if options.get(name)]
    names += ["term"] if options.get("query_term") is not None else []
    names += ["blend"] if options.get("OUTS") == 0 else []
    names += ["wide"] if options.get("NB", 0) * options.get("BLOCK", 0) > 256 else []
    if "PRECISION" in options and options["OP"] == tl.float32:
        names.append(options["PRECISION"])
    if "STORED" in options and options["STORED"] < options["NB"] * options["BLOCK"]:
        names.append("padded")
    return "-".join(names)


def watch(found: dict) -> None:
    """Makes every launch compile its kernel, record the result and stop."""
    run = jit.JITFunction.run

    def compile_only(self, *args, grid, warmup, **options):
        compiled = run(self, *args, grid=grid, warmup=True, **options)
        if compiled.hash not in found:
            found[compiled.hash] = facts(self.__name__, variant_of(options), compiled)
        return compiled

    jit.JITFunction.run = compile_only


def decode(
    dtype: torch.dtype,
    width: int,
    *,
    save: bool,
    grid: bool = False,
    coord_grad: bool = False,
    ensemble: bool = True,
    general: bool = False,
) -> None:
    """A decode with three hidden products, and its backward if the forward saves activations for one.

    general: with a query term and more outputs than the kernel decodes.
    """
    from liif_fast.ops.backends import triton as triton_backend
    from liif_fast.ops.inputs import DecodeInputs

    narrow = dtype in (torch.bfloat16, torch.float16)
    geometry = torch.float64 if dtype == torch.float64 else torch.float32
    widths = [width] * 4 + [64 if general else 3]
    inputs = DecodeInputs(
        latent_map=torch.zeros(1, 8, 8, width, dtype=torch.float32 if save and narrow else dtype),
        coord=None if grid else torch.zeros(1, 64, 2, dtype=geometry),
        cell=None if grid else torch.ones(1, 64, 2, dtype=geometry),
        weight_geometry=torch.zeros(width, 4),
        weights=[torch.zeros(o, i) for i, o in itertools.pairwise(widths)],
        biases=[torch.zeros(w) for w in widths],
        grid=[8, 8, 0, 0, 8, 8, 0, 0, 8, 8] if grid else [],
        grid_cell=[0.1, 0.1] if grid else [],
        local_ensemble=ensemble,
        query_term=torch.zeros(1, 64, width, dtype=geometry) if general else None,
        matmul_dtype=dtype,
    )
    out, saved = triton_backend.decode(inputs, save or None, coord_grad)
    if save:
        triton_backend.decode_backward(out, saved, inputs, coord_grad)


def everything_else(dtype: torch.dtype) -> None:
    """gather, ensemble and MetaSR, forward and backward."""
    from liif_fast.ops.backends import triton as triton_backend
    from liif_fast.ops.inputs import GatherInputs, MetasrInputs

    geometry = torch.float64 if dtype == torch.float64 else torch.float32
    feat, coord = torch.zeros(1, 64, 8, 8, dtype=dtype), torch.zeros(1, 64, 2, dtype=geometry)
    patches = GatherInputs(feat, coord, coord, feat_unfold=True, local_ensemble=True)
    x, area_weight = triton_backend.gather(patches)
    triton_backend.gather_backward(x, area_weight, patches)
    out = triton_backend.ensemble(x, area_weight)
    triton_backend.ensemble_backward(out, x, area_weight)
    latent_map, weight, bias = torch.zeros(1, 8, 8, 3 * 257, dtype=dtype), torch.zeros(256, 3), torch.zeros(256)
    metasr = MetasrInputs(latent_map, coord, coord, weight, bias, [0, 0, 8, 8])
    triton_backend.metasr_query_backward(triton_backend.metasr_query(metasr), metasr)


def main(arch: int) -> None:
    torch.set_num_threads(1)
    driver.set_active(NamedArchitecture(arch))
    found: dict[str, dict] = {}
    watch(found)
    decode(torch.bfloat16, 256, grid=True, save=False)
    decode(torch.bfloat16, 256, save=True)
    decode(torch.float32, 256, grid=True, save=False)
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    decode(torch.float32, 256, grid=True, save=False)
    decode(torch.float32, 256, save=True)
    torch.backends.cuda.matmul.fp32_precision = "ieee"
    decode(torch.float32, 256, save=True)
    decode(torch.bfloat16, 100, save=True)
    decode(torch.bfloat16, 256, save=True, general=True)
    if arch >= 90:
        decode(torch.bfloat16, 512, grid=True, save=False)
    if arch != 86:
        decode(torch.float16, 64, save=True, coord_grad=True, ensemble=False)
        decode(torch.float16, 64, save=True, coord_grad=True, general=True)
        decode(torch.float64, 64, grid=True, save=False, general=True)
        everything_else(torch.bfloat16)
        torch.use_deterministic_algorithms(True)
        decode(torch.bfloat16, 64, grid=True, save=True)
        everything_else(torch.float32)
    print(json.dumps(list(found.values())))


if __name__ == "__main__":
    main(int(sys.argv[1]))
