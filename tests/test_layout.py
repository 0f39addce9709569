"""The package is layered in floors: a module imports only from floors below its own, so no import is circular."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FLOORS = {
    "target": 0,
    "reference": 0,
    "checks": 0,
    "progress": 0,
    "mixing": 1,
    "dynamic": 3,
    "loss": 2,
    "fn": 2,
    "decoding": 2,
    "augment": 2,
    "data.storage": 3,
    "data.formats": 4,
    "data.index": 5,
    "data.order": 5,
    "data.sources": 6,
    "data.check": 7,
    "data.convert": 7,
    "loading.plan": 8,
    "loading.feed": 9,
    "loading.pipelines": 10,
    "loading.loader": 11,
    "cli": 12,
    "__main__": 13,
}
PROGRAMS = ("pipelines", "benchmarks", "experiments", "examples")
MODULES = [p for p in sorted((ROOT / "lumix_dali").rglob("*.py")) if p.name != "__init__.py"]
SCRIPTS = sorted(p for name in PROGRAMS for p in (ROOT / name).rglob("*.py"))
LONGEST = 60  # max lines of a function, without its docstring
# Its signature lists all options, which are only passed on.
LONG = {("loader.py", "create_loader")}


def lazy():
    """{public name of the package: its module}, as a type checker sees it."""
    text = (ROOT / "lumix_dali/__init__.py").read_text()
    found = re.findall(r"^    from \.([\w.]+) import (.+)$", text, re.MULTILINE)
    return {name: module for module, names in found for name in names.split(", ")}


def dotted(path):
    """A module's name within the package."""
    return ".".join(path.relative_to(ROOT / "lumix_dali").with_suffix("").parts)


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
            # `from package import name`: the name may be a module, or a public name defined in one
            yield from (f"{module}.{lazy().get(alias.name, alias.name)}" for alias in node.names)


def floor(name):
    """The floor of one of our modules; None for any other module (and for the package's `__version__`)."""
    package, _, rest = name.partition(".")
    if package in PROGRAMS:
        return max(FLOORS.values()) + 1
    parts = rest.split(".")
    found = [FLOORS[".".join(parts[:n])] for n in (1, 2) if ".".join(parts[:n]) in FLOORS]
    return found[0] if package == "lumix_dali" and found else None


@pytest.mark.parametrize("path", MODULES, ids=dotted)
def test_modules_import_only_from_lower_floors(path):
    assert dotted(path) in FLOORS, f"{path.name} has no floor yet: give it one here"
    for name in imports(path):
        below = floor(name)
        assert below is None or below < FLOORS[dotted(path)], f"{dotted(path)} imports {name}"


def test_floors_of_modules_and_names():
    """Names as `imports` returns them: of modules, of their contents and of the package's lazy names."""
    loader = FLOORS["loading.loader"]
    names = {
        "lumix_dali.loading.loader.Loader": loader,
        f"lumix_dali.{lazy()['create_loader']}": loader,
        "lumix_dali.data.formats.BadImage": FLOORS["data.formats"],
        "lumix_dali.fn": FLOORS["fn"],
        "lumix_dali.__version__": None,
        "numpy": None,
        "benchmarks.mix": max(FLOORS.values()) + 1,
    }
    assert {name: floor(name) for name in names} == names


def test_the_package_never_imports_the_programs():
    for path in (ROOT / "lumix_dali").rglob("*.py"):
        outside = {name.partition(".")[0] for name in imports(path)} & {*PROGRAMS, "tests"}
        assert not outside, f"{path.name} imports {outside}"


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda p: str(p.relative_to(ROOT)))
def test_programs_import_only_the_package_and_their_own(path):
    own = path.relative_to(ROOT).parts[0]
    others = {*PROGRAMS, "tests"} - {own}
    if own == "experiments":  # its results share the benchmarks' harness and figures
        others.remove("benchmarks")
    assert not {name.partition(".")[0] for name in imports(path)} & others


@pytest.mark.parametrize(
    ("module", "top_level_only", "allowed"),
    [
        ("reference", False, {"numpy"}),
        ("target", True, set()),
        ("checks", False, {"numpy"}),
        ("mixing", False, {"numpy", "lumix_dali"}),
    ],
)
def test_the_lowest_floors_need_nothing_else(module, top_level_only, allowed):
    names = imports(ROOT / "lumix_dali" / f"{module}.py", top_level_only)
    assert {name.partition(".")[0] for name in names} - sys.stdlib_module_names <= allowed


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


@pytest.mark.parametrize("path", [*MODULES, *SCRIPTS], ids=lambda p: str(p.relative_to(ROOT)))
def test_no_code_asks_which_order_it_has(path):
    """`Order` and `Window` have the same interface."""
    calls = (node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call))
    asked = [call for call in calls if isinstance(call.func, ast.Name) and call.func.id in ("isinstance", "type")]
    assert not [call.lineno for call in asked if re.search(r"\b(Order|Window)\b", ast.unparse(call))]


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
