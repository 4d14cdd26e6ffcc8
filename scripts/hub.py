"""Lays out the ops as a kernel of the Kernel Hub: `python scripts/hub.py dist/hub`, or `make hub`.

Every folder of build/ is one variant. `kernels` imports the variant that fits the installed torch, under a name that no
other variant has; the namespaces of the ops follow from that name. The stable-ABI variants have the compiled extension,
the noarch variants Python and Triton alone. Format: https://huggingface.co/docs/kernels, "Kernel requirements".
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
STABLE_ABI = "torch-stable-abi211"  # the oldest torch, as in setup.py
NOARCH = ("cpu", "cuda", "rocm", "xpu")
VERSION = 0  # of the kernel's interface; 0 promises nothing yet

INIT = '''"""The ops of liif_fast: LIIF's gather, ensemble and whole decode, for CPUs and GPUs."""

from .ops import backends, ensemble, fold, gather, metasr_fold, metasr_query, query, reference, render

__all__ = ["backends", "ensemble", "fold", "gather", "metasr_fold", "metasr_query", "query", "reference", "render"]
'''
# Old versions of `kernels` import the package from a folder with the kernel's name.
COMPATIBLE_INIT = """import importlib.util
import sys
from pathlib import Path

if "{id}" not in sys.modules:
    _spec = importlib.util.spec_from_file_location("{id}", Path(__file__).parents[1] / "__init__.py")
    sys.modules["{id}"] = importlib.util.module_from_spec(_spec)
    _spec.loader.exec_module(sys.modules["{id}"])
globals().update({{name: value for name, value in vars(sys.modules["{id}"]).items() if not name.startswith("__")}})
"""
CARD = """---
license: bsd-3-clause
tags:
- kernels
---

# liif-fast

The ops of [LIIF](https://arxiv.org/abs/2012.09161) (arbitrary-scale super-resolution) as fused kernels, differentiable:
`gather`, `ensemble`, `query`, `render`, `metasr_query`, `fold`. The CUDA and Triton kernels have not yet run on a GPU.

```python
from pathlib import Path

import torch
from kernels import get_local_kernel

ops = get_local_kernel(Path("."))
x, area_weight = ops.gather(torch.rand(1, 64, 48, 48), torch.zeros(1, 10, 2))
```
"""


def compile_extension(mode: str, folder: Path) -> dict:
    """Compile into folder/liif_fast; returns the facts of _build.json."""
    command = [sys.executable, "setup.py", "-q", "build_ext", "--build-lib", str(folder)]
    if subprocess.run(command, cwd=ROOT, env={**os.environ, "LIIF_FAST_BUILD": mode}, check=False).returncode:
        sys.exit(f"error: the {mode} variant could not be compiled; the reason is above")
    return json.loads((folder / "liif_fast" / "_build.json").read_text())


def capability(arch: str) -> str:
    """An architecture of nvcc's as a capability: 90a -> 9.0a."""
    return re.sub(r"(\d+)(\d)([af]?)", r"\1.\2\3", arch)


def hashes(variant: Path) -> dict[str, str]:
    """The base64 SHA-256 of every file but metadata.json."""
    files = sorted(path for path in variant.rglob("*") if path.is_file() and path.name != "metadata.json")
    return {
        path.relative_to(variant).as_posix(): base64.b64encode(hashlib.sha256(path.read_bytes()).digest()).decode()
        for path in files
    }


def write_variant(variant: Path, backend: dict, extension: Path | None) -> None:
    """One folder of build/: the ops, the extension where there is one, and metadata.json."""
    shutil.copytree(ROOT / "liif_fast" / "ops", variant / "ops", ignore=shutil.ignore_patterns("__pycache__"))
    (variant / "__init__.py").write_text(INIT)
    if extension is None:
        (variant / "_build.json").write_text(json.dumps({"noarch": True}) + "\n")
    else:
        for name in ("_C.abi3.so", "_build.json"):
            shutil.copyfile(extension / name, variant / name)
    content = hashlib.sha256(json.dumps([backend, hashes(variant)]).encode()).hexdigest()
    name = f"_liif_fast_{backend['type']}_{content[:10]}"
    (variant / "liif_fast").mkdir()
    (variant / "liif_fast" / "__init__.py").write_text(COMPATIBLE_INIT.format(id=name))
    metadata = {
        "id": name,
        "name": "liif-fast",
        "version": VERSION,
        "license": "BSD-3-Clause",
        "python-depends": [],
        "backend": backend,
        "digest": {"algorithm": "sha256", "files": hashes(variant)},
    }
    (variant / "metadata.json").write_text(json.dumps(metadata, indent=2) + "\n")
    size = sum(path.stat().st_size for path in variant.rglob("*") if path.is_file())
    print(f"{variant.name}: {size / 1e6:.2f} MB, module {name}")


def main(target: Path) -> None:
    shutil.rmtree(target, ignore_errors=True)
    variants = target / "build"
    system = f"{platform.machine()}-linux"
    has_nvcc = shutil.which("nvcc") or any(name in os.environ for name in ("CUDA_HOME", "CUDA_PATH"))
    for mode in ("cpu", "cuda") if has_nvcc else ("cpu",):
        compiled = ROOT / "build" / "hub" / mode
        facts = compile_extension(mode, compiled)
        backend, tag = {"type": mode}, mode
        if mode == "cuda":
            tag = f"cu{facts['cuda'].replace('.', '')}"
            backend["archs"] = [capability(arch) for arch in facts["cuda_archs"]]
            backend["archs"] += [f"{capability(arch)}+PTX" for arch in facts["cuda_ptx"]]
        write_variant(variants / f"{STABLE_ABI}-{tag}-{system}", backend, compiled / "liif_fast")
    for backend in NOARCH:
        write_variant(variants / f"torch-{backend}", {"type": backend}, None)
    if not has_nvcc:
        print("no cuda variant: there is no nvcc on PATH and no CUDA_HOME")
    (target / "README.md").write_text(CARD)
    shutil.copyfile(ROOT / "LICENSE", target / "LICENSE")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
