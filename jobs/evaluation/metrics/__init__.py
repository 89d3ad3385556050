"""Judges of speech: who reads it, how it sounds, whose voice it is.

All work from weights inside packages, so they run on a closed network.
"""

import importlib
from typing import Any

METRIC_SAMPLE_RATE = 16_000
"""Sample rate every judge listens at."""


def load_class(name: str) -> Any:
    """The class that `package.module:Class` names. Raises ValueError when there is none."""
    module, _, attribute = name.partition(":")
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ValueError(
            f"{name}: no such class ({error}); expected package.module:Class"
        ) from error
