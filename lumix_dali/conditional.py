"""What DALI makes of an ``if``, without asking every caller to enable conditionals.

This is the only module that uses the private names ``fn._conditional``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

from nvidia.dali import fn
from nvidia.dali.data_node import DataNode
from nvidia.dali.pipeline import do_not_convert

Function = TypeVar("Function", bound=Callable[..., Any])


def verbatim(function: Function) -> Function:
    """Decorates a graph function that DALI must call as written where the pipeline has conditionals enabled.

    DALI would rewrite the function, with a ``zip`` of its own that does not know ``strict``.
    """
    return cast(Function, do_not_convert(function))


def split(node: DataNode, predicate: DataNode) -> Any:
    """The samples for which `predicate` (bool scalar on the CPU) is true, and the others."""
    return fn._conditional.split(node, predicate=predicate, _if_stmt=True)


def merge(true: DataNode, false: DataNode, predicate: DataNode) -> DataNode:
    """The batch of two parts that `split` made, in its order; both have one dtype, layout and number of dimensions."""
    return fn._conditional.merge(true, false, predicate=predicate)
