"""The package as such: lazy names, what an import loads, the compiled modules, the metadata."""

from __future__ import annotations

import ast
import fnmatch
import importlib
import importlib.metadata
import os
import pkgutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement

import fxopt

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

PACKAGE = Path(fxopt.__file__).parent
ROOT = Path(__file__).resolve().parent.parent
BUILT = {".py", ".pyx", ".so", ".pyd"}
"""What needs no package data: modules, and what modules are compiled from and to."""
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


def project() -> dict[str, Any]:
    """What stands in pyproject.toml."""
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def package_files() -> list[str]:
    """Every file of the package, relative to it; links to folders are followed, as a build does."""
    walked = [(folder, names) for folder, _, names in os.walk(PACKAGE, followlinks=True) if "__pycache__" not in folder]
    return [Path(folder, name).relative_to(PACKAGE).as_posix() for folder, names in walked for name in names]


def imported_by(path: Path) -> set[str]:
    """Top-level names that a source file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module.partition(".")[0])
    return found


def requirements(lines: list[str]) -> dict[str, Requirement]:
    """Requirements by their normalized names."""
    found = [Requirement(line.partition("#")[0]) for line in lines if line.partition("#")[0].strip()]
    return {requirement.name.lower().replace("_", "-"): requirement for requirement in found}


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


def test_every_import_is_a_declared_dependency() -> None:
    metadata = project()["project"]
    extras = [line for extra in ("demo", "gym", "optuna") for line in metadata["optional-dependencies"][extra]]
    declared = set(requirements([*metadata["dependencies"], *extras]))
    names = {"sklearn": "scikit-learn"}
    sources = [PACKAGE / file for file in package_files() if file.endswith(".py")]
    imported = set().union(*(imported_by(source) for source in sources)) - sys.stdlib_module_names - {"fxopt"}
    assert {"torch", "numpy", "onnx"} <= imported
    assert {names.get(name, name).replace("_", "-") for name in imported} <= declared


def test_every_file_of_the_package_is_packed() -> None:
    patterns = [pattern.removeprefix("**/") for pattern in project()["tool"]["setuptools"]["package-data"]["*"]]
    data = [file for file in package_files() if Path(file).suffix not in BUILT]
    assert {"py.typed", "report/page.html", "targets/presets/pixel1.toml"} <= set(data)
    missed = [file for file in data if not any(fnmatch.fnmatch(Path(file).name, pattern) for pattern in patterns)]
    assert not missed


def test_every_folder_with_modules_is_a_package() -> None:
    folders = {(PACKAGE / file).parent for file in package_files() if file.endswith((".py", ".pyx"))}
    assert all((folder / "__init__.py").is_file() for folder in folders)


def test_no_build_leaves_sources_behind() -> None:
    assert [file for file in package_files() if file.endswith((".c", ".cpp"))] == []


def test_pinned_versions_are_within_the_ranges() -> None:
    pins = requirements((ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines())
    metadata = project()["project"]
    groups = [metadata["dependencies"], *metadata["optional-dependencies"].values()]
    ranges = requirements([line for group in groups for line in group if not line.startswith("fxopt")])
    pinned = {name: next(iter(pin.specifier)).version for name, pin in pins.items()}
    assert set(ranges) - set(pinned) == {"tomli"}  # for older Pythons than the pins are made for
    wrong = [name for name in ranges if name in pinned and not ranges[name].specifier.contains(pinned[name])]
    assert not wrong


def test_the_manifest_names_what_exists() -> None:
    lines = [line.split() for line in (ROOT / "MANIFEST.in").read_text(encoding="utf-8").splitlines()]
    named = [name for words in lines if words and words[0] in ("include", "graft") for name in words[1:]]
    assert {"fxopt", "tests", "LICENSE", "constraints.txt"} <= set(named)
    assert [name for name in named if not (ROOT / name).exists()] == []


def test_the_metadata_hold_the_license_and_no_tests() -> None:
    metadata = project()
    assert metadata["project"]["license-files"] == ["LICENSE"]
    assert (ROOT / "LICENSE").is_file()
    assert metadata["tool"]["setuptools"]["packages"]["find"]["include"] == ["fxopt", "fxopt.*"]
    assert not any(file.startswith(("tests/", "benchmarks/")) for file in package_files())
