"""CutMix and Mixup inside DALI's graph, and the LUMix loss (arXiv 2211.15846) for PyTorch.

The names below load on first use: the loss works without DALI, and `lumix_dali.fn` without PyTorch.
"""

from importlib import import_module
from typing import TYPE_CHECKING

__version__ = "0.3.0"
__all__ = ["Kind", "LUMixLoss", "Loader", "MixTarget", "Mixing", "check_target", "create_loader"]

if TYPE_CHECKING:  # without __getattr__, so that a type checker sees a misspelt name
    from .loading.loader import Loader, create_loader
    from .loss import LUMixLoss
    from .mixing import Mixing
    from .target import Kind, MixTarget
    from .target_checks import check_target
else:
    _HOME = {
        "Kind": "target",
        "LUMixLoss": "loss",
        "Loader": "loading.loader",
        "MixTarget": "target",
        "Mixing": "mixing",
        "check_target": "target_checks",
        "create_loader": "loading.loader",
    }

    def __getattr__(name: str) -> object:
        if name not in _HOME:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(import_module(f".{_HOME[name]}", __name__), name)

    def __dir__() -> list[str]:
        return sorted([*globals(), *_HOME])
