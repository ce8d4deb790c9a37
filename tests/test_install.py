"""What an installation promises: a light import, pins for everything, and the build of torch said beforehand."""

import importlib.metadata as metadata
import importlib.util
import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parent.parent
HEAVY = ("rich", "jinja2", "gguf", "transformers", "trl", "datasets", "tensorboard")
EXTRAS = ("dev", "peers", "tasks", "tensorboard")


def test_importing_rung_loads_no_heavy_package_and_does_nothing_else():
    code = "import sys, rung; print(*sorted({name.split('.')[0] for name in sys.modules}))"
    answer = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=True)
    loaded = answer.stdout.split()
    assert "rung" in loaded
    assert not set(HEAVY) & set(loaded)
    assert answer.stderr == ""


def test_a_grading_child_can_import_the_words_without_torch():
    code = "import sys, rung.core.words; print('torch' in sys.modules)"
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == "False"


def test_every_package_that_rung_can_bring_is_pinned_at_the_version_tested():
    pins = _pins()
    if metadata.version("torch").split("+")[0] != pins["torch"]:
        pytest.skip("this machine's own torch is in use, and then nothing is pinned beside it")
    reached = _closure("rung", EXTRAS)
    assert {"torch", "tokenizers", "pytest", "trl"} <= set(reached), "the walk misses what pyproject.toml asks for"
    assert {name: pins.get(name) for name in reached} == reached


def test_pins_are_plain_names_and_versions():
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+==[0-9][A-Za-z0-9.]*", line) for line in _lines())


@pytest.mark.parametrize(
    ("needs", "said"),
    [(["sympy", "filelock"], "CPU build"), (["nvidia-cudnn-cu13==9.20", "sympy"], "CUDA build")],
)
def test_the_build_and_size_of_torch_are_told_from_what_pip_reports(tmp_path, needs, said):
    wheel = tmp_path / "torch-2.13.0+any.whl"
    wheel.write_bytes(bytes(3_000_000))
    install = {
        "metadata": {"version": "2.13.0+any", "requires_dist": needs},
        "download_info": {"url": wheel.as_uri()},
    }
    line = _which_torch().describe(install)
    assert line.startswith(f"torch 2.13.0, {said}: 3 MB")


@pytest.mark.parametrize(
    ("version", "kept"), [("2.11.0+cu130", True), ("2.14.1+rocm7.0", True), ("2.13.0", True), ("2.10.1+cu128", False)]
)
def test_a_torch_that_the_machine_has_is_replaced_only_where_it_is_too_old(tmp_path, version, kept):
    """What `pip install .` does about its requirements, of a Python that has this torch; no index is asked."""
    (tmp_path / f"torch-{version}.dist-info").mkdir()
    (tmp_path / f"torch-{version}.dist-info" / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: torch\nVersion: {version}\n"
    )
    needs = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--quiet", "--no-index", "--dry-run"]
    environment = os.environ | {"PYTHONPATH": str(tmp_path), "PIP_CONFIG_FILE": os.devnull, "PIP_FIND_LINKS": ""}
    asked = subprocess.run([*pip, "--report", "-", *needs], capture_output=True, text=True, env=environment)
    if kept:
        assert asked.returncode == 0, asked.stderr
        assert json.loads(asked.stdout)["install"] == []
    else:
        assert "No matching distribution found for torch>=2.11" in asked.stderr


def _lines() -> list[str]:
    return (ROOT / "constraints.txt").read_text().splitlines()


def _pins() -> dict[str, str]:
    return {canonicalize_name(name): version for name, version in (line.split("==") for line in _lines())}


def _closure(root: str, extras: tuple[str, ...]) -> dict[str, str]:
    """Version of every distribution that `root[extras]` brings on this machine, by canonical name."""
    found: dict[str, str] = {}
    todo = [(root, extras)]
    while todo:
        name, wanted = todo.pop()
        for text in metadata.requires(name) or []:
            need = Requirement(text)
            if need.marker and not any(need.marker.evaluate({"extra": extra}) for extra in ("", *wanted)):
                continue
            child = canonicalize_name(need.name)
            if child not in found:
                found[child] = metadata.version(child).split("+")[0]
                todo.append((child, tuple(need.extras)))
    return found


def _which_torch():
    spec = importlib.util.spec_from_file_location("which_torch", ROOT / ".ci" / "which_torch.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
