"""Runs strict mypy, as a user of the package would, over the Python blocks of README.md and docs/.

    python -m tests.consumer             exit status 1 if a name or an argument is misspelt

Names that an example takes from the reader's program (`model`, `args`, ...) are declared as `Any`; the examples'
own functions need no annotations.
"""

import ast
import builtins
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# The examples have no annotations of their own, but the calls in them are checked.
OPTIONS = [
    "--strict",
    "--follow-imports=silent",
    "--allow-untyped-defs",
    "--allow-incomplete-defs",
    "--allow-untyped-decorators",
    "--allow-untyped-calls",
    "--allow-any-generics",
]
CONFIG = """[mypy]
ignore_missing_imports = true
[mypy-nvidia.*]
follow_imports = skip
follow_imports_for_stubs = true
"""


def blocks(page):
    """{number of the first line: text} of a page's Python blocks."""
    text = page.read_text()
    found = re.finditer(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    return {text[: match.start(1)].count("\n") + 1: match[1] for match in found}


def dedented(block):
    """A block, dedented if it is an excerpt of a longer program."""
    try:
        ast.parse(block)
    except IndentationError:
        block = re.sub(r"^    ", "", block, flags=re.MULTILINE)
    return block


def module(block):
    """A block as a module, in which free names are `Any`."""
    block = dedented(block)
    tree = ast.parse(block)
    names = [node for node in ast.walk(tree) if isinstance(node, ast.Name)]
    known = {name.id for name in names if isinstance(name.ctx, ast.Store)} | set(dir(builtins))
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            known.add(node.name)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            known |= {(alias.asname or alias.name).partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.arg):
            known.add(node.arg)
    free = sorted({name.id for name in names} - known)
    # On one line, to keep line numbers close to those of the page.
    return "import typing; " + "; ".join(f"{name}: typing.Any" for name in free) + "\n" + block


def check(pages):
    """(exit status, output) of mypy on the blocks of these pages."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "mypy.ini").write_text(CONFIG)
        files = []
        for page in pages:
            for line, block in blocks(page).items():
                files.append(Path(folder, f"{page.stem.lower()}_line_{line}.py"))
                files[-1].write_text(module(block))
        command = [sys.executable, "-m", "mypy", "--config-file", "mypy.ini", *OPTIONS, *(file.name for file in files)]
        done = subprocess.run(
            command, cwd=folder, env={"MYPYPATH": str(ROOT), "PATH": ""}, capture_output=True, text=True
        )
    return done.returncode, done.stdout + done.stderr


if __name__ == "__main__":
    status, output = check([ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))])
    print(output, end="")
    sys.exit(status)
