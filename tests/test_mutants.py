"""Every fault of `tests.mutants` still applies, and the tests that must catch it exist."""

import ast
from functools import cache

import pytest

from tests.mutants import MUTANTS, ROOT, line_of


@cache
def functions(file):
    return {node.name for node in ast.walk(ast.parse((ROOT / file).read_text())) if isinstance(node, ast.FunctionDef)}


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.fault)
def test_a_fault_applies(mutant):
    assert line_of(mutant) > 0
    assert mutant.new != mutant.old
    for test in mutant.tests.split():
        file, _, name = test.partition("::")
        assert not name or name in functions(file), f"no such test: {test}"
