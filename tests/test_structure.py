"""The house: imports point one way, nothing heavy is imported by accident, files stay small."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:  # pragma: no cover
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("cli", "compiler", "models", "passes", "runtime", "smelt")

# What a package may import of ours; a longer name allows only that module and what is under it.
ALLOWED = {
    "runtime": ("smelt.runtime",),
    "models": ("smelt.models", "smelt.runtime"),
    "passes": (
        "smelt.passes",
        "smelt.runtime.ops",
        "smelt.runtime.kernels.gpu",  # its operators, and the layouts that they read
        "smelt.runtime.speculation",
        "smelt.runtime.batch",
        "smelt.runtime.errors",
    ),
    "compiler": ("smelt.compiler", "smelt.passes", "smelt.models", "smelt.runtime", "smelt"),
}
# Scripts that people run, which may use anything.
SCRIPTS = ("models/demo/",)

# Data of a package with the script that made it beside it.
DATA_FOLDERS = ("models/calibration",)

# Modules of torch without a promise, and who may use them: each has a test that it is still there.
PRIVATE = re.compile(
    r"torch\._(inductor|dynamo|guards|subclasses|C|higher_order_ops|functorch|prims_common|export)\b"
    r"|torch\.fx\.experimental\b|torch\.fx\.passes\b"
)
MAY_USE_PRIVATE = {
    "passes/rewrite.py",
    "passes/program.py",
    "compiler/lower.py",
    "compiler/manager.py",
    "compiler/api.py",
    "compiler/trace.py",
    "models/skeleton.py",
    "runtime/package.py",
}


def sources(*packages: str) -> list[Path]:
    return [path for package in packages for path in sorted((ROOT / package).rglob("*.py"))]


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """(line, absolute module) of every import; `from x import y` counts as x and as x.y."""
    package = path.relative_to(ROOT).parent.parts
    inside = package if package[0] == "smelt" else ("smelt", *package)
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            base = inside[: len(inside) - node.level + 1] if node.level else ()
            module = ".".join([*base, *([node.module] if node.module else [])])
            for alias in node.names:
                yield node.lineno, f"{module}.{alias.name}"


def under(name: str, prefix: str) -> bool:
    return name == prefix or name.startswith(prefix + ".")


@pytest.mark.parametrize("package", ALLOWED)
def test_imports_point_one_way(package: str) -> None:
    wrong = [
        f"{path.relative_to(ROOT)}:{line} imports {name}"
        for path in sources(package)
        if not str(path.relative_to(ROOT)).startswith(SCRIPTS)
        for line, name in imports(path)
        if under(name, "smelt") and not any(under(name, prefix) for prefix in ALLOWED[package])
    ]
    assert wrong == []


def test_the_folders_are_never_imported_bare() -> None:
    wrong = [
        f"{path.relative_to(ROOT)}:{line} imports {name}"
        for path in sources(*PACKAGES, "tests", "benchmarks")
        for line, name in imports(path)
        if name.split(".")[0] in PACKAGES and not under(name, "smelt")
    ]
    assert wrong == []


@pytest.mark.parametrize("package", [name for name in PACKAGES if name != "smelt"])
def test_a_bare_import_is_refused(package: str) -> None:
    code = f"import {package}"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode != 0
    assert f"ImportError: import this package as smelt.{package}" in done.stderr


def test_the_listed_packages_are_the_folders() -> None:
    listed = set(
        tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    )
    found = set()
    for init in [path for package in PACKAGES for path in (ROOT / package).rglob("__init__.py")]:
        parts = init.parent.relative_to(ROOT).parts
        found.add(".".join(parts if parts[0] == "smelt" else ("smelt", *parts)))
    assert listed == found


def test_every_folder_with_code_is_a_package_or_ships_as_data() -> None:
    for path in sources(*PACKAGES):
        folder = path.parent.relative_to(ROOT)
        known = str(folder) in DATA_FOLDERS or (path.parent / "__init__.py").is_file()
        assert known, f"{folder} has no __init__.py"


def test_no_file_is_longer_than_400_lines() -> None:
    long = {
        str(path.relative_to(ROOT)): count
        for path in sources(*PACKAGES, "tests")
        if (count := len(path.read_text(encoding="utf-8").splitlines())) > 400
    }
    assert long == {}


def test_private_interfaces_of_torch_stay_in_the_files_that_pin_them() -> None:
    wrong = []
    for path in sources(*PACKAGES):
        name = str(path.relative_to(ROOT))
        if name in MAY_USE_PRIVATE:
            continue
        wrong += [
            f"{name}:{line} imports {module}"
            for line, module in imports(path)
            if PRIVATE.search(module)
        ]
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute) and PRIVATE.search(text := ast.unparse(node)):
                wrong.append(f"{name}:{node.lineno} uses {text}")
    assert wrong == []


def modules_after(code: str) -> set[str]:
    done = subprocess.run(
        [sys.executable, "-c", f"{code}\nimport sys\nprint('\\n'.join(sys.modules))"],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


HEAVY = (
    "transformers",
    "xgrammar",
    "llguidance",
    "torch._inductor",
    "torch._dynamo",
    "smelt.compiler",
    "smelt.passes",
)


def test_the_runtime_imports_nothing_of_the_compiler() -> None:
    code = (
        "import smelt, smelt.runtime.artifact, smelt.runtime.package, smelt.runtime.ops\n"
        "import smelt.runtime.engine, smelt.runtime.llm\n"
        "smelt.load, smelt.SamplingParams, smelt.Engine"
    )
    loaded = modules_after(code)
    baseline = modules_after("import torch")
    found = {h for h in HEAVY for m in loaded - baseline if under(m, h)}
    assert found == set()
    assert "smelt.runtime.engine" in loaded


def test_importing_smelt_imports_nothing_else() -> None:
    assert "torch" not in modules_after("import smelt; smelt.__version__; dir(smelt)")


def test_every_public_name_is_there() -> None:
    import smelt

    for name in smelt.__all__:
        assert getattr(smelt, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = smelt.nothing
