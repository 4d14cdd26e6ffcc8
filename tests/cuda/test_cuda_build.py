"""The kernels of csrc/cuda as nvcc compiles them, without a GPU: registers, shared memory, spills and rounding."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import subprocess
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import pytest
import torch

from liif_fast.ops.backends import extension
from liif_fast.ops.namespace import NATIVE_NAMESPACE

ROOT = Path(__file__).resolve().parents[2]
# To compile for every architecture takes minutes. The tests of the bindings do not.
needs_nvcc = pytest.mark.prove
BUDGET = json.loads((ROOT / "tests" / "cuda" / "budget.json").read_text())
SOURCES = sorted((ROOT / "csrc" / "cuda").rglob("*.cu"))
ARCHS = ("LIIF_FAST_CUDA_ARCHS", "TORCH_CUDA_ARCH_LIST")  # variables that choose the architectures


class Usage(NamedTuple):
    """ptxas's report on one kernel for one architecture: the maximum over its instantiations."""

    registers: int  # per thread
    shared_bytes: int  # per block
    spill_bytes: int  # per thread: stores, loads and stack


@cache
def setup_py() -> ModuleType:
    """setup.py, which has the compiler flags, without its call of setup()."""
    spec = importlib.util.spec_from_file_location("liif_fast_setup_for_cuda", ROOT / "setup.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("setuptools.setup", lambda **_: None)
        for variable in ("LIIF_FAST_BUILD", "LIIF_FAST_SANITIZE", *ARCHS):
            patch.delenv(variable, raising=False)
        spec.loader.exec_module(module)
    return module


@cache
def toolkit():
    """The CUDA toolkit as setup.py finds it; skips with its reason."""
    module = setup_py()
    try:
        with pytest.MonkeyPatch.context() as patch:
            for variable in ARCHS:
                patch.delenv(variable, raising=False)
            return module.Toolkit.find()
    except module.BuildError as error:
        return pytest.skip(str(error))


@cache
def objects() -> Path:
    """The folder of the compiled sources: the build's if it has every architecture, or one made here."""
    module = setup_py()
    built = extension.build_facts().get("cuda_archs") == toolkit().archs
    folder = module.OBJECTS if built else Path("build", "cuda_reports")
    with module.locked(ROOT / folder):
        module.write_ninja(folder, toolkit())
        module.run_ninja(folder, "cuda")
    return ROOT / folder


def compiled_object(source: Path) -> Path:
    return objects() / f"{source.relative_to(ROOT / 'csrc')}.o"


@cache
def reports() -> dict[Path, str]:
    """ptxas's report on each source."""
    return {source: Path(f"{compiled_object(source)}.ptxas.txt").read_text() for source in SOURCES}


def kernel_name(mangled: str) -> str:
    """The part of a mangled name that ends in _kernel: a length, then that many characters."""
    found = [digits[2][: int(digits[1])] for digits in re.finditer(r"(?=(\d+)([a-z]\w*))", mangled)]
    if kernels := [name for name in found if name.endswith("_kernel")]:
        return min(kernels, key=len)  # digits of the hash of a file's path may look like a length too
    raise AssertionError(f"{mangled} is no kernel of ours: kernels' names end in _kernel")


@cache
def usages() -> dict[tuple[str, str], Usage]:
    """{(kernel, architecture): usage} of every kernel."""
    found: dict[tuple[str, str], Usage] = {}
    for report in reports().values():
        for part in report.split("Compiling entry function '")[1:]:
            mangled, arch = re.match(r"(\w+)' for 'sm_(\w+)'", part).groups()
            kernel = kernel_name(mangled)
            stack, stores, loads = map(
                int,
                re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", part).groups(),
            )
            shared = re.search(r"(\d+) bytes smem", part)
            registers = int(re.search(r"Used (\d+) registers", part).group(1))
            usage = Usage(registers, int(shared.group(1)) if shared else 0, stack + stores + loads)
            before = found.get((kernel, arch), usage)
            found[kernel, arch] = Usage(*map(max, zip(before, usage, strict=True)))
    return found


@needs_nvcc
def test_every_kernel_compiles_for_every_architecture_and_has_a_budget():
    archs = toolkit().archs
    assert set(usages()) == {(kernel, arch) for kernel in BUDGET for arch in (["90a"] if "hopper" in kernel else archs)}
    if toolkit().release.startswith("13."):
        assert toolkit().archs == list(setup_py().CUDA_ARCHS)


@needs_nvcc
@pytest.mark.parametrize("kernel", BUDGET)
def test_kernel_stays_within_its_budget(kernel):
    budget = Usage(**BUDGET[kernel])
    over = {
        f"sm_{arch}": usage
        for (name, arch), usage in usages().items()
        if name == kernel and any(used > allowed for used, allowed in zip(usage, budget, strict=True))
    }
    assert not over, f"{budget} allowed"


@needs_nvcc
def test_nvcc_gives_no_warning():
    assert set(reports()) == set(SOURCES)
    for source, report in reports().items():
        assert "warning" not in report.lower(), f"{source.name}: {report}"


@needs_nvcc
@pytest.mark.parametrize("contraction", [False, True], ids=["as-built", "with-contraction"])
def test_geometry_never_contracts_to_a_fused_multiply_add(contraction, tmp_path):
    """geometry.h rounds as on the CPU, even without setup.py's --fmad=false. The control kernel does contract then.

    One product of geometry.h may contract without the flag. It is exact: a corner's side, -1 or 1, times half a latent.
    """
    flags = [flag for flag in setup_py().NVCC_FLAGS if not (contraction and flag == "--fmad=false")]
    target = tmp_path / "probe.ptx"
    probe = ROOT / "tests" / "cuda" / "geometry_probe.cu"
    command = [toolkit().command[0], *flags, "-arch=compute_80", "-I", ROOT / "csrc", "-ptx", probe, "-o", target]
    subprocess.run(command, check=True)
    entries = target.read_text().split(".entry ")[1:]
    fused = {kernel_name(entry.split("(")[0]): [] for entry in entries}
    for entry in entries:
        fused[kernel_name(entry.split("(")[0])] += re.findall(r"\bfma\.[.\w]*f(?:32|64)\b", entry)
    assert len(entries) == 3
    expected = {"geometry_kernel": ["fma.rn.f64"] * 2, "control_kernel": ["fma.rn.f32"]}
    assert fused == (expected if contraction else {kernel: [] for kernel in expected})


needs_cuda_half = pytest.mark.skipif(
    not (extension.is_available() and hasattr(extension.OPS, "cuda_gather_backward")),
    reason="the extension is built without CUDA",
)


@needs_cuda_half
def test_bindings_refuse_cpu_tensors():
    """CPU tensors that bypass the dispatcher get an error. Otherwise a kernel would read a pointer to host memory."""
    cuda_only = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
    ops = extension.OPS
    feat, coord, weights = torch.rand(1, 3, 4, 5), torch.zeros(1, 2, 2), torch.rand(1, 2, 4)
    x, pred = torch.rand(1, 2, 4, 29), torch.rand(1, 2, 4, 3)
    metasr = [coord, coord, torch.rand(2, 3), torch.rand(2), [0, 0, 4, 5]]
    gather_grads = (x, weights, coord, 3, 4, 5, False, True, True, True, False)
    weight, rows = torch.rand(8, 8, 3, 3), torch.rand(32, 64).bfloat16()
    metasr_grads = (torch.rand(1, 2, 3), torch.rand(1, 4, 5, 9), *metasr, None, None)
    calls = {
        "feat must be a CUDA tensor": (ops.gather, feat, coord, None, True, True),
        "coord must be a CUDA tensor": (ops.cuda_gather_backward, *gather_grads),
        "pred must be a contiguous CUDA tensor": (ops.ensemble, pred, weights),
        "must be a contiguous CUDA tensor": (ops.ensemble_backward, pred[:, :, 0], pred, weights),
        "latent_map must be a CUDA tensor": (ops.metasr_query, torch.rand(1, 4, 5, 9), *metasr),
        "coord must be a CUDA tensor of 3": (ops.cuda_metasr_latents, *metasr[:2], metasr[-1], [1, 4, 5]),
        "latent_map must be a CUDA tensor of 4": (ops.cuda_metasr_query_backward, *metasr_grads),
        "map must be a CUDA tensor of 4": (ops.cuda_convolution, torch.rand(1, 4, 5, 8), weight, False, True),
        "latents must be a CUDA tensor of 2": (ops.cuda_kernel_grads, rows, rows, 7, 8, 8),
    }
    for message, (op, *arguments) in calls.items():
        with pytest.raises(RuntimeError, match=message):
            op.default.redispatch(cuda_only, *arguments)


@needs_cuda_half
def test_the_cuda_half_is_registered_for_the_device_and_carries_every_architecture():
    names = ["gather", "cuda_gather_backward", "ensemble", "ensemble_backward"]
    names += ["metasr_query", "cuda_metasr_latents", "cuda_metasr_query_backward"]
    names += ["cuda_convolution", "cuda_kernel_grads"]
    for name in names:
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"{NATIVE_NAMESPACE}::{name}", "CUDA")
    if shutil.which("nvcc") and (facts := extension.build_facts()).get("cuda_archs"):
        assert set(facts["cuda_archs"]) <= set(setup_py().CUDA_ARCHS)
