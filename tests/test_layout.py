"""The layout keeps its floors: a module imports only from the floors below its own."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FLOORS = {
    "reference": 0, "target": 0, "formats": 0,
    "loss": 1, "fn": 1, "shards": 1, "augment": 1, "feed": 1,
    "sources": 2, "classification": 2,
    "loader": 3, "preflight": 3, "convert": 3,
    "__main__": 4,
    "pipelines": 5, "benchmarks": 5, "experiments": 6,
}
MODULES = [p for p in sorted((ROOT / "lumix_dali").glob("*.py")) if p.name != "__init__.py"]
FOLDERS = ("pipelines", "benchmarks", "experiments")
PROGRAMS = sorted(p for name in FOLDERS for p in (ROOT / name).rglob("*.py"))
LAZY = {"LUMixLoss": "loss", "check_target": "loss", "MixTarget": "target", "create_loader": "loader"}


def imports(path, top_level_only=False):
    """Every module `path` imports, by its absolute dotted name."""
    tree = ast.parse(path.read_text())
    package = ".".join(path.relative_to(ROOT).parent.parts)
    for node in tree.body if top_level_only else ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package.rsplit(".", node.level - 1)[0] if node.level > 1 else package
            module = ".".join(filter(None, [base if node.level else "", node.module]))
            # `from package import name`: the name may be a module, or a public name that lives in one
            yield from (f"{module}.{LAZY.get(alias.name, alias.name)}" for alias in node.names)


def floor(dotted):
    """The floor of one of our modules, or None for everybody else's (and for the package's `__version__`)."""
    package, _, rest = dotted.partition(".")
    if package == "lumix_dali":
        return FLOORS.get(rest.partition(".")[0])
    return FLOORS.get(package)


@pytest.mark.parametrize("path", MODULES, ids=lambda p: p.stem)
def test_imports_point_down(path):
    assert path.stem in FLOORS, f"{path.name} has no floor yet: give it one here and in the README's map"
    for name in imports(path):
        below = floor(name)
        assert below is None or below < FLOORS[path.stem], f"{path.name} imports {name}"


def test_the_package_never_imports_the_programs():
    for path in (ROOT / "lumix_dali").glob("*.py"):
        outside = {name.partition(".")[0] for name in imports(path)} & {*FOLDERS, "tests"}
        assert not outside, f"{path.name} imports {outside}"


@pytest.mark.parametrize("path", PROGRAMS, ids=lambda p: str(p.relative_to(ROOT)))
def test_programs_import_only_the_package_and_their_own(path):
    own = path.relative_to(ROOT).parts[0]
    others = {*FOLDERS, "tests"} - {own}
    if own == "experiments":  # its results are benchmarks' too: the harness, and the figures
        others.remove("benchmarks")
    assert not {name.partition(".")[0] for name in imports(path)} & others


@pytest.mark.parametrize(("module", "top_level_only", "allowed"), [
    ("reference", False, {"numpy"}), ("target", True, set()),
])
def test_ground_floor_needs_nothing_else(module, top_level_only, allowed):
    names = imports(ROOT / "lumix_dali" / f"{module}.py", top_level_only)
    assert {name.partition(".")[0] for name in names} - sys.stdlib_module_names <= allowed


@pytest.mark.parametrize(("module", "unwanted"), [
    ("lumix_dali", "torch"), ("lumix_dali", "nvidia.dali"), ("lumix_dali.loss", "nvidia.dali"),
    ("lumix_dali.target", "torch"), ("lumix_dali.target", "nvidia.dali"), ("lumix_dali.fn", "torch"),
])
def test_import_does_not_pull_in(module, unwanted):
    code = f"import sys, {module}; sys.exit('{unwanted}' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
