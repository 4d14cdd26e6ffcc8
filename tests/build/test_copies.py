"""Copies of the extension and of the package in one process. Each test is a child process: a failure may be a crash."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LIBRARY = ROOT / "liif_fast" / "_C.abi3.so"
pytestmark = pytest.mark.skipif(not LIBRARY.exists(), reason="the extension is not built in place")
# Forward and backward through a package's ops.
RUN = """
def run(ops):
    torch.manual_seed(1)
    feat, coord, cell = torch.rand(1, 3, 6, 5).requires_grad_(), torch.rand(1, 40, 2), torch.full((1, 40, 2), 0.1)
    weights, biases = [torch.rand(16, 31), torch.rand(3, 16)], [torch.rand(16), torch.rand(3)]
    out = ops.query(feat, coord, cell, weights, biases, backend="cpu")
    x, _ = ops.gather(feat, coord, cell, backend="cpu")
    return out, *torch.autograd.grad(out.sum() + x.sum(), [feat])
"""


def child(script, *arguments, **options):
    command = [sys.executable, "-W", "ignore::UserWarning", "-c", f"import sys, torch\n{RUN}\n{script}", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, **options)


@pytest.mark.prove
def test_a_second_file_under_a_taken_name_is_refused_and_runs_under_another(tmp_path):
    copy = shutil.copy(LIBRARY, tmp_path / "copy.so")
    script = """
import ctypes
import liif_fast
def register(file, name):
    function = ctypes.CDLL(file).liif_fast_register
    function.restype = ctypes.c_char_p
    return function(name)
first, second = str(liif_fast.ops.backends.extension.path()), sys.argv[1]
assert register(first, b"liif_fast_C") is None, "the same file again changes nothing"
print(register(second, b"liif_fast_C").decode())
assert register(second, b"other_C") is None and register(second, b"other_C") is None
assert register(first, b"third_C") is None, "one file serves two names"
for ops in (torch.ops.liif_fast_C, torch.ops.other_C, torch.ops.third_C):
    print(ops.cpu_isa(), ops.ensemble(torch.ones(1, 2, 4, 3), torch.full((1, 2, 4), 0.25)).sum().item())
run(liif_fast.ops)
"""
    result = child(script, copy)
    assert result.returncode == 0, result.stderr
    refusal, *ran = result.stdout.splitlines()
    assert refusal == "another copy of the extension has registered torch.ops.liif_fast_C in this process"
    assert len(ran) == 3 and len(set(ran)) == 1 and ran[0].endswith(" 6.0") and result.stderr == ""


@pytest.mark.prove
def test_another_extension_after_an_import_is_one_warning(tmp_path):
    copy = shutil.copy(LIBRARY, tmp_path / "copy.so")
    script = """
import os, warnings
import liif_fast
for name in [name for name in sys.modules if name.split(".")[0] == "liif_fast"]:
    del sys.modules[name]
os.environ["LIIF_FAST_EXTENSION"] = sys.argv[1]
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import liif_fast
print(*[one.message for one in caught if "liif_fast" in str(one.message)], sep="\\n")
print(liif_fast.ops.gather(torch.rand(1, 3, 4, 5), torch.zeros(1, 2, 2))[0].shape)
"""
    result = child(script, copy)
    assert result.returncode == 0, result.stderr
    warning, shape = result.stdout.splitlines()
    assert f"{copy} cannot be used: another copy of the extension has registered torch.ops.liif_fast_C" in warning
    assert shape == "torch.Size([1, 2, 4, 29])"


@pytest.mark.prove
@pytest.mark.parametrize("name", ["renamed", "host.vendor.liif_fast"])
def test_a_copy_of_the_package_under_another_name_runs_beside_it(name, tmp_path):
    """The copy is `ops` and the extension alone, as a kernel of the Hub has them."""
    folder = tmp_path.joinpath(*name.split("."))
    shutil.copytree(ROOT / "liif_fast" / "ops", folder / "ops", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(LIBRARY, folder)
    script = """
import importlib
sys.path.append(sys.argv[1])
ours = importlib.import_module("liif_fast.ops")
copy = importlib.import_module(f"{sys.argv[2]}.ops")
space = sys.argv[2].replace(".", "_")
assert copy.namespace.NAMESPACE == space and copy.backends.extension.path().parent.parts[-1] in sys.argv[2]
assert copy.backends.extension.is_available(), copy.backends.extension.reason()
assert copy.backends.cpu._C is getattr(torch.ops, f"{space}_C") is not ours.backends.cpu._C
for mine, theirs in zip(run(ours), run(copy)):
    assert torch.equal(mine, theirs)
assert type(run(copy)[0].grad_fn) is not None and hasattr(getattr(torch.ops, space), "decode")
compiled = torch.compile(lambda x, c: copy.gather(x, c)[0].sum(), fullgraph=True, backend="aot_eager")
x, c = torch.rand(1, 3, 4, 5), torch.zeros(1, 2, 2)
torch.testing.assert_close(compiled(x, c), ours.gather(x, c)[0].sum())
"""
    result = child(script, str(tmp_path), name)
    assert result.returncode == 0, result.stderr
