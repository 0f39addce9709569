"""What modules need, and how long functions are; import-linter (pyproject.toml) checks who imports whom."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MODULES = [p for p in sorted((ROOT / "lumix_dali").rglob("*.py")) if p.name != "__init__.py"]
LONGEST = 60  # max lines of a function, without its docstring
# Its signature lists all options, which are only passed on.
LONG = {("loader.py", "create_loader")}


def dotted(path):
    """A module's name within the package."""
    return ".".join(path.relative_to(ROOT / "lumix_dali").with_suffix("").parts)


def imports(path, top_level_only=False):
    """The top-level package of every absolute import."""
    tree = ast.parse(path.read_text())
    for node in tree.body if top_level_only else ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield str(node.module).partition(".")[0]


@pytest.mark.parametrize(
    ("module", "top_level_only", "allowed"),
    [
        ("reference", False, {"numpy"}),
        ("target", True, set()),
        ("checks", False, {"numpy"}),
        ("mixing", False, {"numpy"}),
    ],
)
def test_the_lowest_floors_need_nothing_else(module, top_level_only, allowed):
    names = set(imports(ROOT / "lumix_dali" / f"{module}.py", top_level_only))
    assert names - sys.stdlib_module_names <= allowed


DALI, TORCH = "nvidia.dali", "torch"


@pytest.mark.parametrize(
    ("module", "unwanted"),
    [
        ("lumix_dali", (TORCH, DALI)),
        ("lumix_dali.loss", (DALI,)),
        ("lumix_dali.target", (TORCH, DALI)),
        ("lumix_dali.mixing", (TORCH, DALI)),
        ("lumix_dali.fn", (TORCH,)),
        ("lumix_dali.augment", (TORCH,)),
        ("lumix_dali.data.sources", (TORCH, DALI)),
        ("lumix_dali.loading.plan", (TORCH, DALI)),
    ],
)
def test_import_does_not_pull_in(module, unwanted):
    code = f"import sys, {module}; sys.exit(not sys.modules.keys().isdisjoint({unwanted!r}))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def functions(path):
    return (node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.FunctionDef))


def lines(function):
    """Lines of a function without its docstring."""
    first = function.body[0]
    documented = isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant)
    return function.end_lineno - function.lineno + 1 - documented * (first.end_lineno - first.lineno + 1)


@pytest.mark.parametrize("path", MODULES, ids=dotted)
def test_functions_can_be_read_without_scrolling(path):
    long = {
        f"{function.name}: {lines(function)} lines"
        for function in functions(path)
        if lines(function) > LONGEST and (path.name, function.name) not in LONG
    }
    assert not long


@pytest.fixture(scope="module")
def distribution():
    """The package's metadata, as setuptools reads it from pyproject.toml and setup.py."""
    from setuptools import distutils

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        return distutils.core.run_setup("setup.py", stop_after="config")


def test_the_wheel_has_every_package_and_the_typing_marker(distribution):
    folders = {".".join(path.parent.relative_to(ROOT).parts) for path in (ROOT / "lumix_dali").rglob("__init__.py")}
    assert set(distribution.packages) == folders >= {"lumix_dali", "lumix_dali.data", "lumix_dali.loading"}
    assert "py.typed" in distribution.package_data["lumix_dali"]
    assert (ROOT / "lumix_dali/py.typed").exists()


def test_the_package_page_has_no_dead_links(distribution):
    page = distribution.metadata.long_description
    assert "# lumix_dali" in page
    links = re.findall(r"\]\(([^)]*)\)", page)
    assert "https://arxiv.org/abs/2211.15846" in links
    assert [link for link in links if not link.startswith("https://")] == []


def test_the_version_matches_the_package(distribution):
    import lumix_dali

    assert distribution.metadata.version == lumix_dali.__version__
    assert f"\nversion: {lumix_dali.__version__}\n" in (ROOT / "CITATION.cff").read_text()


def test_the_command_prints_the_packages_version(distribution, capsys):
    from lumix_dali import cli

    with pytest.raises(SystemExit, match="0"):
        cli.main(["--version"])
    assert capsys.readouterr().out == f"lumix-dali {distribution.metadata.version}\n"


def test_plain_make_lists_every_target_and_runs_none(tmp_path):
    (tmp_path / "Makefile").write_text((ROOT / "Makefile").read_text())
    (targets,) = re.findall(r"^\.PHONY: (.*)", (ROOT / "Makefile").read_text(), re.MULTILINE)
    done = subprocess.run(["make"], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert re.findall(r"^  make (\S+)", done.stdout, re.MULTILINE) == targets.split()
    assert [path.name for path in tmp_path.iterdir()] == ["Makefile"]
