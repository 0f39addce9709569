"""timm's flags: the table matches the program and has every flag of timm's own parser."""

import ast
import os
import urllib.error
import urllib.request
from pathlib import Path

import pytest
import timm

from pipelines import command, timm_flags
from pipelines.flags import ALIASES, build_parser, parse_args

PAGE = Path(__file__).parents[1] / "docs" / "timm_flags.md"
SOURCE = "https://raw.githubusercontent.com/huggingface/pytorch-image-models/v{}/train.py"


def train_py():
    """timm's train.py, which its package lacks: the file that TIMM_TRAIN names, or that of the installed release."""
    if path := os.environ.get("TIMM_TRAIN"):
        return Path(path).read_text()
    try:
        with urllib.request.urlopen(SOURCE.format(timm.__version__), timeout=5) as answer:
            return answer.read().decode()
    except (urllib.error.URLError, TimeoutError) as error:
        pytest.skip(f"timm's train.py cannot be fetched: {error}")


def flags_of(source):
    """{dest: default} of every `add_argument` in a program's source."""
    found = {}
    for call in ast.walk(ast.parse(source)):
        if isinstance(call, ast.Call) and getattr(call.func, "attr", "") == "add_argument":
            names = [ast.literal_eval(name) for name in call.args]
            options = {option.arg: option.value for option in call.keywords}
            long = next((name for name in names if name.startswith("--")), names[0])
            dest = ast.literal_eval(options["dest"]) if "dest" in options else long.lstrip("-").replace("-", "_")
            is_switch = "action" in options and getattr(options["action"], "value", "") == "store_true"
            default = options.get("default", ast.Constant(False if is_switch else None))
            found[dest] = value_of(default)
    return found


def value_of(node):
    """Like `ast.literal_eval`, with fractions; nothing in a downloaded file is executed."""
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Div):
        return value_of(node.left) / value_of(node.right)
    return [value_of(each) for each in node.elts] if isinstance(node, ast.List) else ast.literal_eval(node)


def test_the_page_is_made_from_the_tables():
    how = "python -m pipelines.flags > docs/timm_flags.md"
    assert PAGE.read_text() == timm_flags.table(build_parser()), how


def test_every_timm_flag_is_in_a_table():
    theirs = flags_of(train_py())
    ours = {action.dest: action.default for action in build_parser()._actions}
    built = ours.keys() - timm_flags.FOREIGN.keys()
    known = ours.keys() | ALIASES
    assert sorted(theirs.keys() - known) == []
    assert sorted(timm_flags.OWN & theirs.keys()) == []
    assert timm_flags.FOREIGN.keys() >= {dest for dest in theirs if dest in timm_flags.FOREIGN}
    different = {dest for dest in built & theirs.keys() if not same(ours[dest], theirs[dest])}
    assert different - {"decay_epochs"} == timm_flags.DIFFERENT.keys() - {"decay_epochs"}
    tables = timm_flags.FOREIGN | timm_flags.DIFFERENT
    assert [dest for dest, flag in tables.items() if dest in theirs and not same(flag.default, theirs[dest])] == []


def same(first, second):
    def plain(value):
        return tuple(value) if isinstance(value, list | tuple) else value or None

    return plain(first) == plain(second)


@pytest.mark.parametrize("dest", timm_flags.WITHOUT_EFFECT)
def test_without_effect(dest, capsys):
    """Each is reported once, and left out of the parsed arguments."""
    flag = timm_flags.WITHOUT_EFFECT[dest]
    given = [command.name(dest), *([] if flag.default is False else ["7"])]
    assert vars(parse_args(["x", *given])) == vars(parse_args(["x"]))
    assert f"{command.name(dest)} has no effect here: {flag.why}\n" == capsys.readouterr().err


@pytest.mark.parametrize("dest", timm_flags.REFUSED)
def test_refused(dest, capsys):
    """Unless it has timm's default, as in a timm config."""
    flag, name = timm_flags.REFUSED[dest], command.name(dest)
    if flag.default not in (False, None, ""):
        default = flag.default if isinstance(flag.default, list) else [flag.default]
        assert vars(parse_args(["x", name, *map(str, default)])) == vars(parse_args(["x"]))
    with pytest.raises(SystemExit):
        parse_args(["x", name, *([] if flag.default is False else ["7"])])
    assert f"{name}: {flag.why}" in capsys.readouterr().err
