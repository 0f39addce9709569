"""The examples in the package's docstrings."""

import doctest
import importlib

import pytest
from test_layout import MODULES, dotted

EXAMPLES = [dotted(path) for path in MODULES if ">>> " in path.read_text()]


@pytest.mark.parametrize("module", EXAMPLES)
def test_examples(module):
    failed, tried = doctest.testmod(importlib.import_module(f"lumix_dali.{module}"), optionflags=doctest.ELLIPSIS)
    assert tried
    assert not failed
