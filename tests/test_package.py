"""The package as such: lazy names, what an import loads, the compiled modules, the metadata."""

from __future__ import annotations

import ast
import importlib
import importlib.metadata
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

import fxopt

PACKAGE = Path(fxopt.__file__).parent
HEAVY = ("torch", "onnx", "onnxruntime", "onnxscript", "sklearn", "matplotlib")


def modules_loaded_by(statement: str) -> set[str]:
    """Top-level names in ``sys.modules`` of a fresh interpreter after ``statement``."""
    code = f"{statement}\nimport sys\nprint(*sorted({{name.partition('.')[0] for name in sys.modules}}))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    return set(run.stdout.splitlines()[-1].split())


def lazy_names_for_type_checkers() -> set[str]:
    """The names that ``fxopt/__init__.py`` imports under TYPE_CHECKING."""
    tree = ast.parse((PACKAGE / "__init__.py").read_text(encoding="utf-8"))
    block = next(node for node in tree.body if isinstance(node, ast.If))
    return {alias.asname for node in block.body if isinstance(node, ast.ImportFrom) for alias in node.names}


def subpackages() -> list[str]:
    """The public packages right below fxopt."""
    packages = [info.name for info in pkgutil.iter_modules([str(PACKAGE)]) if info.ispkg]
    return sorted(f"fxopt.{name}" for name in packages if not name.startswith("_"))


def test_importing_the_package_loads_nothing_else() -> None:
    assert modules_loaded_by("import fxopt").isdisjoint({*HEAVY, "numpy", "scipy", "networkx", "rich", "typer"})


@pytest.mark.parametrize("module", ["fxopt.errors", "fxopt.decisions", "fxopt.targets", "fxopt.search"])
def test_layers_without_torch_load_no_torch(module: str) -> None:
    assert modules_loaded_by(f"import {module}").isdisjoint(HEAVY)


def test_loading_a_target_loads_no_torch() -> None:
    statement = "import fxopt.targets as targets\nfor name in ('pixel1', 'v100'): targets.load(name)"
    assert modules_loaded_by(statement).isdisjoint(HEAVY)


def test_the_check_would_notice_a_heavy_import() -> None:
    assert "numpy" in modules_loaded_by("import numpy")


@pytest.mark.parametrize("name", sorted(set(fxopt.__all__) - {"__version__"}))
def test_every_public_name_resolves(name: str) -> None:
    value = getattr(fxopt, name)
    assert value.__name__ == name
    assert value.__doc__, f"fxopt.{name} has no docstring"


def test_type_checkers_see_the_lazy_names() -> None:
    assert lazy_names_for_type_checkers() == set(fxopt.__all__) - {"__version__"}
    assert sorted(fxopt.__all__) == dir(fxopt)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="'fxopt' has no attribute 'optimise'"):
        _ = fxopt.optimise


@pytest.mark.parametrize("name", subpackages())
def test_what_a_package_exports_exists(name: str) -> None:
    module = importlib.import_module(name)
    missing = [export for export in module.__all__ if not hasattr(module, export)]
    assert not missing


def test_the_layout_has_every_subpackage() -> None:
    assert {"fxopt.export", "fxopt.graph", "fxopt.passes", "fxopt.search", "fxopt.targets"} <= set(subpackages())


def test_every_compiled_module_has_a_stub_and_loads() -> None:
    compiled = sorted((PACKAGE / "targets").rglob("*.pyx"))
    assert compiled
    for source in compiled:
        assert source.with_suffix(".pyi").is_file(), f"{source.name} has no stub"
        relative = source.relative_to(PACKAGE).with_suffix("")
        module = importlib.import_module(".".join(("fxopt", *relative.parts)))
        assert Path(module.__file__ or "").suffix in {".so", ".pyd"}


def test_the_package_is_marked_as_typed() -> None:
    assert (PACKAGE / "py.typed").is_file()


def test_the_metadata_name_the_version_and_the_command() -> None:
    assert importlib.metadata.version("fxopt") == fxopt.__version__
    (command,) = importlib.metadata.entry_points(group="console_scripts", name="fxopt")
    assert command.value == "fxopt.cli:main"
    assert callable(command.load())
