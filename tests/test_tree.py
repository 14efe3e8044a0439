"""The shape of the tree itself: what is installed, how long things are, what may not be written."""

import ast
import importlib.util
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
FOLDERS = {"gateway", "prefill_worker", "decode_worker", "kvtransfer", "kernels", "proto", "baton"}
SOURCES = sorted(
    path
    for folder in FOLDERS
    for path in (ROOT / folder).rglob("*.py")
    if not path.name.endswith(("_pb2.py", "_pb2_grpc.py"))
)


def test_every_package_folder_is_installed() -> None:
    mapping = PROJECT["tool"]["setuptools"]["package-dir"]
    installed = set()
    for package in PROJECT["tool"]["setuptools"]["packages"]:
        base = max((name for name in mapping if f"{package}.".startswith(f"{name}.")), key=len)
        rest = package[len(base) :].strip(".").replace(".", "/")
        installed.add((ROOT / mapping[base] / rest).resolve())
    found = {
        path.parent.resolve() for folder in FOLDERS for path in (ROOT / folder).rglob("__init__.py")
    }
    assert installed == found


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_files_and_functions_stay_small(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 450
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno is not None
            assert node.end_lineno - node.lineno < 80, f"{node.name} is too long"


def test_kernels_and_proto_never_become_top_level_packages() -> None:
    # Hugging Face ships a distribution called kernels, Google one called proto.
    assert not (ROOT / "kernels" / "__init__.py").exists()
    assert not (ROOT / "proto" / "__init__.py").exists()
    spec = importlib.util.find_spec("kernels")
    assert spec is None or not str(spec.origin).startswith(str(ROOT))


def test_transformers_loads_with_the_repository_on_the_path() -> None:
    code = "import sys; sys.path.insert(0, sys.argv[1]); from transformers import LlamaForCausalLM"
    subprocess.run([sys.executable, "-c", code, str(ROOT)], check=True, timeout=120)


def test_generated_protobuf_modules_are_fresh(tmp_path: Path) -> None:
    protos = sorted(str(p) for p in (ROOT / "proto/baton/v1").glob("*.proto"))
    command = [sys.executable, "-m", "grpc_tools.protoc", "-I", str(ROOT / "proto")]
    command += [f"--{kind}_out={tmp_path}" for kind in ("python", "pyi", "grpc_python")]
    subprocess.run(command + protos, check=True, timeout=60)
    generated = sorted((tmp_path / "baton/v1").iterdir())
    assert len(generated) == 9
    for path in generated:
        assert path.read_text() == (ROOT / "proto/baton/v1" / path.name).read_text(), path.name
