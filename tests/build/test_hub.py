"""The kernel of the Kernel Hub: its layout, and every variant loaded as the client loads it. Each load is a process."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LIBRARY = ROOT / "liif_fast" / "_C.abi3.so"
needs_library = pytest.mark.skipif(not LIBRARY.exists(), reason="the extension is not built in place")
# As `kernels` 0.17 imports a variant.
LOAD = """
import importlib.util, json
def load(variant):
    name = json.load(open(f"{variant}/metadata.json"))["id"]
    spec = importlib.util.spec_from_file_location(name, f"{variant}/__init__.py")
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
"""
CLIENT = """
from pathlib import Path
from kernels import get_local_kernel
def load(variant):
    return get_local_kernel(Path(variant).parents[1])
"""
USE = """
kernel = load(sys.argv[1])
torch.manual_seed(1)
feat, coord, cell = torch.rand(1, 3, 6, 5).requires_grad_(), torch.rand(1, 40, 2) * 2 - 1, torch.full((1, 40, 2), 0.1)
weights, biases = [torch.rand(16, 31), torch.rand(3, 16)], [torch.rand(16), torch.rand(3)]
def run(feat, **options):
    x, area_weight = kernel.gather(feat, coord, cell, **options)
    return kernel.query(feat, coord, cell, weights, biases, **options).sum() + x.sum() + area_weight.sum()
results = [run(feat), torch.compile(run, fullgraph=True, backend="aot_eager")(feat), run(feat, backend="reference")]
for mine in results[:2]:
    torch.testing.assert_close(mine, results[2])
grads = [torch.autograd.grad(result, feat)[0] for result in results]
for mine in grads[:2]:
    torch.testing.assert_close(mine, grads[2])
print(*[name for name, runs, _ in kernel.backends.report() if runs])
"""


@pytest.fixture(scope="module")
def hub():
    spec = importlib.util.spec_from_file_location("liif_fast_hub", ROOT / "scripts" / "hub.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def use(load, variant, first=""):
    """Run a variant in a process without the sources on its path, unless `first` imports them."""
    command = [sys.executable, "-W", "error::RuntimeWarning", "-c", f"import sys, torch\n{first}\n{load}\n{USE}"]
    return subprocess.run([*command, variant], cwd=variant.parent, capture_output=True, text=True, timeout=120)


WHEEL = f"sys.path.insert(0, {str(ROOT)!r}); import liif_fast; run_first = liif_fast.ops.gather"


@pytest.mark.prove
@pytest.mark.parametrize("first", ["", WHEEL], ids=["alone", "after-the-wheel"])
@pytest.mark.parametrize("name", ["torch-cpu", pytest.param("stable", marks=needs_library)])
def test_a_variant_runs_forward_backward_and_compiled(name, first, hub, tmp_path):
    variant = tmp_path / "build" / name
    hub.write_variant(variant, {"type": "cpu"}, LIBRARY.parent if name == "stable" else None)
    result = use(LOAD, variant, first)
    assert result.returncode == 0, result.stderr
    assert result.stdout == ("cpu torch reference\n" if name == "stable" else "torch reference\n")


def test_the_metadata_names_every_file_and_a_module_of_its_own(hub, tmp_path):
    variants = [tmp_path / "build" / f"torch-{backend}" for backend in ("cuda", "xpu")]
    for variant in variants:
        hub.write_variant(variant, {"type": variant.name[6:]}, None)
    cuda, xpu = (json.loads((variant / "metadata.json").read_text()) for variant in variants)
    assert cuda["id"].isidentifier() and cuda["id"].startswith("_liif_fast_cuda_") and cuda["id"] != xpu["id"]
    files = {path.relative_to(variants[0]).as_posix() for path in variants[0].rglob("*") if path.is_file()}
    assert files == {"metadata.json", *cuda["digest"]["files"]} and "ops/query.py" in files
    assert [hub.capability(arch) for arch in ("80", "90a", "120")] == ["8.0", "9.0a", "12.0"]


@pytest.mark.prove
def test_an_old_client_loads_a_variant_by_its_name(hub, tmp_path):
    variant = tmp_path / "build" / "torch-xpu"
    hub.write_variant(variant, {"type": "xpu"}, None)
    old_client = LOAD.replace("{variant}/__init__", "{variant}/liif_fast/__init__").replace('["id"]', '["name"]')
    old = use(old_client, variant)
    assert old.returncode == 0, old.stderr


# ---- the real client: `make prove` installs it -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def laid_out(hub, tmp_path_factory):
    """What `make hub` makes."""
    target = tmp_path_factory.mktemp("hub")
    hub.main(target)
    return target


@pytest.mark.prove
@pytest.mark.parametrize("first", ["", WHEEL], ids=["alone", "after-the-wheel"])
@pytest.mark.parametrize("variant", ["stable", "noarch"])
def test_the_client_loads_what_make_hub_makes(variant, first, laid_out, tmp_path):
    pytest.importorskip("kernels")
    (stable,) = laid_out.glob("build/torch-stable-abi211-cpu-*")
    client = CLIENT
    if variant == "noarch":  # the path of a variant itself: with all of them, the client prefers the extension's
        client = client.replace(".parents[1]", "")
    result = use(client, stable if variant == "stable" else laid_out / "build" / "torch-cpu", first)
    assert result.returncode == 0, result.stderr
    assert result.stdout == ("cpu torch reference\n" if variant == "stable" else "torch reference\n")


@pytest.mark.prove
def test_the_client_accepts_digests_and_symbols(laid_out):
    rust = pytest.importorskip("kernels._rust")
    checker = pytest.importorskip("kernel_abi_check")
    variants = sorted(laid_out.glob("build/*"))
    assert [v.name for v in variants if v.name.startswith("torch-c")] == ["torch-cpu", "torch-cuda"]
    for variant in variants:
        digest = rust.Metadata.read_from_file(variant / "metadata.json").digest
        digest.validate(rust.Digest.hash_variant(rust.DigestAlgorithm.SHA256, variant))
        for library in variant.rglob("*.so"):
            checked = checker.ObjectFile(library)
            system = "manylinux_2_28" if "-cpu-" in variant.name else "manylinux_2_34"
            assert checked.check_manylinux(system) == [] and checked.check_python_abi("3.9") == []
