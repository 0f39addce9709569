"""CutMix and Mixup inside DALI's graph, and the LUMix loss (arXiv 2211.15846) for PyTorch.

The names below load on first use: the loss works without DALI, and `lumix_dali.fn` without PyTorch.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .loader import create_loader
    from .loss import LUMixLoss, check_target
    from .target import MixTarget

__version__ = "0.1.0"
__all__ = ["LUMixLoss", "MixTarget", "check_target", "create_loader"]

_HOME = {"LUMixLoss": "loss", "MixTarget": "target", "check_target": "loss", "create_loader": "loader"}


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOME[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])
