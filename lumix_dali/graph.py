"""Pieces of DALI graphs that `fn`, `augment` and the loader's pipelines share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

from nvidia.dali import fn
from nvidia.dali.data_node import DataNode
from nvidia.dali.pipeline import do_not_convert

_Function = TypeVar("_Function", bound=Callable[..., Any])


def as_written(function: _Function) -> _Function:
    """Keeps DALI's AutoGraph, which rewrites the code of pipelines with ``enable_conditionals``, out of a function.

    Its rewriting needs more than this package's Python: ``zip(strict=True)`` fails, for one.
    """
    return cast(_Function, do_not_convert(function))


def branch(
    predicate: DataNode, then: Callable[..., DataNode], otherwise: Callable[..., DataNode], *nodes: DataNode
) -> DataNode:
    """What DALI makes of an ``if`` on a batch, without asking every caller to enable conditionals.

    Args:
        predicate: bool scalar on the CPU.
        then, otherwise: graph functions of `nodes`, each for its part of the batch.
        nodes: what the functions need.
    """
    # The only use of this private module; tests/test_contracts.py fails if a release changes it.
    parts = [fn._conditional.split(node, predicate=predicate, _if_stmt=True) for node in nodes]
    return fn._conditional.merge(
        then(*(part[0] for part in parts)), otherwise(*(part[1] for part in parts)), predicate=predicate
    )


def first(node: DataNode, *_: DataNode) -> DataNode:
    """The first of the nodes: a branch that changes nothing."""
    return node


def put(node: Any, device: str) -> Any:
    """The node on "cpu" or "gpu"; anything but a DataNode as it is."""
    return node.gpu() if device == "gpu" and isinstance(node, DataNode) and node.device == "cpu" else node
