"""docs/environment.md names every variable that the code reads; `make docs` has no warnings; links lead somewhere."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
SOURCES = [ROOT / "setup.py", *(ROOT / "liif_fast").rglob("*.py"), *(ROOT / "csrc").rglob("*.cpp")]
INTERNAL = {"LIIF_FAST_WITH_CUDA"}  # a macro of the C++ code


def documented(page: str) -> set[str]:
    rows = [line for line in (ROOT / "docs" / page).read_text().splitlines() if line.startswith("| `")]
    return {name for row in rows for name in re.findall(r"`([A-Z_]+)`", row.split("|")[1])}


def test_every_variable_is_documented():
    text = "\n".join(file.read_text() for file in SOURCES)
    own = set(re.findall(r"LIIF_FAST_[A-Z_]*[A-Z]", text)) - INTERNAL
    others = set(re.findall(r"environ(?:\.get\(|\[)[\"']([A-Z_]+)", text)) & {"CXX", "MAX_JOBS", "TORCH_CUDA_ARCH_LIST"}
    assert {"LIIF_FAST_BUILD", "LIIF_FAST_BACKEND", "LIIF_FAST_CPU_ISA"} <= own
    assert own | others <= documented("environment.md")


@pytest.mark.prove
def test_the_api_reference_has_no_warnings(tmp_path):
    pytest.importorskip("pdoc", reason="pdoc, of the extra docs, is not installed")
    makefile = (ROOT / "Makefile").read_text().replace("\\\n", " ")
    names = re.search(r"^API = (.*)$", makefile, re.M)[1]
    command = next(line for line in makefile.splitlines() if "-m pdoc" in line).replace("$(API)", names)
    words = [sys.executable, *shlex.split(command.replace("build/api", str(tmp_path)))[1:]]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "warning" not in done.stderr.lower()
    page = (tmp_path / "liif_fast" / "ops.html").read_text()
    assert all(f'id="{name}"' in page for name in ("query", "render", "gather", "ensemble"))


def test_forms_and_citation_are_yaml():
    for file in [*ROOT.glob(".github/**/*.yml"), ROOT / "CITATION.cff"]:
        assert yaml.safe_load(file.read_text()), file
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert f'version = "{citation["version"]}"' in (ROOT / "pyproject.toml").read_text()
    workflow = (ROOT / ".github" / "workflows" / "ci.yml").read_text()
    assert workflow.startswith("# not run") and ".ci/run" in workflow


def test_links_between_documents_exist():
    for document in [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")]:
        for link in re.findall(r"\]\(([^)#]+)[^)]*\)", document.read_text()):
            assert re.match(r"https?:", link) or (document.parent / link).exists(), f"{document.name}: {link}"
