"""The RLTuner: it learns which generator settings give data that a target model improves on most (synth/tune.py).

from synth.tuning import Config, RLTuner
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from synth.tuning.config import Config
    from synth.tuning.tuner import RLTuner

__all__ = ["Config", "RLTuner"]


def __getattr__(name: str) -> Any:
    """The tuner on first use, so that reading a configuration does not import mlx."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{'tuner' if name == 'RLTuner' else 'config'}"), name)
