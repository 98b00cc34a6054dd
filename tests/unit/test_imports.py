"""Who may import whom, read from the sources themselves."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from core_rows import ROOT

CORE = (
    "spec",
    "arguments",
    "problem",
    "capability",
    "manifest",
    "selection",
    "heuristics",
    "errors",
    "environment",
    "families",
    "gates",
    "coverage",
    "evidence",
    "homes",
    "plan",
    "sources",
    "survey",
    "unsupported",
    "timings",
)
EXTRAS = {"homes": ("platformdirs",)}  # needed where there is neither a checkout nor PA_OPS_HOME
DOORS = {"cli.py", "jit.py", "selecting.py"}  # the modules of pa_ops that may reach the generator
COMPILERS = {"worker.py"}  # the modules of the generator that may reach the kernel compiler and what it compiles


def python_files(folder: str) -> list[Path]:
    files = sorted((ROOT / folder).rglob("*.py"))
    assert files, f"{folder}/ has no Python files"
    return files


def imports(path: Path, *, top_level: bool = False) -> Iterator[str]:
    """Dotted names that a file imports, relative ones resolved; `top_level`: only those outside functions."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    package = list(path.relative_to(ROOT).parts[:-1])
    if package[0] in ("generator", "templates"):
        package.insert(0, "pa_ops")
    functions = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)]
    deferred = {id(inner) for function in functions for inner in ast.walk(function)}
    for node in ast.walk(tree):
        if top_level and id(node) in deferred:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            start = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*start, *([node.module] if node.module else [])])
            yield from (f"{module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in ("import_module", "__import__"):
            yield from (a.value for a in node.args if isinstance(a, ast.Constant) and isinstance(a.value, str))


def reaches(name: str, *modules: str) -> bool:
    return any(name == module or name.startswith(module + ".") for module in modules)


@pytest.mark.parametrize("module", CORE)
def test_core_imports_the_standard_library_and_core_only(module: str) -> None:
    allowed = (*(f"pa_ops.{name}" for name in CORE), *EXTRAS.get(module, ()))
    for name in imports(ROOT / "pa_ops" / f"{module}.py"):
        assert reaches(name, *allowed, *sys.stdlib_module_names), f"{module}.py imports {name}"


@pytest.mark.parametrize("path", python_files("pa_ops"), ids=lambda path: path.name)
def test_edge_reaches_the_generator_through_its_doors_only(path: Path) -> None:
    for name in imports(path):
        assert not reaches(name, "pa_ops.templates", "templates", "jinja2", "cutlass"), f"{path.name} imports {name}"
        if path.name not in DOORS:
            assert not reaches(name, "pa_ops.generator", "generator"), f"{path.name} imports {name}"


@pytest.mark.parametrize("path", python_files("generator"), ids=lambda path: path.name)
def test_generator_never_imports_torch_or_the_edge(path: Path) -> None:
    core = tuple(f"pa_ops.{name}" for name in CORE)
    for name in imports(path):
        assert not reaches(name, "torch", "tvm_ffi", "numpy"), f"{path.name} imports {name}"
        if reaches(name, "cutlass", "pa_ops.templates"):
            assert path.name in COMPILERS, f"{path.name} imports {name}"
        elif reaches(name, "pa_ops"):
            assert reaches(name, "pa_ops.generator", *core), f"{path.name} imports {name}"


@pytest.mark.parametrize("path", python_files("templates"), ids=lambda path: path.name)
def test_device_modules_import_the_dsl_and_each_other_only(path: Path) -> None:
    for name in imports(path):
        assert reaches(name, "cutlass", "pa_ops.templates.device", *sys.stdlib_module_names), (
            f"{path.name} imports {name}"
        )


@pytest.mark.parametrize("path", python_files("pa_ops"), ids=lambda path: path.name)
def test_optional_packages_are_imported_where_they_are_used(path: Path) -> None:
    for name in imports(path, top_level=True):
        assert not reaches(name, "platformdirs"), f"{path.name} imports {name} when it is imported"


def test_the_reader_of_imports_sees_them_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    path = tmp_path / "generator" / "part.py"
    path.parent.mkdir()
    path.write_text(
        "import torch.nn\nfrom . import matrix\nfrom .targets import resolve\n"
        "def late():\n    from cutlass import cute\n    import_module('pa_ops.ops')\n",
        encoding="utf-8",
    )
    outside = {"torch.nn", "pa_ops.generator.matrix", "pa_ops.generator.targets.resolve"}
    assert set(imports(path, top_level=True)) == outside
    assert set(imports(path)) == outside | {"cutlass.cute", "pa_ops.ops"}
