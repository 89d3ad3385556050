"""Models that measure speech: word errors, speaker similarity, predicted quality.

The default ones have their weights inside packages, so they run on a closed network.
"""

import importlib
from typing import Any

METRIC_SAMPLE_RATE = 16_000
"""Sample rate in Hz of the input of every metric model."""


def load_class(name: str) -> Any:
    """The class that `package.module:Class` names. Raises ValueError when there is none."""
    module, _, attribute = name.partition(":")
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ValueError(
            f"{name}: no such class ({error}); expected package.module:Class"
        ) from error
